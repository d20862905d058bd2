"""Runs a canary: embeds a few hundred cells as the set would, compares and times them, before money is spent.

Storing and reading the measured rate belongs in `cost_estimate`.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.release import NNZ
from census_tf_dagster.config.cost import Throughput
from census_tf_dagster.durations import duration
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.devices import Device, open_devices, require_gpu
from census_tf_dagster.inference.tokens import Tokenizer
from census_tf_dagster.pipeline.context import EmbeddingContext, ReleaseContext
from census_tf_dagster.pipeline.cost_estimate import write_canary
from census_tf_dagster.pipeline.plan_release import draft_plan
from census_tf_dagster.pipeline.upstream import require_upstream, upstream_running

CANDIDATES = 20_000
SEED = 0
PATIENCE_SECONDS, TIMES_OURS = 1800.0, 100.0
"""How long upstream may take: seconds to load the largest vocabulary and model, plus this multiple of our own time for
the cells. Upstream was 11 times slower where both were measured (benchmarks/results/engine-cpu.txt)."""


@dataclass(frozen=True)
class CanaryResult:
    """The result of a canary.

    Attributes
    ----------
    cells, assays
        Number of embedded cells, and of their assays.
    reference
        The source of the values for comparison.
    relative_rms
        ||ours - reference|| / ||reference|| over all values.
    worst_cell
        The largest such ratio of a single cell.
    centred_cosine
        Mean cosine after subtracting the reference's mean cell. Cells share a large mean, which would hide differences.
    cells_per_second, tokens_per_second
        Rate of reading, tokenizing and the model together, on this machine, without warming up.
    release_cells, release_hours
        Cells of the release or file, and the hours that one machine like this needs for its tokens; reused cells need
        none.
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


@dataclass(frozen=True)
class Sample:
    """The cells of a canary.

    Attributes
    ----------
    joinids
        Ascending joinids of the cells, int64 ``(n,)``.
    of_cells, of_tokens
        Number of all cells that are planned, and number of the tokens that have to be computed for them.
    """

    joinids: npt.NDArray[np.int64]
    of_cells: int
    of_tokens: int


def run_canary(
    context: EmbeddingContext,
    choose: Callable[[], Sample],
    upstream: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> CanaryResult:
    """Embed a few cells, and compare them with a reference; store only the measured rate.

    Parameters
    ----------
    context
        The opened set, with a release or file.
    choose
        Chooses the cells. It may read for minutes, so it is called after the other checks.
    upstream
        Upstream's ``transcriptformer`` command; None: the reference is this project's model in fp32.
    report
        Called with a message before each long step.

    Raises
    ------
    UserError
        When `choose` raises it, or the reference cannot run.
    """
    precision = context.settings.compute_precision
    # These checks come before minutes of reading.
    if context.settings.device == "cuda":
        require_gpu(context.settings.name, context.release_name)
    if upstream is not None:
        try:
            require_upstream(upstream)
        except UserError as error:
            raise UserError(f"--upstream {error}") from error
    if upstream is None and precision == "fp32":
        raise UserError(
            "this set computes in fp32 and --upstream is missing; expected it, because an fp32 set has no other "
            "reference than upstream's own command: pass its path with --upstream."
        )
    sample = choose()
    joinids = sample.joinids
    tokenizer = Tokenizer.over(context.gene_ids, context.known_genes, context.checkpoint)
    report(f"embedding {len(joinids)} cells in {precision}; the first run on a machine also prepares the checkpoint")
    # These cells warm the device up: compilation and first accesses are no part of the rate.
    warm = tokenizer(context.read_cells(joinids[:8]))
    with _devices(context, tokenizer, precision) as (device, *_):
        device.embed(warm)
        started = time.monotonic()
        read = context.read_cells(joinids)
        packed = tokenizer(read)
        ours = device.embed(packed)
        seconds = time.monotonic() - started
        speed = Throughput(tokens=len(packed.tokens), seconds=seconds, devices=1, device=str(device.about["name"]))
    patience = PATIENCE_SECONDS + TIMES_OURS * seconds
    limit = f"; it may take up to {duration(patience)}" if upstream is not None else ""
    report(f"embedding the same cells by {upstream or 'this project in fp32'} to compare{limit}")
    if upstream is not None:
        source = "upstream's own command in float32"
        with upstream_running(context, read, upstream) as answer:
            reference = answer(patience)
    else:
        source = "this project's model in fp32 (pass upstream's command with --upstream for an independent reference)"
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
        release_cells=sample.of_cells,
        release_hours=sample.of_tokens / (len(packed.tokens) / seconds) / 3600,
    )


def _devices(context: EmbeddingContext, tokenizer: Tokenizer, precision: str) -> AbstractContextManager[list[Device]]:
    prepared = prepare(context.checkpoint, precision, context.cache)
    return open_devices(
        prepared, tokenizer.known_genes, context.settings.device, context.settings.batch_size, processes=1
    )


def release_sample(context: ReleaseContext, cells: int, report: Callable[[str], None] = lambda _: None) -> Sample:
    """Choose about as many cells of a release, of all assays and lengths.

    Raises
    ------
    UserError
        When planning would raise it.
    """
    report(f"reading obs of {context.release.uri}; this takes minutes for a whole Census")
    draft = draft_plan(context)
    return Sample(_spread(context, draft.joinids, cells), len(draft.joinids), draft.summary.tokens_to_compute)


def _spread(context: ReleaseContext, planned: npt.NDArray[np.int64], cells: int) -> npt.NDArray[np.int64]:
    """Choose cells evenly over assays, and over lengths within an assay; the choice is always the same."""
    rng = np.random.default_rng(SEED)
    candidates = np.sort(rng.choice(planned, min(CANDIDATES, len(planned)), replace=False))
    column = context.checkpoint.aux_column
    # If the release does not state how many genes cells express, the order of joinids decides.
    length = NNZ if context.release.has_nnz else "soma_joinid"
    names = sorted({"soma_joinid", length, column})
    frame = context.release.obs.read(coords=(pa.array(candidates),), column_names=names).concat().to_pandas()
    groups = [group.sort_values(length).soma_joinid.to_numpy() for _, group in frame.groupby(column, observed=True)]
    share = -(-cells // len(groups))
    chosen = [group[np.unique(np.linspace(0, len(group) - 1, share).astype(int))] for group in groups]
    return np.sort(np.concatenate(chosen))
