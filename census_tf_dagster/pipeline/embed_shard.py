"""Embeds one shard: computes the missing megabatches, commits each one, and reads the shard back.

The threads that read, tokenize and compute belong in `stages`; copying reused cells belongs in `copy_shard`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from census_tf_dagster.census.plan import Megabatch, Plan, read_plan, to_compute
from census_tf_dagster.pipeline.check_upstream import checking_upstream
from census_tf_dagster.pipeline.context import EmbeddingContext
from census_tf_dagster.pipeline.stages import TRIES, Outcome, Times, outcomes
from census_tf_dagster.quality.upstream_comparison import UpstreamComparison
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.mending import mend_shard
from census_tf_dagster.store.verification import is_verified, require_shard, set_aside_of
from census_tf_dagster.store.write_notes import NoteWriter, Written, read_notes

MOST_FAILED = 8
"""Failed megabatches at which a shard stops. With so many, the cause is probably not in the cells."""
MOST_SET_ASIDE = 100
"""Most cells set aside in a shard of up to 10,000 cells."""
NAMED = 10
"""Most cells that an error names."""


@dataclass
class ShardSummary:
    """The progress of a run that embeds a shard.

    Attributes
    ----------
    plan
        Hash of the plan.
    cells, cells_computed, cells_before
        Cells of the shard that the model computes (`copy_shard` copies the others), cells that this run computed, and
        cells that were committed before it.
    tokens_computed
        Tokens that went through the model.
    seconds
        Time from when all devices had loaded the model to the last commit.
    times
        Times of each stage.
    verification_seconds
        Time of reading back, and of waiting for upstream's own code.
    verified
        Whether the shard was read back. While its reused cells are not copied, it is not; `copy_shard` then does it.
    set_aside
        The reason for each cell of the shard without an embedding, by joinid; known when the shard is verified.
    cells_widened, cells_fractional
        Cells that this run computed in a wider precision, and cells with counts that are not whole numbers.
    megabatches_mended
        Megabatches that were damaged when they were read back, and were computed again.
    comparison
        Comparison of a few cells with upstream's own code; None for a shard that computes no cells.
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
        """Return the rate of this run without loading the model; 0 before the first commit."""
        return self.cells_computed / self.seconds if self.seconds else 0.0

    def tokens_per_second(self) -> float:
        """Return the rate in tokens, which compares shards of long and of short cells."""
        return self.tokens_computed / self.seconds if self.seconds else 0.0

    def seconds_left(self) -> float:
        """Return how long the remaining cells will take at this rate; 0 before the first commit."""
        rate = self.cells_per_second()
        return (self.cells - self.cells_before - self.cells_computed) / rate if rate else 0.0


class SetAsideError(Exception):
    """Some megabatches failed, or too many cells of a shard were set aside. Committed megabatches stay.

    Attributes
    ----------
    details
        A message for each failure, with its reason.
    """

    def __init__(self, message: str, details: Sequence[str]) -> None:
        super().__init__("\n  ".join([message, *details]))
        self.details = list(details)


def embed_shard(
    context: EmbeddingContext,
    shard: int,
    *,
    recompute: bool = False,
    upstream: Path | None = None,
    report: Callable[[ShardSummary], None] = lambda _: None,
) -> ShardSummary:
    """Embed one shard of the current plan, read it back, and compute damaged megabatches again.

    A cell that cannot be embedded (impossible counts, values out of every range) is set aside, and the rest of its
    megabatch is committed. A megabatch that fails as a whole (memory) is tried again, then skipped, and the shard goes
    on. An error of the environment (Census or store unreachable, GPU lost) or an interruption of the process is raised
    at once. Committed megabatches stay. A later run computes what is missing, reads everything back, and computes
    damaged megabatches again.

    Parameters
    ----------
    context
        The opened set, with a release or file.
    shard
        Number of the shard.
    recompute
        Compute and write all megabatches again, even those that are committed.
    upstream
        Upstream's ``transcriptformer``, with which a few cells are compared; None: it is not installed.
    report
        Called after each committed megabatch.

    Raises
    ------
    UserError
        Before the model is loaded, when something is missing or does not match.
    SetAsideError
        At the end, when megabatches failed; at once, when too many cells were set aside.
    VerificationError
        When the values that were read back are not those of the plan, and could not be mended.
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
    # Upstream can use the devices now, because reading back does not need them.
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
    """Computes megabatches of a shard and commits them; writes a note about each one before."""

    def __init__(
        self,
        context: EmbeddingContext,
        plan: Plan,
        array: EmbeddingsArray,
        shard: int,
        summary: ShardSummary,
        report: Callable[[ShardSummary], None],
        *,
        recompute: bool,
    ) -> None:
        self._context, self._plan, self._array = context, plan, array
        # After a failed recomputation the earlier values exist, so a run without the flag would find nothing missing.
        self._recompute = recompute
        self._summary, self._report = summary, report
        self._notes = NoteWriter(context.store, context.folder, plan, shard)
        # A few cells, or 1 %, may be bad. With more, the cause is probably not in the cells.
        self._most_set_aside = max(MOST_SET_ASIDE, summary.cells // 100)

    def __call__(self, todo: Sequence[Megabatch]) -> None:
        summary = self._summary
        ids = self._plan.read_ids(self._context.store, todo)
        failed: list[Outcome] = []
        with self._array.writing() as write, outcomes(self._context, todo, ids, summary.times) as results:
            began = time.monotonic() - summary.seconds
            for outcome in results:
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
        more = f", and {untried} were not tried" if untried else ", and all others are committed"
        again = " with `recompute: true`" if self._recompute else ": it tries only these"
        return SetAsideError(
            f"{len(failed)} megabatches failed on {TRIES} tries each{more}. Expected all to succeed: remove the cause "
            f"below, then run the shard again{again}.",
            [
                f"megabatch {batch.index} (joinids {batch.first} to {batch.last}, {batch.cells} cells): {failure}"
                for batch, failure in sorted(
                    ((outcome.batch, outcome.failure) for outcome in failed), key=lambda pair: pair[0].index
                )
            ],
        )

    def _require_few_set_aside(self, more: Mapping[int, str]) -> None:
        reasons = {joinid: why for note in self._notes.noted for joinid, why in note.set_aside.items()} | dict(more)
        if len(reasons) > self._most_set_aside:
            raise SetAsideError(
                f"{len(reasons)} cells of this shard cannot be embedded; expected at most {self._most_set_aside} of "
                f"its {self._summary.cells}. Remove the cause, then run the shard again with `recompute: true`. The "
                "first cells:",
                [f"joinid {joinid}: {why}" for joinid, why in list(reasons.items())[:NAMED]],
            )
