"""Assesses a verified array: computes measures, pictures and coverage from a sample and one pass over obs.

How a measure is computed and decided belongs in `quality`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.gene_check import look_at_genes
from census_tf_dagster.census.plan import Plan, read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.quality import measures, pictures, verdicts
from census_tf_dagster.quality.coverage import MOST_GENES, JoinidSet, read_obs
from census_tf_dagster.quality.measures import Distribution
from census_tf_dagster.quality.projection import project
from census_tf_dagster.quality.report import Report, read_about, read_distribution
from census_tf_dagster.quality.sample import SEED, digest, iter_planned, read_embeddings, sampled_positions
from census_tf_dagster.quality.upstream_comparison import UpstreamComparison
from census_tf_dagster.quality.vocabulary import COUNTED_CELLS, Outside, count_outside
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.verification import all_set_aside, release_state, verified_shards

COLUMNS = ("cell_type", "tissue_general", "dataset_id", "assay")
TITLES = {"cell_type": "cell type", "tissue_general": "tissue", "dataset_id": "dataset", "assay": "assay"}
SAME_MODEL = ("organism", "checkpoint_fingerprint", "gene_order", "embedding_dim")
"""Fields of two identities that must be equal for their embeddings to be comparable."""


@dataclass
class _Clock:
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self.say(f"quality: {name} in {self.seconds[name]:.1f} s")


def assess(context: ReleaseContext, say: Callable[[str], None] = lambda _: None) -> Report:
    """Measure and draw a verified array, and store the report beside it.

    Time and memory hardly grow with the release, because it uses a fixed sample of the cells and one pass over obs.

    Parameters
    ----------
    context
        The opened set and release.
    say
        Called with a message after each part.

    Raises
    ------
    UserError
        When the array is not verified, or no sampled cell has counts.
    """
    plan = read_plan(context.store, context.folder.plan)
    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    if (state := release_state(array, plan)) != "verified":
        raise UserError(f"the array is {state}; expected verified: materialize embeddings_array first.")
    clock = _Clock(say)
    with clock.part("the plan's cells"):
        sample, planned, embedded = _listed(context, plan, array)
    with clock.part("obs"):
        columns = [name for name in COLUMNS if name in context.release.obs.keys()]  # noqa: SIM118
        obs = read_obs(context.release, columns, planned, embedded, sample)
        labels = {name: obs.labels.get(name, np.full(len(sample), "(none)")) for name in COLUMNS}
    with clock.part("counts outside the vocabulary"):
        known = np.array([context.checkpoint.knows(gene) for gene in context.genes.ids])
        # If obs does not state which cells have counts, the counts of the whole sample are read.
        most = len(sample) if obs.sampled_genes is None else COUNTED_CELLS
        outside = count_outside(context.release, sample, known, context.checkpoint.aux_column, most)
    sampled_genes = outside.genes if obs.sampled_genes is None else obs.sampled_genes
    genes = (
        np.bincount(np.minimum(outside.genes, MOST_GENES), minlength=MOST_GENES + 1) if obs.genes is None else obs.genes
    )
    # Embeddings of cells without counts are nearly equal: they depend on nothing but the assay.
    counted = sampled_genes > 0
    if not counted.any():
        raise UserError(
            f"none of the {len(sample):,} sampled cells has counts; expected some, because there is nothing else to "
            "measure: check the set's `value_filter` and the Census."
        )
    with clock.part("the sample's embeddings"):
        embeddings = read_embeddings(array, sample[counted])
        shown = {name: values[counted] for name, values in labels.items()}
    with clock.part("neighbours"):
        neighbours = measures.find_neighbours(embeddings) if len(embeddings) > 1 else None
    with clock.part("UMAP"):
        points = project(embeddings, neighbours) if neighbours else np.zeros((len(embeddings), 2), np.float32)
    with clock.part("measures"):
        distribution = Distribution.of(embeddings, shown["cell_type"])
        found = {
            "neighbours_share_cell_type": verdicts.of_neighbours(
                measures.label_agreement(neighbours, shown["cell_type"], shown["dataset_id"]) if neighbours else None
            ),
            "no_collapsed_dimensions": verdicts.of_dimensions(measures.look_at_dimensions(embeddings)),
            "drift_from_previous_release": _drift(context, distribution),
            "gene_ids_fit_counts": verdicts.of_genes(
                look_at_genes(context.genes, context.settings.organism, outside.expressing, len(outside.rows))
            ),
            "same_as_upstream": verdicts.of_comparisons(
                _comparisons(context, plan), may_lack_upstream=context.settings.may_lack_upstream
            ),
        }
    window = context.checkpoint.shape.seq_len
    with clock.part("pictures"):
        drawn = _draw(context, points, shown, genes) | _draw_counts(context, labels, genes, outside, window)
    report = Report(
        about={
            "set": context.settings.name,
            "release": context.release_name,
            "identity": vars(context.identity),
            "plan": plan.totals.plan,
            "covered": array.read_record()["covered"],
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "sample": {
                "cells": len(sample),
                "without_counts": int((~counted).sum()),
                "seed": SEED,
                "digest": digest(sample),
            },
            "cells_without_counts": None if obs.genes is None else int(obs.genes[0]),
        },
        coverage={name: obs.table(name) for name in columns},
        genes_per_cell=_genes_per_cell(genes, window),
        vocabulary={
            "cells_counted": len(outside.rows),
            "counts_outside": outside.share,
            "cells_with_more_known_genes_than_the_window": int((outside.known_genes > window).sum()),
        },
        verdicts=found,
        pictures=drawn,
        distribution=distribution,
        seconds=clock.seconds,
    )
    report.write(context.store, context.folder.qc)
    return report


def _listed(
    context: ReleaseContext, plan: Plan, array: EmbeddingsArray
) -> tuple[npt.NDArray[np.int64], JoinidSet, JoinidSet]:
    """Return the sample, all planned cells, and the cells that a verification found in the array."""
    verified = verified_shards(array, plan, context.folder)
    without = np.array(sorted(all_set_aside(array, plan, context.folder)), np.int64)
    positions = sampled_positions(np.array([batch.cells for batch in plan.megabatches], np.int64))
    planned, embedded = JoinidSet(), JoinidSet()
    sample = []
    for index, ids in iter_planned(plan, array):
        planned.add(ids)
        chosen = ids[positions[index]]
        if plan.megabatches[index].shard in verified:
            embedded.add(np.setdiff1d(ids, without, assume_unique=True))
        sample.append(np.setdiff1d(chosen, without, assume_unique=True))
    return np.sort(np.concatenate(sample)), planned, embedded


def _drift(context: ReleaseContext, distribution: Distribution) -> verdicts.Verdict:
    previous = _previous(context)
    if previous is None:
        return verdicts.of_drift(None, None)
    release, before = previous
    return verdicts.of_drift(measures.drift(distribution, before), release)


def _previous(context: ReleaseContext) -> tuple[str, Distribution] | None:
    """Find the latest earlier release of this set with a report on the same model."""
    mine = vars(context.identity)
    earlier: list[tuple[str, str, str, str]] = []
    for release in context.store.list(context.folder.set_folder):
        for folder in context.store.list(release):
            qc = f"{folder.rstrip('/')}/qc"
            about = read_about(context.store, qc)
            if about is None:
                continue
            theirs: Mapping[str, Any] = about["identity"]
            built = str(theirs.get("census_build_date"))
            if built < context.identity.census_build_date and all(
                theirs.get(name) == mine[name] for name in SAME_MODEL
            ):
                earlier.append((built, str(about.get("made_at")), str(about.get("release")), qc))
    for _, _, name, qc in sorted(earlier, reverse=True):
        if (found := read_distribution(context.store, qc)) and found.means.shape[1:] == (
            context.identity.embedding_dim,
        ):
            return name, found
    return None


def _comparisons(context: ReleaseContext, plan: Plan) -> list[UpstreamComparison | None]:
    shards = [shard for shard in range(plan.totals.shards) if plan.shard(shard)]
    return [
        UpstreamComparison.read(context.store, context.folder.comparison(plan.totals.plan, shard)) for shard in shards
    ]


def _genes_per_cell(genes: npt.NDArray[np.int64], window: int) -> dict[str, float | int]:
    running = np.cumsum(genes) / max(genes.sum(), 1)
    quantiles = {f"quantile_{q:g}": int(np.searchsorted(running, q)) for q in (0.01, 0.25, 0.5, 0.75, 0.99)}
    over = int(genes[window + 1 :].sum())
    return {
        "window": window,
        "cells_over_window": over,
        "share_over_window": over / max(int(genes.sum()), 1),
        **quantiles,
    }


def _named(context: ReleaseContext, labels: Mapping[str, npt.NDArray[np.str_]]) -> dict[str, npt.NDArray[np.str_]]:
    """Return labels with the titles of datasets instead of their ids."""
    titles = context.release.dataset_titles()
    return {**labels, "dataset_id": np.array([titles.get(name, name) for name in labels["dataset_id"]], np.str_)}


def _head(context: ReleaseContext) -> str:
    return f"{context.settings.name} · {context.release_name}"


def _draw(
    context: ReleaseContext,
    points: npt.NDArray[np.float32],
    labels: Mapping[str, npt.NDArray[np.str_]],
    genes: npt.NDArray[np.int64],
) -> dict[str, bytes]:
    """Draw the sample's cells that have counts, coloured by cell type, tissue, dataset and assay."""
    about = (
        f"UMAP of {len(points):,} of {int(genes.sum()):,} cells, the same ones at each run. "
        "Distances between groups mean little."
    )
    named = _named(context, labels)
    return {
        f"umap_{name.removesuffix('_id').removesuffix('_general')}": pictures.scatter(
            points, named[name], title, f"{_head(context)} · by {title}", about
        )
        for name, title in TITLES.items()
    }


def _draw_counts(
    context: ReleaseContext,
    labels: Mapping[str, npt.NDArray[np.str_]],
    genes: npt.NDArray[np.int64],
    outside: Outside,
    window: int,
) -> dict[str, bytes]:
    """Draw how much of a cell the model sees, with the labels of the whole sample."""
    named = _named(context, labels)
    which = (
        "All {:,} planned cells, by nnz of obs"
        if context.release.has_nnz
        else "{:,} cells of the sample, by their counts"
    )
    return {
        "genes_per_cell": pictures.genes_histogram(
            genes,
            window,
            f"{_head(context)} · genes per cell and the model's window",
            which.format(int(genes.sum())) + ". Genes outside the vocabulary count here, but not in the window.",
        ),
        "outside_vocabulary": pictures.share_bars(
            [(f"by {TITLES[name]}", outside.shares_by(named[name])) for name in ("assay", "dataset_id")],
            outside.share,
            f"{_head(context)} · counts of genes that the model does not know",
            f"Share of all counts (number of cells), over {len(outside.rows):,} cells of the sample. Red: share over "
            f"all these cells, {outside.share:.1%}.",
        ),
    }
