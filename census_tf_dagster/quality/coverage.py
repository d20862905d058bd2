"""Counts which cells of a release are embedded, and how many genes they express, in one pass over obs.

The pass needs a bounded amount of memory. Counts outside the vocabulary belong in `vocabulary`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.release import NNZ, OrganismRelease

Ids = npt.NDArray[np.int64]

_BLOCK = 2**23
"""Number of joinids in a block; their bits take a megabyte."""

MOST_GENES = 100_000
"""Largest exact number of genes of a cell. It is larger than any gene axis of a Census."""


class JoinidSet:
    """A set of joinids. Dense joinids take a bit each: 20 MB for the 162 million human cells of 2025-11-08."""

    def __init__(self) -> None:
        self._blocks: dict[int, npt.NDArray[np.uint8]] = {}

    def add(self, joinids: Ids) -> None:
        """Add joinids, int64 ``(n,)``."""
        blocks = joinids // _BLOCK
        for block in np.unique(blocks).tolist():
            inside = joinids[blocks == block] - block * _BLOCK
            bits = self._blocks.setdefault(block, np.zeros(_BLOCK // 8, np.uint8))
            np.bitwise_or.at(bits, inside >> 3, (1 << (inside & 7)).astype(np.uint8))

    def holds(self, joinids: Ids) -> npt.NDArray[np.bool_]:
        """Return for each joinid whether it is in the set, bool ``(n,)``."""
        found = np.zeros(len(joinids), np.bool_)
        blocks = joinids // _BLOCK
        for block in np.unique(blocks).tolist():
            if (bits := self._blocks.get(block)) is not None:
                inside = joinids[blocks == block] - block * _BLOCK
                found[blocks == block] = (bits[inside >> 3] >> (inside & 7).astype(np.uint8) & 1) == 1
        return found


@dataclass(frozen=True)
class Covered:
    """Numbers of cells of one dataset, tissue, assay or cell type.

    Attributes
    ----------
    name
        Name of the dataset, tissue, assay or cell type.
    cells
        Its cells in the release.
    planned
        Number of these cells that the plan has.
    embedded
        Number of planned cells that a verification found in the array.
    """

    name: str
    cells: int
    planned: int
    embedded: int


@dataclass
class ObsSummary:
    """The result of `read_obs`.

    Attributes
    ----------
    counts
        Numbers of cells (in the release, planned, embedded) by column and value.
    genes
        Number of planned cells by number of expressed genes, int64 ``(MOST_GENES + 1,)``; None if obs does not state
    it. sampled_genes
        Number of expressed genes of each sampled cell, int64, by ascending joinid; None if obs does not state it.
    labels
        Columns of the sampled cells, in the same order.
    """

    counts: dict[str, dict[str, Counter[str]]]
    genes: npt.NDArray[np.int64] | None
    sampled_genes: npt.NDArray[np.int64] | None
    labels: dict[str, npt.NDArray[np.str_]] = field(default_factory=dict)

    def table(self, column: str) -> list[Covered]:
        """Return the values of one column, those with most planned cells first."""
        cells, planned, embedded = (self.counts[column][what] for what in ("cells", "planned", "embedded"))
        rows = [Covered(name, count, planned[name], embedded[name]) for name, count in cells.items()]
        return sorted(rows, key=lambda row: (-row.planned, -row.cells, row.name))


def read_obs(
    release: OrganismRelease, columns: Sequence[str], planned: JoinidSet, embedded: JoinidSet, sample: Ids
) -> ObsSummary:
    """Count the cells of all obs rows by label, and read the labels of the sample, in one pass.

    Parameters
    ----------
    release
        The release to read from.
    columns
        The columns with labels.
    planned, embedded
        The cells of the plan, and those that a verification found in the array.
    sample
        Ascending joinids of the cells whose labels are returned.
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
    """Return the values of a column, and for each cell the position of its value among them, int64."""
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
