"""The dry run of a launch: it plans and estimates as a launch would, and starts and writes nothing."""

from collections.abc import Iterable
from dataclasses import dataclass

from census_tf_dagster.census.plan import Plan, to_compute
from census_tf_dagster.config.cost import LAST_SHARDS, Cost, Throughput, utc_now
from census_tf_dagster.config.dagster_names import SHARDS
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.graphql import Deployment
from census_tf_dagster.operate.remote_set import find_set
from census_tf_dagster.operate.runs import materializations
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.cost_estimate import estimate
from census_tf_dagster.pipeline.plan_release import PlanSummary, draft_plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.write_notes import read_notes


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Attributes
    ----------
    plan
        The plan that the launch would write, or that is already there.
    checkpoint_fingerprint
        Fingerprint of the checkpoint, the value for the set's field of the same name.
    shards
        The shards that the launch would run.
    cells, cells_to_compute, cells_to_copy
        All cells of these shards; cells that the launch would compute; cells that it would copy.
    megabatches_to_compute, megabatches_to_copy
        Missing writes.
    bytes_to_write
        Estimate for the missing cells.
    cost
        Cost of computing the missing cells.
    """

    plan: PlanSummary
    checkpoint_fingerprint: str
    shards: tuple[int, ...]
    cells: int
    cells_to_compute: int
    cells_to_copy: int
    megabatches_to_compute: int
    megabatches_to_copy: int
    bytes_to_write: int
    cost: Cost


def dry_run(
    context: ReleaseContext, shards: tuple[int, ...] | None, *, recompute: bool, measured: Iterable[Throughput] = ()
) -> DryRun:
    """Return what a launch of some shards would do.

    Parameters
    ----------
    context
        The opened context of the set and release.
    shards
        The numbers of the shards; None: all.
    recompute
        Whether the launch would also compute cells that are already in the array.
    measured
        Figures of the set's last shards.

    Raises
    ------
    UserError
        As in planning, or when a shard does not exist.
    """
    found = draft_plan(context)
    plan = Plan(found.summary.totals, found.megabatches, context.folder.plan)
    chosen = tuple(range(plan.totals.shards)) if shards is None else shards
    batches = [batch for shard in chosen for batch in plan.shard(shard)]
    todo = batches
    if context.store.holds_files(context.folder.array):
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        if not recompute:
            notes = read_notes(context.store, context.folder, plan, chosen)
            todo = missing_megabatches(array, plan, batches, notes)
    copy = [batch for batch in todo if batch.reused]
    compute = to_compute(todo)
    cells_to_copy, cells_to_compute = (sum(batch.cells for batch in some) for some in (copy, compute))
    return DryRun(
        plan=found.summary,
        checkpoint_fingerprint=context.identity.checkpoint_fingerprint,
        shards=chosen,
        cells=sum(batch.cells for batch in batches),
        cells_to_compute=cells_to_compute,
        cells_to_copy=cells_to_copy,
        megabatches_to_compute=len(compute),
        megabatches_to_copy=len(copy),
        bytes_to_write=found.summary.estimated_bytes * (cells_to_compute + cells_to_copy) // plan.totals.cells,
        cost=estimate(context, sum(batch.tokens for batch in compute), measured),
    )


def measured_shards(url: str, name: str) -> list[Throughput]:
    """Return figures of a set's shards from their last release; empty when the deployment does not answer."""
    try:
        deployment = Deployment.at(url)
        remote_set = find_set(deployment, name)
    except UserError:
        # The estimate then names another source.
        return []
    for release in reversed(remote_set.releases):
        partitions = [remote_set.partition(release, shard) for shard in range(len(remote_set.shard_keys))]
        stored = sorted(materializations(deployment, remote_set, SHARDS, partitions).values(), key=lambda one: one.at)
        figures = ({**one.numbers, **one.figures, **one.texts} for one in stored[-LAST_SHARDS:])
        if done := [one for found_figures in figures if (one := Throughput.of(found_figures))]:
            return done
    return []


def describe(result: DryRun) -> str:
    """Return the lines that a person reads before they spend money."""
    plan = result.plan
    ours, theirs = plan.storage_versions
    differ = "" if ours == theirs else f"storage version: {ours}; the Census has {theirs} (docs/publish.md)\n"
    finish = result.cost.finish(utc_now())
    done = f"; if started now, the shards finish on {finish:%Y-%m-%d}" if finish else ""
    reuse = "".join(f"not reused: {reason}\n" for reason in plan.passed_over)
    if plan.totals.source is not None or plan.passed_over:
        reuse = f"reuse: {plan.reuse()}\n{reuse}"
    warnings = "".join(f"WARNING: {warning}\n" for warning in plan.warnings)
    zeros = plan.totals.cells_without_counts
    copies = ""
    if result.cells_to_copy:
        copies = f", and copy {result.cells_to_copy:,} in {result.megabatches_to_copy:,}"
    return (
        f"plan: {plan.totals.cells:,} cells ({plan.totals.primary_cells:,} primary, "
        f"{'an unknown number' if zeros is None else f'{zeros:,}'} without counts), {plan.totals.tokens:,} tokens, "
        f"{plan.totals.shards} shards, {plan.totals.megabatches:,} megabatches\n"
        f"checkpoint: {result.checkpoint_fingerprint} (the value for `checkpoint_fingerprint` in the set's YAML)\n"
        f"genes: the checkpoint knows {plan.known_genes:,} of {plan.expressed_genes:,} expressed "
        f"({plan.known_share:.1%} of all entries). {plan.gene_check}\n"
        f"{differ}{reuse}{warnings}"
        f"would run {len(result.shards)} shards and compute {result.cells_to_compute:,} of their {result.cells:,} "
        f"cells in {result.megabatches_to_compute:,} writes{copies}, about {result.bytes_to_write:,} bytes\n"
        f"cost: {result.cost}{done}\n"
        f"into {plan.root}\n"
        "Nothing was started and nothing written."
    )
