"""Step 2: embed one shard. Does what is missing, commits each megabatch, reads everything back."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.census.plan import Megabatch, read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.tokens import Tokenizer
from census_tf_dagster.steps.job import Job
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.progress import missing_megabatches
from census_tf_dagster.store.proof import is_proved, prove_shard

TRIES = 2
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
        Cells of the shard, those that this run computed, and those that were there before it.
    tokens_computed
        Tokens that went through the model.
    seconds
        Time spent per stage: load, read, tokens, model, write, proof.
    """

    plan: str
    cells: int
    cells_before: int
    megabatches: int
    megabatches_computed: int = 0
    cells_computed: int = 0
    tokens_computed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def cells_per_second(self) -> float:
        """Return the rate of this run, loading excluded; 0 before anything was computed."""
        spent = sum(seconds for stage, seconds in self.seconds.items() if stage not in ("load", "proof"))
        return self.cells_computed / spent if spent else 0.0

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


class PoisonError(Exception):
    """These cells cannot be embedded; others may. Carries the reason."""


class _Stopwatch:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


def embed_shard(
    job: Job, shard: int, *, recompute: bool = False, report: Callable[[ShardSummary], None] = lambda _: None
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
    batches = plan.shard(shard)
    array = EmbeddingsArray.open(job.folder.array, job.store, job.identity)
    todo = list(batches) if recompute else missing_megabatches(array, plan, batches)
    cells = sum(batch.cells for batch in batches)
    summary = ShardSummary(plan.totals.plan, cells, cells - sum(batch.cells for batch in todo), len(batches))
    watch = _Stopwatch(summary.seconds)
    failed: list[SetAside] = []
    if todo:
        embedder = _Embedder.load(job, watch)
        all_ids = plan.read_ids(job.store, todo)
        watch.lap("load")
        for number, (batch, joinids) in enumerate(zip(todo, all_ids, strict=True)):
            try:
                embeddings, tokens = embedder.embed(joinids)
            except PoisonError as error:
                failed.append(SetAside(batch, str(error)))
                if len(failed) == MOST_SET_ASIDE:
                    raise SetAsideError(failed, untried=len(todo) - number - 1, recompute=recompute) from error
                continue
            array.write(joinids, embeddings)
            watch.lap("write")
            summary.megabatches_computed += 1
            summary.cells_computed += len(joinids)
            summary.tokens_computed += tokens
            report(summary)
    if failed:
        raise SetAsideError(failed, untried=0, recompute=recompute)
    if summary.megabatches_computed or not is_proved(array, plan, job.folder, shard):
        prove_shard(array, plan, job.folder, shard)
    watch.lap("proof")
    return summary


@dataclass(frozen=True)
class _Embedder:
    """From joinids to what is stored."""

    job: Job
    tokenizer: Tokenizer
    engine: Engine
    watch: _Stopwatch

    @classmethod
    def load(cls, job: Job, watch: _Stopwatch) -> "_Embedder":
        tokenizer = Tokenizer.build(job.genes.ids, job.checkpoint)
        settings = job.settings
        engine = Engine.load(
            job.checkpoint,
            tokenizer,
            precision=settings.compute_precision,
            device=settings.device,
            batch_size=settings.batch_size,
        )
        return cls(job, tokenizer, engine, watch)

    def embed(self, joinids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], int]:
        """Return embeddings as stored, and the number of tokens; `PoisonError` after `TRIES`."""
        for attempt in range(1, TRIES + 1):
            try:
                return self._try(joinids)
            except PoisonError:
                if attempt == TRIES:
                    raise
        raise AssertionError

    def _try(self, joinids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], int]:
        try:
            # Anything but a UserError here comes from the storage, not from these cells.
            cells = read_cells(self.job.release, joinids, self.job.checkpoint.aux_column)
        except UserError as error:
            raise PoisonError(str(error)) from error
        self.watch.lap("read")
        try:
            packed = self.tokenizer(cells)
            self.watch.lap("tokens")
            embeddings = self.engine.embed(packed)
            self.watch.lap("model")
        except torch.AcceleratorError:
            raise
        except Exception as error:
            raise PoisonError(f"{type(error).__name__}: {error}") from error
        if self.job.settings.storage_precision == "bfloat16":
            embeddings = round_to_bfloat16(embeddings)
        return embeddings, len(packed.tokens)
