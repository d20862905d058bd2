"""Measures a sample of embeddings: neighbours, dimensions, and the drift from an earlier distribution.

Embeddings are float32 ``(n_cells, n_features)`` throughout. Cells share a large mean, so a cell's neighbours are the
cells with the largest cosine after that mean is subtracted. Deciding whether a figure is good belongs in `verdicts`.
"""

import io
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Embeddings = npt.NDArray[np.float32]
Labels = npt.NDArray[np.str_]

NEIGHBOURS = 15
SHUFFLES = 20
SEED = 0
ROWS_AT_ONCE = 512
UNLABELLED = ("", "(none)", "unknown", "na", "nan")
"""Labels in obs of cells without a known label."""

COLLAPSED_SHARE = 1e-3
"""A dimension whose standard deviation is below this share of the median one carries no information."""

LEAST_CELLS_OF_A_TYPE = 50
MOST_TYPES = 40


@dataclass(frozen=True)
class Neighbours:
    """The nearest cells of each cell, nearest first.

    Attributes
    ----------
    indices
        int32 ``(n, k)``: rows of the sample; a cell is not its own neighbour.
    distances
        float32 ``(n, k)``: 1 - centred cosine, 0 to 2.
    """

    indices: npt.NDArray[np.int32]
    distances: npt.NDArray[np.float32]


