"""Two releases of a Census: datasets stay, are revised, withdrawn, added; joinids and `var` order are assigned anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.demo.census import Organism, build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.schema import stable_uuid
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import value_of
from tests.support.project import RELEASE, Project

EARLIER = "2025-01-30"
N_GENES = 120

DatasetVersion = tuple[int, int]
"""A dataset's number and its version."""


@dataclass
class Pool:
    """Cells of every version of every dataset, in any release: rows of one synthetic organism."""

    organism: Organism
    rows: dict[DatasetVersion, np.ndarray]
    """Rows of the pool; a revised dataset has other cells."""

    @classmethod
    def draw(
        cls, versions: Sequence[DatasetVersion], cells_each: int, genes: int = N_GENES, median: int = 40
    ) -> "Pool":
        total = cells_each * len(versions)
        organism = synthetic_organism("homo_sapiens", "Homo sapiens", total, genes, "ENSG", seed=3, median_genes=median)
        rows = np.arange(total).reshape(len(versions), cells_each)
        return cls(organism, dict(zip(versions, rows, strict=True)))

    def release(self, versions: Sequence[DatasetVersion], seed: int, *, shuffle_genes: bool = True) -> "Contents":
        """Reorder the datasets and the genes. Cells keep their order within a dataset."""
        rng = np.random.default_rng(seed)
        order = [versions[i] for i in rng.permutation(len(versions))]
        rows = np.concatenate([self.rows[version] for version in order])
        of = np.repeat(np.arange(len(order)), [len(self.rows[version]) for version in order])
        cells = self.organism.cells.iloc[rows].reset_index(drop=True)
        cells["dataset_id"] = [stable_uuid("dataset", str(order[i][0])) for i in of]
        cells["dataset_version_id"] = [stable_uuid("version", *map(str, order[i])) for i in of]
        cells["observation_joinid"] = [f"{row:010d}" for row in rows]
        n_genes = self.organism.counts.shape[1]
        genes = rng.permutation(n_genes) if shuffle_genes else np.arange(n_genes)
        return Contents(
            rows,
            cells,
            self.organism.counts[rows][:, genes].tocsr(),
            self.organism.genes.iloc[genes].reset_index(drop=True),
        )


@dataclass
class Contents:
    """The content of a release. The joinid of a cell is its position."""

    rows: np.ndarray
    cells: pd.DataFrame
    counts: Any
    genes: pd.DataFrame

    def write(self, project: Project, release: str) -> None:
        counts = self.counts.copy()
        counts.eliminate_zeros()
        organism = Organism("homo_sapiens", "Homo sapiens", counts, self.genes, self.cells)
        build_census(str(project.folder / "census" / release), release, [organism])


STAY, REVISED, WITHDRAWN, NEW = range(8), (8,), (9,), (10, 11)


@dataclass
class TwoReleases:
    """The earlier release is filled and verified by `fill`; `rows` say which cells of the pool stand where."""

    project: Project
    pool: Pool
    earlier: Contents
    later: Contents

    def unchanged(self) -> np.ndarray:
        """Joinids of the later release's cells whose dataset is the same."""
        same = set(np.concatenate([self.pool.rows[number, 0] for number in STAY]).tolist())
        return np.array([joinid for joinid, row in enumerate(self.later.rows) if row in same])


def two_releases(
    project: Project,
    *,
    cells_each: int = 20,
    change: Callable[[Contents], None] = lambda _: None,
    change_earlier: Callable[[Contents], None] = lambda _: None,
    shuffle_genes: bool = True,
    seq_len: int = 63,
    **attributes: Any,
) -> TwoReleases:
    """Build both releases, a checkpoint, and the set `reusing`; `change` alters the later release first."""
    earlier_versions = [(number, 0) for number in (*STAY, *REVISED, *WITHDRAWN)]
    later_versions = [*((n, 0) for n in STAY), *((n, 1) for n in REVISED), *((n, 0) for n in NEW)]
    pool = Pool.draw(sorted({*earlier_versions, *later_versions}), cells_each)
    earlier = pool.release(earlier_versions, seed=1, shuffle_genes=shuffle_genes)
    later = pool.release(later_versions, seed=2, shuffle_genes=shuffle_genes)
    change(later)
    change_earlier(earlier)
    earlier.write(project, EARLIER)
    later.write(project, RELEASE)
    genes = pool.organism.genes["feature_id"].tolist()
    known = np.random.default_rng(5).permutation(genes[6:]).tolist()
    build_checkpoint(project.checkpoint, known, KNOWN_ASSAYS, embed_dim=16, seq_len=seq_len, block_len=seq_len + 1)
    settings = {"reuse": True, "gene_order": "vocabulary", "megabatch_size": 16, **attributes}
    project.add_set("reusing", organism="homo_sapiens", **settings)
    return TwoReleases(project, pool, earlier, later)


def fill_planned(context: ReleaseContext, *, reused: bool = False, shard: int | None = None) -> None:
    """Commit values that name their cell, in place of a model's, for all planned megabatches of a kind."""
    plan = read_plan(context.store, context.folder.plan)
    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    batches = [b for b in plan.megabatches if b.reused == reused and shard in (None, b.shard)]
    for ids in plan.read_ids(context.store, batches):
        array.write(ids, value_of(ids, array.n_features))


def verify_earlier(releases: TwoReleases, name: str = "reusing") -> None:
    """Plan the earlier release, fill its array, and verify it."""
    from census_tf_dagster.pipeline.finish_array import finish_array

    with releases.project.context(name, EARLIER) as context:
        make_plan(context)
        fill_planned(context)
        finish_array(context)
