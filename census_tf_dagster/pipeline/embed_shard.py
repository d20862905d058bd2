"""Step 2: embed one shard. Does what is missing, commits each megabatch, reads everything back."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from census_tf_dagster.census.plan import Megabatch, Plan, read_plan, to_compute
from census_tf_dagster.pipeline.check_upstream import checking_upstream
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.stages import TRIES, Outcome, Times, outcomes
from census_tf_dagster.quality.upstream_comparison import UpstreamComparison
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.mending import mend_shard
from census_tf_dagster.store.verification import is_verified, require_shard, set_aside_of
from census_tf_dagster.store.write_notes import NoteBook, Written, read_notes

MOST_FAILED = 8
"""Megabatches. With more, the fault is hardly in them: stop spending."""
MOST_SET_ASIDE = 100
"""Cells of a shard of up to 10,000."""
NAMED = 10
"""Cells that an error names."""


@dataclass
class ShardSummary:
    """What one run of a shard has done so far.

    Attributes
    ----------
    plan
        Hash of the plan it works on.
    cells, cells_computed, cells_before
        Cells of the shard that are computed (reused ones are `copy_shard`'s), those that this run computed, and those
        that were there before it.
    tokens_computed
        Tokens that went through the model.
    seconds
        From when all devices had loaded the model to the last commit.
    times
        What each stage has done.
    verification_seconds
        Time of reading back, and of waiting for upstream's own code beside it.
    verified
        Whether the shard was read back; while cells that it reuses are not copied, it is left to whoever copies them.
    set_aside
        Why cells of the shard have no embedding, by joinid; known once it is verified.
    cells_widened, cells_fractional
        Cells that this run computed in a wider precision, and those with counts that are no whole numbers.
    megabatches_mended
        Those that were damaged when they were read back, and were computed again.
    comparison
        What that made of a few cells; None for a shard without cells.
    """

    plan: str
    cells: int
    cells_before: int
    megabatches: int
    megabatches_computed: int = 0
    cells_computed: int = 0
    tokens_computed: int = 0
    seconds: float = 0.0
    times: Times = field(default_factory=Times)
    verification_seconds: float = 0.0
    verified: bool = False
    comparison: UpstreamComparison | None = None
    set_aside: dict[int, str] = field(default_factory=dict)
    cells_widened: int = 0
    cells_fractional: int = 0
    megabatches_mended: int = 0

    def cells_per_second(self) -> float:
        """Return the rate of this run, loading excluded; 0 before anything was computed."""
        return self.cells_computed / self.seconds if self.seconds else 0.0

    def tokens_per_second(self) -> float:
        """Return the rate in tokens: what compares shards of long and of short cells."""
        return self.tokens_computed / self.seconds if self.seconds else 0.0

    def seconds_left(self) -> float:
        """Return how long the rest will take at this rate; 0 before anything was computed."""
        rate = self.cells_per_second()
        return (self.cells - self.cells_before - self.cells_computed) / rate if rate else 0.0


class SetAsideError(Exception):
    """Megabatches could not be embedded at all, or too many cells of a shard; what is committed stays.

    Attributes
    ----------
    details
        What failed and why, a sentence each.
    """

    def __init__(self, message: str, details: Sequence[str]) -> None:
        super().__init__("\n  ".join([message, *details]))
        self.details = list(details)


def embed_shard(
    context: ReleaseContext,
    shard: int,
    *,
    recompute: bool = False,
    upstream: Path | None = None,
    report: Callable[[ShardSummary], None] = lambda _: None,
) -> ShardSummary:
    """Embed one shard of the current plan, read it back, and mend what is wrong with it.

    A cell that cannot be embedded (impossible counts, values out of every range) is set aside, and the rest of its
    megabatch is committed. A megabatch that fails as a whole (memory) is tried again, then left, and the shard goes on.
    What concerns the environment (Census or store unreachable, GPU lost) raises at once, as does whatever interrupts
    the process; what is committed stays. Run again, it does what is missing and reads everything back: megabatches
    that are damaged are computed again.

    Parameters
    ----------
    context
        The opened set and release.
    shard
        Which shard.
    recompute
        Compute and write all of it again, whatever is there.
    upstream
        Upstream's ``transcriptformer``, which judges a few cells; None: it is not here.
    report
        Called after each committed megabatch.

    Raises
    ------
    UserError
        Before the model is loaded, when something is missing or does not fit.
    SetAsideError
        At the end, when megabatches failed; at once, when more cells were set aside than can be an accident.
    VerificationError
        When what was read back is not what was planned, and could not be mended.
    """
    plan = read_plan(context.store, context.folder.plan)
    batches = to_compute(plan.shard(shard))
    array = EmbeddingsArray.repair(context.folder.array, context.store, context.identity)
    notes = read_notes(context.store, context.folder, plan, [shard])
    todo = list(batches) if recompute else missing_megabatches(array, plan, batches, notes)
    cells = sum(batch.cells for batch in batches)
    summary = ShardSummary(plan.totals.plan, cells, cells - sum(batch.cells for batch in todo), len(batches))
    verified_before = is_verified(array, plan, context.folder, shard)
    write = _Writing(context, plan, array, shard, summary, report, recompute=recompute)
    if todo:
        write(todo)
        array.gather_metadata()
    started = time.monotonic()
    # The devices are free now, and reading back does not need them.
    anew = bool(todo) or not verified_before
    with checking_upstream(context, plan, array, shard, upstream, anew=anew) as compare:
        found = require_shard(array, plan, context.folder, shard)
        summary.comparison = compare()
    if found is not None and found.problems:
        summary.megabatches_mended = mend_shard(array, plan, context.folder, shard, found, batches, write)
        with checking_upstream(context, plan, array, shard, upstream, anew=True) as compare:
            summary.comparison = compare()
    summary.verified = found is not None
    summary.set_aside = set_aside_of(array, plan, context.folder, shard)
    summary.verification_seconds = time.monotonic() - started
    return summary


class _Writing:
    """Computes megabatches of a shard and commits them, each noted before."""

    def __init__(
        self,
        context: ReleaseContext,
        plan: Plan,
        array: EmbeddingsArray,
        shard: int,
        summary: ShardSummary,
        report: Callable[[ShardSummary], None],
        *,
        recompute: bool,
    ) -> None:
        self._context, self._plan, self._array = context, plan, array
        # Values that were there before a recomputation still stand: without the flag nothing is missing.
        self._recompute = recompute
        self._summary, self._report = summary, report
        self._notes = NoteBook(context.store, context.folder, plan, shard)
        # An accident of a few cells, or 1 %; with more, the fault is hardly in the cells.
        self._most_set_aside = max(MOST_SET_ASIDE, summary.cells // 100)

    def __call__(self, todo: Sequence[Megabatch]) -> None:
        summary = self._summary
        ids = self._plan.read_ids(self._context.store, todo)
        failed: list[Outcome] = []
        with self._array.writing() as write, outcomes(self._context, todo, ids, summary.times) as leaving:
            began = time.monotonic() - summary.seconds
            for outcome in leaving:
                if outcome.failure:
                    failed.append(outcome)
                    if len(failed) == MOST_FAILED:
                        raise self._failure(failed, len(todo) - summary.megabatches_computed - len(failed))
                    continue
                started = time.monotonic()
                values = outcome.embeddings
                if self._context.settings.storage_precision == "bfloat16":
                    values = round_to_bfloat16(values)
                self._require_few_set_aside(outcome.set_aside)
                self._notes.note(Written.of(outcome.batch, outcome.joinids, values, outcome.set_aside, outcome.widened))
                if len(outcome.joinids):
                    write(outcome.joinids, values)
                summary.times.stages["write"].busy += time.monotonic() - started
                summary.seconds = time.monotonic() - began
                summary.megabatches_computed += 1
                summary.cells_computed += len(outcome.joinids)
                summary.cells_widened += len(outcome.widened)
                summary.cells_fractional += outcome.fractional
                summary.tokens_computed += outcome.tokens
                self._report(summary)
        if failed:
            raise self._failure(failed, untried=0)

    def _failure(self, failed: list[Outcome], untried: int) -> SetAsideError:
        more = f", and {untried} were not tried any more" if untried else "; all others are committed"
        return SetAsideError(
            f"{len(failed)} megabatches failed on {TRIES} tries each{more}. When the cause is gone, run the shard "
            f"again{' with `recompute: true`' if self._recompute else ': it tries just these'}.",
            [
                f"megabatch {batch.index} (joinids {batch.first} to {batch.last}, {batch.cells} cells): {failure}"
                for batch, failure in sorted(((one.batch, one.failure) for one in failed), key=lambda one: one[0].index)
            ],
        )

    def _require_few_set_aside(self, more: Mapping[int, str]) -> None:
        reasons = {joinid: why for one in self._notes.noted for joinid, why in one.set_aside.items()} | dict(more)
        if len(reasons) > self._most_set_aside:
            raise SetAsideError(
                f"{len(reasons)} cells of this shard cannot be embedded; at most {self._most_set_aside} of its "
                f"{self._summary.cells} are expected. When the cause is gone, run the shard again with `recompute: "
                "true`. The first:",
                [f"joinid {joinid}: {why}" for joinid, why in list(reasons.items())[:NAMED]],
            )
