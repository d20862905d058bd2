"""What a launch would do and write, worked out without doing or writing any of it."""

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
    """What a launch would do.

    Attributes
    ----------
    plan
        The plan it would write, or finds written.
    checkpoint_fingerprint
        Of the checkpoint that was found: what a set's field of that name would demand.
    shards
        The shards it would run.
    cells, cells_to_compute, cells_to_copy
        Cells of these shards, and those that are not committed yet.
    megabatches_to_compute, megabatches_to_copy
        Writes that are missing.
    bytes_to_write
        Estimated, for the missing cells.
    cost
        What computing them takes.
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
    """LaunchScope out what a launch of some shards (None: all) would do.

    Parameters
    ----------
    context
        The opened set and release.
    shards
        Their numbers.
    recompute
        Whether cells that are there would be computed again.
    measured
        What the last shards of this set have done.

    Raises
    ------
    UserError
        As planning would, or when a shard does not exist.
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
    """Ask a deployment what shards of a set have done on their last release; nothing when it does not answer."""
    try:
        deployment = Deployment.at(url)
        found = find_set(deployment, name)
    except UserError:
        # The estimate then says what else it stands on.
        return []
    for release in reversed(found.releases):
        partitions = [found.partition(release, shard) for shard in range(len(found.shard_keys))]
        stored = sorted(materializations(deployment, found, SHARDS, partitions).values(), key=lambda one: one.at)
        figures = ({**one.numbers, **one.figures, **one.texts} for one in stored[-LAST_SHARDS:])
        if done := [one for found_figures in figures if (one := Throughput.of(found_figures))]:
            return done
    return []


def describe(result: DryRun) -> str:
    """Return what a person wants to read before money is spent."""
    plan = result.plan
    ours, theirs = plan.storage_versions
    differ = "" if ours == theirs else f"storage version: {ours}, the Census has {theirs} (docs/publish.md)\n"
    finish = result.cost.finish(utc_now())
    done = f"; started now, shards would be done on {finish:%Y-%m-%d}" if finish else ""
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
        f"checkpoint: {result.checkpoint_fingerprint} (what `checkpoint_fingerprint` in the set's YAML would demand)\n"
        f"genes: the checkpoint knows {plan.known_genes:,} of {plan.expressed_genes:,} expressed "
        f"({plan.known_share:.1%} of all entries). {plan.gene_check}\n"
        f"{differ}{reuse}{warnings}"
        f"would run {len(result.shards)} shards and compute {result.cells_to_compute:,} of their {result.cells:,} "
        f"cells in {result.megabatches_to_compute:,} writes{copies}, about {result.bytes_to_write:,} bytes\n"
        f"cost: {result.cost}{done}\n"
        f"into {plan.root}\n"
        "Nothing was started and nothing written."
    )
