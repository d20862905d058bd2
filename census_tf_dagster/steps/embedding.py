"""Step 2: embed one shard. Does what is missing, commits each megabatch, reads everything back."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from census_tf_dagster.census.plan import Megabatch, read_plan, to_compute
from census_tf_dagster.quality.judgement import Judgement
from census_tf_dagster.steps.job import Job
from census_tf_dagster.steps.judging import judging
from census_tf_dagster.steps.pipeline import TRIES, Times, outcomes
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.progress import missing_megabatches
from census_tf_dagster.store.proof import is_proved, require_shard

MOST_SET_ASIDE = 8
"""With more, the fault is hardly in the cells: stop spending."""


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
    proof_seconds
        Time of reading back, and of waiting for upstream's own code beside it.
    proved
        Whether the shard was read back; while cells that it reuses are not copied, it is left to whoever copies them.
    judgement
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
    proof_seconds: float = 0.0
    proved: bool = False
    judgement: Judgement | None = None

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


@dataclass(frozen=True)
class SetAside:
    """A megabatch that failed on every try, and why."""

    batch: Megabatch
    reason: str

    def __str__(self) -> str:
        return (
            f"megabatch {self.batch.index} (joinids {self.batch.first} to {self.batch.last}, "
            f"{self.batch.cells} cells): {self.reason}"
        )


class SetAsideError(Exception):
    """Some megabatches failed on every try; all others of the shard are committed."""

    def __init__(self, failed: list[SetAside], untried: int, *, recompute: bool) -> None:
        more = f", and {untried} were not tried any more" if untried else ", all others are committed"
        # Values that were there before a recomputation still stand: without the flag nothing is missing.
        again = "again with `recompute: true`" if recompute else "again: it tries just these"
        super().__init__(
            f"{len(failed)} megabatches were set aside after {TRIES} tries each{more}. When the cause is gone, run "
            f"the shard {again}.\n" + "\n".join(f"  {one}" for one in failed)
        )
        self.failed = failed


def embed_shard(
    job: Job,
    shard: int,
    *,
    recompute: bool = False,
    upstream: Path | None = None,
    report: Callable[[ShardSummary], None] = lambda _: None,
) -> ShardSummary:
    """Embed one shard of the current plan.

    A megabatch that cannot be computed (bad counts, values out of range, memory) is tried again, then set
    aside, and the shard goes on. What concerns the environment (Census or store unreachable, GPU lost) raises at
    once, as does whatever interrupts the process; what is committed stays.

    Parameters
    ----------
    job
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
        At the end, when megabatches were set aside.
    ProofError
        When what was read back is not what was planned.
    """
    plan = read_plan(job.store, job.folder.plan)
    batches = to_compute(plan.shard(shard))
    array = EmbeddingsArray.open(job.folder.array, job.store, job.identity)
    todo = list(batches) if recompute else missing_megabatches(array, plan, batches)
    cells = sum(batch.cells for batch in batches)
    summary = ShardSummary(plan.totals.plan, cells, cells - sum(batch.cells for batch in todo), len(batches))
    failed: list[SetAside] = []
    if todo:
        ids = plan.read_ids(job.store, todo)
        with array.writing() as write, outcomes(job, todo, ids, summary.times) as leaving:
            began = time.monotonic()
            for outcome in leaving:
                if outcome.embeddings is None:
                    failed.append(SetAside(outcome.batch, outcome.poison))
                    if len(failed) == MOST_SET_ASIDE:
                        untried = len(todo) - summary.megabatches_computed - len(failed)
                        raise SetAsideError(failed, untried, recompute=recompute)
                    continue
                started = time.monotonic()
                values = outcome.embeddings
                if job.settings.storage_precision == "bfloat16":
                    values = round_to_bfloat16(values)
                write(outcome.joinids, values)
                summary.times.stages["write"].busy += time.monotonic() - started
                summary.seconds = time.monotonic() - began
                summary.megabatches_computed += 1
                summary.cells_computed += len(outcome.joinids)
                summary.tokens_computed += outcome.tokens
                report(summary)
    if failed:
        raise SetAsideError(sorted(failed, key=lambda one: one.batch.index), untried=0, recompute=recompute)
    started = time.monotonic()
    if summary.megabatches_computed:
        array.gather_metadata()
    anew = bool(summary.megabatches_computed) or not is_proved(array, plan, job.folder, shard)
    # The devices are free now, and reading back does not need them.
    with judging(job, plan, array, shard, upstream, anew=anew) as judge:
        summary.proved = not anew or require_shard(array, plan, job.folder, shard, changed=True)
        summary.judgement = judge()
    summary.proof_seconds = time.monotonic() - started
    return summary
