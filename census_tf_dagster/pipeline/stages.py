"""Runs the stages of a shard concurrently: read, tokenize, compute. The caller consumes and commits the results.

Each stage is a thread between bounded queues (a device has two: one sends, one receives). So the slowest stage sets the
pace and the others wait for it. The first failure stops all stages. The module counts the time that each stage works
and waits, so that a user sees which stage is the bottleneck.

Committing megabatches belongs in `embed_shard`.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.census.plan import Megabatch
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import Checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.devices import Device, Embedded, open_devices
from census_tf_dagster.inference.packing import PackedCells
from census_tf_dagster.inference.tokens import Tokenizer
from census_tf_dagster.pipeline.context import EmbeddingContext

TRIES = 2
POLL_SECONDS = 0.1
JOIN_SECONDS = 120.0
"""How long the read of a megabatch may take to end after the shard stopped."""

Ids = npt.NDArray[np.int64]
NO_IDS: Ids = np.empty(0, np.int64)


@dataclass
class StageTime:
    """Seconds that a stage worked, and seconds that it waited for others."""

    busy: float = 0.0
    waiting: float = 0.0


@dataclass
class Times:
    """Measurements of a running pipeline.

    Attributes
    ----------
    load
        Seconds until all devices had loaded the model.
    stages
        Times by stage: read, tokens, packing and compute (means over the devices), write.
    devices
        The first message of each device's process, which describes it.
    counters
        Counters of each device (`engine.Counters` and others), by its number.
    """

    load: float = 0.0
    stages: dict[str, StageTime] = field(
        default_factory=lambda: {name: StageTime() for name in ("read", "tokens", "packing", "compute", "write")}
    )
    devices: list[dict[str, Any]] = field(default_factory=list)
    counters: dict[int, dict[str, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, device: int, counters: dict[str, float]) -> None:
        """Store the latest counters of a device."""
        # Several devices may answer at once.
        with self._lock:
            self.counters[device] = counters
            self._sum_up()

    def _sum_up(self) -> None:
        elapsed = sum(counters["elapsed"] for counters in self.counters.values()) / len(self.counters)
        for name, counter in (("packing", "packing"), ("compute", "busy")):
            busy = sum(counters[counter] for counters in self.counters.values()) / len(self.counters)
            self.stages[name] = StageTime(busy, max(elapsed - busy, 0.0))

    def fill(self) -> float:
        """Return the share of the computed row tokens that were not padding."""
        room = sum(counters["row_tokens"] for counters in self.counters.values())
        return sum(counters["tokens"] for counters in self.counters.values()) / room if room else 0.0

    def limit(self) -> str:
        """Return the name of the stage that was busy longest, which limits the others."""
        return max(self.stages, key=lambda name: self.stages[name].busy)


@dataclass(frozen=True)
class Outcome:
    """The result of a megabatch.

    Attributes
    ----------
    batch
        The megabatch.
    joinids, embeddings
        Its cells with an embedding, int64 ``(n,)`` and float32 ``(n, embed_dim)``; all values are finite.
    set_aside
        The reason for each of its other cells, by joinid.
    widened
        Joinids of the cells that were computed in a wider precision.
    fractional
        Number of its cells that have counts that are not whole numbers.
    tokens
        Number of tokens that went through the model.
    failure
        The reason if the megabatch as a whole could not be embedded. Then the other fields are empty.
    """

    batch: Megabatch
    joinids: Ids
    embeddings: npt.NDArray[np.float32]
    set_aside: dict[int, str] = field(default_factory=dict)
    widened: tuple[int, ...] = ()
    fractional: int = 0
    tokens: int = 0
    failure: str = ""


class _Stopped(Exception):  # noqa: N818
    """Another stage has failed, or the caller no longer needs results."""


class _Line:
    """Threads that stop together."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.failure: BaseException | None = None
        self.threads: list[threading.Thread] = []

    def start(self, target: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                target(*arguments)
            except _Stopped:
                pass
            except BaseException as error:
                if not self.stopped.is_set():
                    self.failure = error
                    self.stopped.set()

        thread = threading.Thread(target=run, name=target.__name__)
        self.threads.append(thread)
        thread.start()

    def stop(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(JOIN_SECONDS)

    def wait(self, attempt: Callable[[], Any], time_of: StageTime | None = None) -> Any:
        """Repeat `attempt` until it does not raise Full or Empty; add the time to `time_of`."""
        began = time.monotonic()
        while True:
            if self.stopped.is_set():
                if self.failure is not None and threading.current_thread() not in self.threads:
                    raise self.failure
                raise _Stopped
            try:
                found = attempt()
            except (queue.Full, queue.Empty):
                continue
            if time_of is not None:
                time_of.waiting += time.monotonic() - began
            return found


@dataclass(frozen=True)
class Embedding:
    """What turns counts into embeddings.

    Attributes
    ----------
    checkpoint, tokenizer
        The model, and the tokenizer for the gene axis of the counts.
    precision, device, batch_size
        As in `SetSettings`: compute_precision, device, batch_size.
    cache
        Local folder for the prepared checkpoint.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    precision: str
    device: str
    batch_size: int | None
    cache: Path


@contextmanager
def outcomes(
    context: EmbeddingContext, todo: Sequence[Megabatch], ids: Sequence[Ids], times: Times, processes: int | None = None
) -> Iterator[Iterator[Outcome]]:
    """Run all stages for megabatches of a plan, as `run_stages` does; `ids` are the joinids of each."""
    settings = context.settings
    embedding = Embedding(
        context.checkpoint,
        Tokenizer.over(context.gene_ids, context.known_genes, context.checkpoint),
        settings.compute_precision,
        settings.device,
        settings.batch_size,
        context.cache,
    )
    with run_stages(embedding, todo, lambda key: context.read_cells(ids[key]), times, processes) as results:
        yield results


@contextmanager
def run_stages(
    embedding: Embedding,
    todo: Sequence[Megabatch],
    read_megabatch: Callable[[int], Cells],
    times: Times,
    processes: int | None = None,
) -> Iterator[Iterator[Outcome]]:
    """Run all stages for these megabatches; yield an iterator of results, in any order, one per megabatch.

    The iterator treats a result as committed when the caller asks for the next one.

    Parameters
    ----------
    embedding
        What turns counts into embeddings.
    todo, read_megabatch
        The megabatches, and the function that reads the cells of the one at a position of `todo`. A `UserError` that
        it raises concerns these cells only; they are tried again. Any other error stops all stages.
    times
        Measurements; filled while the stages run.
    processes
        Number of device processes; None: one per device.

    Raises
    ------
    UserError
        When there is no such device.
    DeviceLostError, Exception
        At once, when a stage fails for a reason that is not in the cells.
    """
    line = _Line()
    read: queue.Queue[tuple[int, Cells]] = queue.Queue(maxsize=1)
    tokenized: queue.Queue[tuple[int, PackedCells]] = queue.Queue(maxsize=1)
    results: queue.Queue[tuple[Outcome, Device | None]] = queue.Queue(maxsize=1)
    nothing = np.empty((0, embedding.checkpoint.shape.embed_dim), np.float32)

    def put(target: "queue.Queue[Any]", item: object, time_of: StageTime | None = None) -> None:
        line.wait(lambda: target.put(item, timeout=POLL_SECONDS), time_of)

    sent: dict[int, _Sent] = {}

    def fail(key: int, error: Exception | str) -> None:
        put(results, (Outcome(todo[key], NO_IDS, nothing, failure=str(error)), None))

    def read_all() -> None:
        for key in range(len(todo)):
            for attempt in range(1, TRIES + 1):
                began = time.monotonic()
                try:
                    cells = read_megabatch(key)
                except UserError as error:
                    if attempt == TRIES:
                        fail(key, error)
                    continue
                finally:
                    times.stages["read"].busy += time.monotonic() - began
                if len(cells.joinids):
                    put(read, (key, cells), times.stages["read"])
                else:
                    put(results, (Outcome(todo[key], NO_IDS, nothing, set_aside=cells.set_aside), None))
                break

    def tokenize_all() -> None:
        while True:
            key, cells = line.wait(lambda: read.get(timeout=POLL_SECONDS), times.stages["tokens"])
            began = time.monotonic()
            try:
                packed = embedding.tokenizer(cells)
            except Exception as error:
                fail(key, f"{type(error).__name__}: {error}")
                continue
            times.stages["tokens"].busy += time.monotonic() - began
            # From here on, counts are not needed.
            sent[key] = _Sent(cells.joinids, cells.set_aside, cells.fractional)
            put(tokenized, (key, packed), times.stages["tokens"])

    def feed(device: Device) -> None:
        while True:
            line.wait(lambda: _acquire(device.slots))
            device.send(*line.wait(lambda: tokenized.get(timeout=POLL_SECONDS)))

    def collect(number: int, device: Device) -> None:
        while True:
            answer = device.receive()
            times.count(number, answer.counters)
            put(results, (_outcome(todo[answer.key], sent.pop(answer.key), answer, nothing), device))

    def iter_results() -> Iterator[Outcome]:
        for _ in todo:
            outcome, device = line.wait(lambda: results.get(timeout=POLL_SECONDS), times.stages["write"])
            yield outcome
            # A caller that asks for the next result has committed this one.
            if device is not None:
                device.commit()

    with ExitStack() as stack:
        # Threads are joined last, because threads that talk to a device end only after its process.
        stack.callback(line.stop)
        line.start(read_all)
        line.start(tokenize_all)
        began = time.monotonic()
        prepared = prepare(embedding.checkpoint, embedding.precision, embedding.cache)
        known = embedding.tokenizer.known_genes
        devices = stack.enter_context(open_devices(prepared, known, embedding.device, embedding.batch_size, processes))
        stack.callback(line.stopped.set)
        times.load = time.monotonic() - began
        times.devices = [device.about for device in devices]
        for number, device in enumerate(devices):
            line.start(feed, device)
            line.start(collect, number, device)
        yield iter_results()


@dataclass(frozen=True)
class _Sent:
    """Facts about a megabatch that are kept while a device works on it."""

    joinids: Ids
    set_aside: dict[int, str]
    fractional: int


def _outcome(batch: Megabatch, sent: _Sent, answer: Embedded, nothing: npt.NDArray[np.float32]) -> Outcome:
    if answer.embeddings is None:
        return Outcome(batch, NO_IDS, nothing, failure=answer.failure)
    kept = np.ones(len(sent.joinids), np.bool_)
    kept[list(answer.set_aside)] = False
    whole = kept.all()
    return Outcome(
        batch=batch,
        joinids=sent.joinids if whole else sent.joinids[kept],
        embeddings=answer.embeddings if whole else answer.embeddings[kept],
        set_aside={**sent.set_aside, **{int(sent.joinids[at]): why for at, why in answer.set_aside.items()}},
        widened=tuple(int(sent.joinids[at]) for at in answer.widened),
        fractional=sent.fractional,
        tokens=answer.tokens,
    )


def _acquire(slots: threading.Semaphore) -> None:
    if not slots.acquire(timeout=POLL_SECONDS):
        raise queue.Full
