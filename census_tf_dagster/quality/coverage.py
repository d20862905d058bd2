"""Which cells of a release are embedded, and how long they are: one pass over all of obs, in bounded memory."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.release import NNZ, OrganismRelease

Ids = npt.NDArray[np.int64]

_BLOCK = 2**23
"""Joinids whose bits are kept together, in a megabyte."""

MOST_GENES = 100_000
"""Genes of a cell are counted exactly up to here: above any gene axis of a Census."""


class JoinidSet:
    """A set of joinids, at a bit each where they are dense: 20 MB for the 162 million human cells of 2025-11-08."""

    def __init__(self) -> None:
        self._blocks: dict[int, npt.NDArray[np.uint8]] = {}

    def add(self, joinids: Ids) -> None:
        """Add some."""
        of = joinids // _BLOCK
        for block in np.unique(of).tolist():
            inside = joinids[of == block] - block * _BLOCK
            bits = self._blocks.setdefault(block, np.zeros(_BLOCK // 8, np.uint8))
            np.bitwise_or.at(bits, inside >> 3, (1 << (inside & 7)).astype(np.uint8))

    def holds(self, joinids: Ids) -> npt.NDArray[np.bool_]:
        """Tell of each whether it is in the set."""
        found = np.zeros(len(joinids), np.bool_)
        of = joinids // _BLOCK
        for block in np.unique(of).tolist():
            if (bits := self._blocks.get(block)) is not None:
                inside = joinids[of == block] - block * _BLOCK
                found[of == block] = (bits[inside >> 3] >> (inside & 7).astype(np.uint8) & 1) == 1
        return found


@dataclass(frozen=True)
class Covered:
    """How many cells of one dataset, tissue, assay or cell type there are.

    Attributes
    ----------
    name
        Which.
    cells
        In the release.
    planned
        Of those, how many match the set.
    embedded
        Of those, how many a verification shows to be in the array.
    """

    name: str
    cells: int
    planned: int
    embedded: int


@dataclass
class ObsSummary:
    """What one pass over obs has shown.

    Attributes
    ----------
    counts
        By column and value: cells of the release, planned, embedded.
    genes
        How many planned cells have so many expressed genes, int64 ``(MOST_GENES + 1,)``; None where obs does not say.
    sampled_genes
        Expressed genes of the sampled cells, int64, in ascending order of joinid; None where obs does not say.
    labels
        The columns of the sampled cells, in the same order.
    """

    counts: dict[str, dict[str, Counter[str]]]
    genes: npt.NDArray[np.int64] | None
    sampled_genes: npt.NDArray[np.int64] | None
    labels: dict[str, npt.NDArray[np.str_]] = field(default_factory=dict)

    def table(self, column: str) -> list[Covered]:
        """Return one column's values, those with most planned cells first."""
        cells, planned, embedded = (self.counts[column][what] for what in ("cells", "planned", "embedded"))
        rows = [Covered(name, count, planned[name], embedded[name]) for name, count in cells.items()]
        return sorted(rows, key=lambda row: (-row.planned, -row.cells, row.name))


def read_obs(
    release: OrganismRelease, columns: Sequence[str], planned: JoinidSet, embedded: JoinidSet, sample: Ids
) -> ObsSummary:
    """Read obs once.

    Parameters
    ----------
    release
        Where.
    columns
        The columns of labels that are counted.
    planned, embedded
        The cells of the plan, and those of them that are verified to be in the array.
    sample
        Ascending joinids whose labels are wanted.
    """
    whats = ("cells", "planned", "embedded")
    found = ObsSummary(
        {column: {what: Counter() for what in whats} for column in columns},
        np.zeros(MOST_GENES + 1, np.int64) if release.has_nnz else None,
        np.zeros(len(sample), np.int64) if release.has_nnz else None,
    )
    sampled = JoinidSet()
    sampled.add(sample)
    labels: dict[str, npt.NDArray[np.object_]] = {column: np.full(len(sample), "", object) for column in columns}
    for table in release.obs.read(column_names=["soma_joinid", *columns, *([NNZ] if release.has_nnz else [])]):
        joinids = table["soma_joinid"].to_numpy()
        masks = {"cells": np.ones(len(joinids), np.bool_)}
        masks |= {"planned": planned.holds(joinids), "embedded": embedded.holds(joinids)}
        rows = np.flatnonzero(sampled.holds(joinids))
        positions = np.searchsorted(sample, joinids[rows])
        if found.genes is not None and found.sampled_genes is not None:
            genes = np.minimum(table[NNZ].to_numpy(), MOST_GENES)
            found.genes += np.bincount(genes[masks["planned"]], minlength=MOST_GENES + 1)
            found.sampled_genes[positions] = genes[rows]
        for column in columns:
            names, codes = _encoded(table[column])
            for what, mask in masks.items():
                totals = np.bincount(codes[mask], minlength=len(names))
                found.counts[column][what].update({names[code]: int(totals[code]) for code in np.flatnonzero(totals)})
            labels[column][positions] = [names[code] for code in codes[rows]]
    found.labels = {column: values.astype(str) for column, values in labels.items()}
    return found


def _encoded(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Return the values of a column and the position of each cell's among them."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    column = column.unify_dictionaries().combine_chunks()
    chunks: Iterable[pa.DictionaryArray] = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    names: list[str] = []
    codes: list[npt.NDArray[np.int64]] = []
    for chunk in chunks:
        offset = len(names)
        names += [str(name) for name in chunk.dictionary.to_pylist()] + ["(none)"]
        codes.append(offset + chunk.indices.fill_null(len(chunk.dictionary)).to_numpy().astype(np.int64))
    return names, np.concatenate(codes) if codes else np.empty(0, np.int64)