def find_neighbours(embeddings: Embeddings, k: int = NEIGHBOURS) -> Neighbours:
    """Find the `k` nearest neighbours of each cell, exactly, a few rows at a time; fewer if there are fewer cells."""
    n = len(embeddings)
    k = min(k, n - 1)
    unit = embeddings - embeddings.mean(axis=0)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    indices, distances = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
    for start in range(0, n, ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, n))
        cosine = unit[rows] @ unit.T
        cosine[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(cosine, nearest, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        indices[rows] = np.take_along_axis(nearest, order, axis=1)
        distances[rows] = np.maximum(1 - np.take_along_axis(values, order, axis=1), 0)
    return Neighbours(indices, distances)


@dataclass(frozen=True)
class Agreement:
    """How often neighbours share a label.

    Attributes
    ----------
    cells, labels
        Number of cells with a label, and number of different labels.
    share
        Share of pairs of neighbours that have the same label.
    baseline
        The same share after shuffling labels within each dataset, mean of `SHUFFLES` shuffles. It includes the effect
        of datasets that are separate from others.
    excess
        (share - baseline) / (1 - baseline): 0 is chance, 1 is perfect. None if labels cannot differ.
    deviations
        (share - baseline) in standard deviations of the shuffles; None if labels cannot differ.
    """

    cells: int
    labels: int
    share: float
    baseline: float
    excess: float | None
    deviations: float | None


def label_agreement(neighbours: Neighbours, labels: Labels, datasets: Labels) -> Agreement:
    """Measure how often neighbours share a label, and compare with shuffled labels. Unlabelled cells are left out."""
    codes = np.unique(labels, return_inverse=True)[1]
    labelled = ~np.isin(labels, UNLABELLED)
    pairs = labelled[:, None] & labelled[neighbours.indices]
    count = max(int(pairs.sum()), 1)

    def share(values: npt.NDArray[np.int64]) -> float:
        return float(((values[:, None] == values[neighbours.indices]) & pairs).sum() / count)

    rng = np.random.default_rng(SEED)
    # Sorting labelled cells by dataset and then by a random number shuffles them within each dataset.
    rows = np.flatnonzero(labelled)
    groups = np.unique(datasets, return_inverse=True)[1][rows]
    home = rows[np.argsort(groups, kind="stable")]
    shuffled = []
    for _ in range(SHUFFLES):
        other = codes.copy()
        other[home] = codes[rows[np.lexsort((rng.random(len(rows)), groups))]]
        shuffled.append(share(other))
    found, baseline, deviation = share(codes), float(np.mean(shuffled)), float(np.std(shuffled))
    informative = baseline < 1 and deviation > 0
    return Agreement(
        cells=int(labelled.sum()),
        labels=len(np.unique(labels[labelled])),
        share=found,
        baseline=baseline,
        excess=(found - baseline) / (1 - baseline) if informative else None,
        deviations=(found - baseline) / deviation if informative else None,
    )


@dataclass(frozen=True)
class Dimensions:
    """How much the dimensions vary.

    Attributes
    ----------
    dimensions
        Number of dimensions.
    constant
        Positions of the dimensions with the same value in every cell.
    collapsed
        Positions of the dimensions, constant or not, whose standard deviation is below `COLLAPSED_SHARE` of the median.
    effective_rank
        exp of the entropy of the covariance's spectrum: the number of equal dimensions with the same entropy.
    """

    dimensions: int
    constant: tuple[int, ...]
    collapsed: tuple[int, ...]
    effective_rank: float


def look_at_dimensions(embeddings: Embeddings) -> Dimensions:
    """Measure the spread of each dimension."""
    constant = embeddings.max(axis=0) == embeddings.min(axis=0)
    deviations = embeddings.std(axis=0, dtype=np.float64)
    collapsed = constant | (deviations < COLLAPSED_SHARE * np.median(deviations))
    centred = embeddings - embeddings.mean(axis=0)
    spectrum = np.maximum(np.linalg.eigvalsh((centred.T @ centred).astype(np.float64)), 0)
    shares = spectrum[spectrum > 0] / max(spectrum.sum(), np.finfo(np.float64).tiny)
    return Dimensions(
        dimensions=embeddings.shape[1],
        constant=tuple(np.flatnonzero(constant).tolist()),
        collapsed=tuple(np.flatnonzero(collapsed).tolist()),
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
    )


@dataclass(frozen=True)
class Distribution:
    """Mean and standard deviation of each dimension, by cell type.

    Attributes
    ----------
    types
        Names of at most `MOST_TYPES` cell types, those with most cells first.
    cells
        Number of cells of each, int64 ``(n_types,)``.
    means, deviations
        float32 ``(n_types, n_features)``.
    """

    types: tuple[str, ...]
    cells: npt.NDArray[np.int64]
    means: Embeddings
    deviations: Embeddings

    @classmethod
    def of(cls, embeddings: Embeddings, labels: Labels) -> "Distribution":
        """Measure the cell types with `LEAST_CELLS_OF_A_TYPE` cells or more."""
        names, counts = np.unique(labels, return_counts=True)
        enough = [
            (int(count), str(name))
            for name, count in zip(names, counts, strict=True)
            if count >= LEAST_CELLS_OF_A_TYPE and name not in UNLABELLED
        ]
        chosen = sorted(enough, key=lambda pair: (-pair[0], pair[1]))[:MOST_TYPES]
        parts = [embeddings[labels == name] for _, name in chosen]
        shape = (len(chosen), embeddings.shape[1])
        return cls(
            types=tuple(name for _, name in chosen),
            cells=np.array([count for count, _ in chosen], np.int64),
            means=np.array([part.mean(axis=0) for part in parts], np.float32).reshape(shape),
            deviations=np.array([part.std(axis=0) for part in parts], np.float32).reshape(shape),
        )

    def to_bytes(self) -> bytes:
        """Serialise as numpy's npz, without pickles."""
        sink = io.BytesIO()
        names = np.array(self.types, np.str_)
        np.savez_compressed(sink, types=names, cells=self.cells, means=self.means, deviations=self.deviations)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Distribution":
        """Read the result of `to_bytes`.

        Raises
        ------
        ValueError
            When the content is something else.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as found:
                types = tuple(str(name) for name in found["types"])
                read = cls(types, found["cells"], found["means"], found["deviations"])
        except (KeyError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"not a distribution: {error}") from error
        if read.means.shape != read.deviations.shape or not len(read.types) == len(read.cells) == len(read.means):
            raise ValueError("the arrays of a distribution have different lengths")
        return read


@dataclass(frozen=True)
class Drift:
    """The difference of a distribution from an earlier one, over the cell types of both.

    Attributes
    ----------
    types
        Number of compared cell types.
    shift
        Difference of the means in standard deviations, root mean square over dimensions, minus the difference expected
        by chance for so few cells; median over cell types.
    spread
        Mean of |log2| of the ratio of standard deviations over dimensions; median over cell types.
    worst_type, worst_shift
        The cell type that moved most, and its shift.
    """

    types: int
    shift: float
    spread: float
    worst_type: str
    worst_shift: float


def drift(now: Distribution, before: Distribution) -> Drift | None:
    """Compare two distributions; None if they share no cell type."""
    shared = [name for name in now.types if name in before.types]
    if not shared:
        return None
    shifts, spreads = [], []
    for name in shared:
        a, b = now.types.index(name), before.types.index(name)
        first, second = now.deviations[a].astype(np.float64), before.deviations[b].astype(np.float64)
        pooled = (first**2 + second**2) / 2
        moved = (now.means[a].astype(np.float64) - before.means[b]) ** 2
        # Dimensions that hardly vary are left out, because they would divide by almost zero.
        usable = pooled > (COLLAPSED_SHARE**2) * np.median(pooled)
        chance = 1 / now.cells[a] + 1 / before.cells[b]
        if not usable.any():
            shifts.append(0.0 if not moved.any() else float("inf"))
            spreads.append(0.0)
            continue
        shifts.append(float(np.sqrt(max((moved[usable] / pooled[usable]).mean() - chance, 0.0))))
        least = np.sqrt(pooled[usable]) * COLLAPSED_SHARE
        ratio = np.maximum(first[usable], least) / np.maximum(second[usable], least)
        spreads.append(float(np.abs(np.log2(ratio)).mean()))
    worst = int(np.argmax(shifts))
    return Drift(len(shared), float(np.median(shifts)), float(np.median(spreads)), shared[worst], shifts[worst])
