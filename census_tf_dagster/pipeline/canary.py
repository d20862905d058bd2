"""A canary: a few hundred cells through the very path of a set, compared and timed, before money is spent."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.census.release import NNZ
from census_tf_dagster.config.cost import Throughput
from census_tf_dagster.durations import duration
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.devices import Device, open_devices, require_gpu
from census_tf_dagster.inference.tokens import Tokenizer
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.cost_estimate import write_canary
from census_tf_dagster.pipeline.plan_release import survey
from census_tf_dagster.pipeline.upstream import require_upstream, upstream_running

CANDIDATES = 20_000
SEED = 0
PATIENCE_SECONDS, TIMES_OURS = 1800.0, 100.0
"""How long upstream may take: to load the largest vocabulary and model, and as often our own time for the cells. It
was 11 times slower where both were measured (benchmarks/results/engine-cpu.txt)."""


@dataclass(frozen=True)
class CanaryResult:
    """What a canary found.

    Attributes
    ----------
    cells, assays
        How many cells were embedded, and of how many assays.
    reference
        What the values were compared with.
    relative_rms
        ||ours - reference|| / ||reference|| over all values.
    worst_cell
        The same per cell, its maximum.
    centred_cosine
        Mean cosine after subtracting the reference's mean cell: cells share a large mean, which flatters.
    cells_per_second, tokens_per_second
        Of reading, tokenizing and the model together, warm, on this machine.
    release_cells, release_hours
        Cells of the release, and how long one machine like this one would take, by tokens; reused cells take none.
    """

    cells: int
    assays: int
    reference: str
    relative_rms: float
    worst_cell: float
    centred_cosine: float
    cells_per_second: float
    tokens_per_second: float
    release_cells: int
    release_hours: float


def run_canary(
    context: ReleaseContext,
    cells: int = 256,
    upstream: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> CanaryResult:
    """Embed some cells, spread over assays and lengths, and compare; keep nothing of it but how fast it was.

    Parameters
    ----------
    context
        The opened set and release.
    cells
        How many.
    upstream
        Upstream's ``transcriptformer`` command; without it, ours in fp32 is the reference.
    report
        Called with what begins, before each long step.

    Raises
    ------
    UserError
        As planning does, or when the reference cannot run.
    """
    precision = context.settings.compute_precision
    # Before minutes of reading.
    if context.settings.device == "cuda":
        require_gpu(context.settings.name, context.release_name)
    if upstream is not None:
        try:
            require_upstream(upstream)
        except UserError as error:
            raise UserError(f"--upstream {error}") from error
    if upstream is None and precision == "fp32":
        raise UserError("an fp32 set has no other reference than upstream's own command: name it with --upstream.")
    report(f"reading obs of {context.release.uri}; minutes for a whole Census")
    found = survey(context)
    joinids = _spread(context, found.joinids, cells)
    tokenizer = Tokenizer.build(context.genes.ids, context.checkpoint, context.settings.gene_order)
    report(f"embedding {len(joinids)} cells in {precision}; the first time on a machine the checkpoint is prepared")
    # Warm: compilation and first touches are no part of the rate.
    warm = tokenizer(read_cells(context.release, joinids[:8], context.checkpoint.aux_column))
    with _devices(context, tokenizer, precision) as (device, *_):
        device.embed(warm)
        started = time.monotonic()
        read = read_cells(context.release, joinids, context.checkpoint.aux_column)
        packed = tokenizer(read)
        ours = device.embed(packed)
        seconds = time.monotonic() - started
        speed = Throughput(tokens=len(packed.tokens), seconds=seconds, devices=1, device=str(device.about["name"]))
    patience = PATIENCE_SECONDS + TIMES_OURS * seconds
    limit = f", for {duration(patience)} at most" if upstream is not None else ""
    report(f"embedding them again, by {upstream or 'this project in fp32'}, to compare{limit}")
    if upstream is not None:
        source = "upstream's own command in float32"
        with upstream_running(context, read, upstream) as answer:
            reference = answer(patience)
    else:
        source = "this project's model in fp32 (name upstream's command with --upstream for an independent reference)"
        with _devices(context, tokenizer, "fp32") as (device, *_):
            reference = device.embed(packed)
    write_canary(context, speed)
    norms = np.linalg.norm(reference, axis=1)
    centre = reference.mean(axis=0)
    a, b = ours - centre, reference - centre
    cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return CanaryResult(
        cells=len(joinids),
        assays=len(set(read.assays)),
        reference=source,
        relative_rms=float(np.linalg.norm(ours - reference) / np.linalg.norm(reference)),
        worst_cell=float((np.linalg.norm(ours - reference, axis=1) / norms).max()),
        centred_cosine=float(cosine.mean()),
        cells_per_second=len(joinids) / seconds,
        tokens_per_second=len(packed.tokens) / seconds,
        release_cells=len(found.joinids),
        release_hours=found.summary.tokens_to_compute / (len(packed.tokens) / seconds) / 3600,
    )


def _devices(context: ReleaseContext, tokenizer: Tokenizer, precision: str) -> AbstractContextManager[list[Device]]:
    prepared = prepare(context.checkpoint, precision, context.cache)
    return open_devices(
        prepared, tokenizer.known_genes, context.settings.device, context.settings.batch_size, processes=1
    )


def _spread(context: ReleaseContext, planned: npt.NDArray[np.int64], cells: int) -> npt.NDArray[np.int64]:
    """Choose cells evenly over assays, and over lengths within an assay; the same ones every time."""
    rng = np.random.default_rng(SEED)
    candidates = np.sort(rng.choice(planned, min(CANDIDATES, len(planned)), replace=False))
    column = context.checkpoint.aux_column
    # Where the release does not say how long cells are, their order decides.
    length = NNZ if context.release.has_nnz else "soma_joinid"
    names = sorted({"soma_joinid", length, column})
    frame = context.release.obs.read(coords=(pa.array(candidates),), column_names=names).concat().to_pandas()
    groups = [group.sort_values(length).soma_joinid.to_numpy() for _, group in frame.groupby(column, observed=True)]
    share = -(-cells // len(groups))
    chosen = [group[np.unique(np.linspace(0, len(group) - 1, share).astype(int))] for group in groups]
    return np.sort(np.concatenate(chosen))
