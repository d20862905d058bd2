"""A sample in the plane, for the eye: UMAP, the same every time on one machine."""

import warnings

import numpy as np
import numpy.typing as npt

from census_tf_dagster.quality.measures import SEED, Embeddings, Neighbours

LEAST_CELLS = 10
"""With fewer there is nothing to lay out."""


def project(embeddings: Embeddings, neighbours: Neighbours) -> npt.NDArray[np.float32]:
    """Lay a sample out in the plane by its neighbours.

    Parameters
    ----------
    embeddings
        float32 ``(n, n_features)``.
    neighbours
        Of these cells.

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
        # Of a part that is not used. And these neighbours come without an index: nothing is added later.
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        warnings.filterwarnings("ignore", message="precomputed_knn", category=UserWarning)
        # Compiles for ten seconds: only who draws imports it.
        import umap

        layout = umap.UMAP(
            n_neighbors=known[0].shape[1],
            min_dist=0.3,
            init=start,
            precomputed_knn=known,
            # Otherwise those of few cells are computed again, by another distance.
            force_approximation_algorithm=True,
            random_state=SEED,
            n_jobs=1,
        )
        return np.asarray(layout.fit_transform(embeddings), np.float32)


def _principal_components(embeddings: Embeddings) -> npt.NDArray[np.float32]:
    centred = embeddings - embeddings.mean(axis=0)
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    found = centred @ vectors[:, :-3:-1].astype(np.float32)
    # The sign of an eigenvector is arbitrary; UMAP wants about this size.
    found *= np.sign(found[np.abs(found).argmax(axis=0), [0, 1]])
    return np.asarray(10 * found / max(float(np.abs(found).max()), np.finfo(np.float32).tiny), np.float32)
