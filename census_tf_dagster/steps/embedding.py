"""Step 2: embed one shard. Does what is missing, commits each megabatch, reads everything back."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.tokens import Tokenizer
from census_tf_dagster.steps.job import Job
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.progress import missing_megabatches
from census_tf_dagster.store.proof import prove_shard


@dataclass
class ShardSummary:
    """What one run of a shard did.

    Attributes
    ----------
    plan
        Hash of the plan it worked on.
    cells, cells_computed
        Cells of the shard, and those that this run computed.
    tokens_computed
        Tokens that went through the model.
    seconds
        Time spent per stage: load, read, tokens, model, write, proof.
    """

    plan: str
    cells: int
    megabatches: int
    megabatches_computed: int = 0
    cells_computed: int = 0
    tokens_computed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


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
    ProofError
        When what was read back is not what was planned.
    """
    plan = read_plan(job.store, job.folder.plan)
    batches = plan.shard(shard)
    array = EmbeddingsArray.open(job.folder.array, job.store, job.identity)
    todo = list(batches) if recompute else missing_megabatches(array, plan, batches)
    summary = ShardSummary(plan.totals.plan, sum(batch.cells for batch in batches), len(batches))
    watch = _Stopwatch(summary.seconds)
    if todo:
        settings = job.settings
        tokenizer = Tokenizer.build(job.genes.ids, job.checkpoint)
        engine = Engine.load(
            job.checkpoint,
            tokenizer,
            precision=settings.compute_precision,
            device=settings.device,
            batch_size=settings.batch_size,
        )
        ids = plan.read_ids(job.store, todo)
        watch.lap("load")
        for joinids in ids:
            cells = read_cells(job.release, joinids, job.checkpoint.aux_column)
            watch.lap("read")
            packed = tokenizer(cells)
            watch.lap("tokens")
            embeddings = engine.embed(packed)
            watch.lap("model")
            if settings.storage_precision == "bfloat16":
                embeddings = round_to_bfloat16(embeddings)
            array.write(joinids, embeddings)
            watch.lap("write")
            summary.megabatches_computed += 1
            summary.cells_computed += len(joinids)
            summary.tokens_computed += len(packed.tokens)
            report(summary)
    prove_shard(array, plan, job.folder, shard)
    watch.lap("proof")
    return summary
