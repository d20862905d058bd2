"""Projects a sample onto the plane with UMAP, for pictures. The result is reproducible on one machine."""

import warnings

import numpy as np
import numpy.typing as npt

from census_tf_dagster.io.compiled import keep_compiled
from census_tf_dagster.quality.measures import SEED, Embeddings, Neighbours

LEAST_CELLS = 10
"""Least number of cells for UMAP."""


def project(embeddings: Embeddings, neighbours: Neighbours) -> npt.NDArray[np.float32]:
    """Project a sample onto the plane by its neighbours.

    Parameters
    ----------
    embeddings
        float32 ``(n, n_features)``.
    neighbours
        Neighbours of these cells.

    Returns
    -------
    ndarray
        float32 ``(n, 2)``: UMAP, started from the first two principal components.
    """
    start = _principal_components(embeddings)
    if len(embeddings) < LEAST_CELLS:
        return start
    n = len(embeddings)
    itself = np.arange(n, dtype=np.int32)[:, None]
    known = (
        np.hstack([itself, neighbours.indices]),
        np.hstack([np.zeros((n, 1), np.float32), neighbours.distances]),
    )
    with warnings.catch_warnings():
        # The first warning is about a part that is not used. The second is about a missing index of the neighbours,
        # which only later additions would need.
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        warnings.filterwarnings("ignore", message="precomputed_knn", category=UserWarning)
        # The import is here because it takes seconds. Without a cache, UMAP compiles for more than ten.
        import umap

        for module in (umap.umap_, umap.layouts, umap.utils):
            keep_compiled(module)
        layout = umap.UMAP(
            n_neighbors=known[0].shape[1],
            min_dist=0.3,
            init=start,
            precomputed_knn=known,
            # Without this, UMAP computes the neighbours of few cells again, with another distance.
            force_approximation_algorithm=True,
            random_state=SEED,
            n_jobs=1,
        )
        return np.asarray(layout.fit_transform(embeddings), np.float32)


def _principal_components(embeddings: Embeddings) -> npt.NDArray[np.float32]:
    centred = embeddings - embeddings.mean(axis=0)
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    found = centred @ vectors[:, :-3:-1].astype(np.float32)
    # The sign of an eigenvector is arbitrary. UMAP expects about this scale.
    found *= np.sign(found[np.abs(found).argmax(axis=0), [0, 1]])
    return np.asarray(10 * found / max(float(np.abs(found).max()), np.finfo(np.float32).tiny), np.float32)
