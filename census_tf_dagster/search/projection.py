"""Projects embeddings onto the principal components of a release, centred on its mean.

All cells of a release share a large mean, and most of the variance lies in few directions (docs/search.md). Euclidean
distances between projected embeddings are those between embeddings, but for the variance that the projection drops.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from census_tf_dagster.errors import UserError
from census_tf_dagster.search.arrays_file import from_bytes, to_bytes
from census_tf_dagster.store.array import round_to_bfloat16


@dataclass(frozen=True)
class Projection:
    """A projection of embeddings.

    Attributes
    ----------
    mean
        Mean of the sample that it was fitted to, float32 ``(n_features,)``.
    axes
        Principal components as columns, orthonormal, float32 ``(n_features, n_dimensions)``.
    variance_kept
        Share of the sample's variance that the axes keep, 0 to 1.
    """

    mean: npt.NDArray[np.float32]
    axes: npt.NDArray[np.float32]
    variance_kept: float

    @property
    def n_features(self) -> int:
        """Number of features of an embedding."""
        return len(self.mean)

    @property
    def n_dimensions(self) -> int:
        """Number of values of a projected embedding."""
        return len(self.axes.T)

    def __call__(self, embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return projected embeddings, float32 ``(n, n_dimensions)``, for embeddings ``(n, n_features)``.

        The values are rounded to bfloat16, as those in the index.

        Raises
        ------
        UserError
            When the number of features differs.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.n_features:
            raise UserError(
                f"the embeddings have the shape {embeddings.shape}; expected (cells, {self.n_features}), as in the "
                "array that the index was built from."
            )
        return round_to_bfloat16(np.ascontiguousarray((embeddings - self.mean) @ self.axes, np.float32))

    def as_bytes(self) -> bytes:
        """Return the projection as a file's content."""
        return to_bytes(mean=self.mean, axes=self.axes, variance_kept=np.array(self.variance_kept))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Projection":
        """Return the projection of a file's content.

        Raises
        ------
        ValueError
            When the content is damaged.
        """
        mean, axes, kept = from_bytes(content, ("mean", "axes", "variance_kept"))
        if mean.ndim != 1 or axes.ndim != 2 or len(axes) != len(mean):
            raise ValueError(f"mean of shape {mean.shape} and axes of shape {axes.shape} are no projection")
        return cls(mean.astype(np.float32), axes.astype(np.float32), float(kept))

    @classmethod
    def fit(cls, embeddings: npt.NDArray[np.float32], n_dimensions: int) -> "Projection":
        """Return the projection onto the principal components of a sample.

        Parameters
        ----------
        embeddings
            The sample, float32 ``(n, n_features)``.
        n_dimensions
            Number of components; all if there are no more.
        """
        mean = embeddings.mean(axis=0, dtype=np.float64)
        covariance = np.zeros((len(mean), len(mean)))
        for start in range(0, len(embeddings), 4096):
            part = embeddings[start : start + 4096] - mean
            covariance += part.T @ part
        values, vectors = np.linalg.eigh(covariance)
        kept = slice(None, -n_dimensions - 1, -1)
        total = max(float(values.sum()), np.finfo(np.float64).tiny)
        axes = np.ascontiguousarray(vectors[:, kept], np.float32)
        return cls(mean.astype(np.float32), axes, float(values[kept].sum()) / total)
