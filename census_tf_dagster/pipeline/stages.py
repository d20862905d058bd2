"""All stages of a shard at once: read, tokens, devices; what they give is written by whoever asks for it.

Each stage is a thread (a device: one that sends and one that receives) between bounded queues, so that the slowest
stage sets the pace and the others wait for it. The first failure stops all of them. The time each stage is busy
and the time it waits are counted: a user sees which one limits.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.cells import Cells, read_cells
from census_tf_dagster.census.plan import Megabatch
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.devices import Device, Embedded, open_devices
from census_tf_dagster.inference.packing import PackedCells
from census_tf_dagster.inference.tokens import Tokenizer
from census_tf_dagster.pipeline.context import ReleaseContext

TRIES = 2
POLL_SECONDS = 0.1
JOIN_SECONDS = 120.0
"""A read of a megabatch that was under way when the shard stopped may take this long to end."""

Ids = npt.NDArray[np.int64]
NO_IDS: Ids = np.empty(0, np.int64)


@dataclass
class StageTime:
    """Seconds that a stage worked, and that it waited for others."""

    busy: float = 0.0
    waiting: float = 0.0


@dataclass
class Times:
    """What is known of a running pipeline.

    Attributes
    ----------
    load
        Seconds until all devices had loaded the model.
    stages
        By name: read, tokens, packing and compute (means of the devices), write.
    devices
        What each device's process says of itself.
    counters
        What each has done, by device.
    """

    load: float = 0.0
    stages: dict[str, StageTime] = field(
        default_factory=lambda: {name: StageTime() for name in ("read", "tokens", "packing", "compute", "write")}
    )
    devices: list[dict[str, Any]] = field(default_factory=list)
    counters: dict[int, dict[str, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, device: int, counters: dict[str, float]) -> None:
        """Take over a device's counters."""
        # Several devices may answer at once.
        with self._lock:
            self.counters[device] = counters
            self._sum_up()

    def _sum_up(self) -> None:
        elapsed = sum(one["elapsed"] for one in self.counters.values()) / len(self.counters)
        for name, counter in (("packing", "packing"), ("compute", "busy")):
            busy = sum(one[counter] for one in self.counters.values()) / len(self.counters)
            self.stages[name] = StageTime(busy, max(elapsed - busy, 0.0))

    def fill(self) -> float:
        """Return the share of the rows that held tokens."""
        room = sum(one["row_tokens"] for one in self.counters.values())
        return sum(one["tokens"] for one in self.counters.values()) / room if room else 0.0

    def limit(self) -> str:
        """Name the stage that waited least for its share of the time."""
        return max(self.stages, key=lambda name: self.stages[name].busy)


@dataclass(frozen=True)
class Outcome:
    """A megabatch that left the pipeline.

    Attributes
    ----------
    batch
        What it was.
    joinids, embeddings
        Its cells that have an embedding, int64 ``(n,)`` and float32 ``(n, embed_dim)``, all finite.
    set_aside
        Why each of its other cells has none, by joinid.
    widened
        Joinids of the cells that were computed in a wider precision.
    fractional
        How many of its cells have counts that are no whole numbers.
    tokens
        How many went through the model.
    failure
        Why the megabatch as a whole could not be embedded; then nothing else is known.
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
    """Another stage has failed, or nobody wants the results any more."""


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
        """Repeat what raises Full or Empty until it does not."""
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


@contextmanager
def outcomes(
    context: ReleaseContext, todo: Sequence[Megabatch], ids: Sequence[Ids], times: Times, processes: int | None = None
) -> Iterator[Iterator[Outcome]]:
    """Run all stages for some megabatches; give what leaves them, in any order, each megabatch once.

    Parameters
    ----------
    context
        The opened set and release.
    todo, ids
        Megabatches, and the joinids of each.
    times
        Filled while it runs.
    processes
        How many device processes; None: one for each device.

    Raises
    ------
    UserError
        When there is no such device.
    DeviceLostError, Exception
        At once, when a stage fails on other grounds than the cells.
    """
    line = _Line()
    read: queue.Queue[tuple[int, Cells]] = queue.Queue(maxsize=1)
    tokenized: queue.Queue[tuple[int, PackedCells]] = queue.Queue(maxsize=1)
    results: queue.Queue[tuple[Outcome, Device | None]] = queue.Queue(maxsize=1)
    tokenizer = Tokenizer.build(context.genes.ids, context.checkpoint, context.settings.gene_order)

    def put(target: "queue.Queue[Any]", item: object, time_of: StageTime | None = None) -> None:
        line.wait(lambda: target.put(item, timeout=POLL_SECONDS), time_of)

    sent: dict[int, _Sent] = {}

    def fail(key: int, error: Exception | str) -> None:
        put(results, (Outcome(todo[key], NO_IDS, _no_embeddings(context), failure=str(error)), None))

    def read_all() -> None:
        for key, joinids in enumerate(ids):
            for attempt in range(1, TRIES + 1):
                began = time.monotonic()
                try:
                    # Anything but a UserError here comes from the storage, not from these cells.
                    cells = read_cells(
                        context.release,
                        joinids,
                        context.checkpoint.aux_column,
                        whole_counts=context.settings.fractional_counts == "set_aside",
                    )
                except UserError as error:
                    if attempt == TRIES:
                        fail(key, error)
                    continue
                finally:
                    times.stages["read"].busy += time.monotonic() - began
                if len(cells.joinids):
                    put(read, (key, cells), times.stages["read"])
                else:
                    nothing = Outcome(todo[key], NO_IDS, _no_embeddings(context), set_aside=cells.set_aside)
                    put(results, (nothing, None))
                break

    def tokenize_all() -> None:
        while True:
            key, cells = line.wait(lambda: read.get(timeout=POLL_SECONDS), times.stages["tokens"])
            began = time.monotonic()
            try:
                packed = tokenizer(cells)
            except Exception as error:
                fail(key, f"{type(error).__name__}: {error}")
                continue
            times.stages["tokens"].busy += time.monotonic() - began
            # Counts are not needed any more.
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
            put(results, (_outcome(todo[answer.key], sent.pop(answer.key), answer, _no_embeddings(context)), device))

    def leave() -> Iterator[Outcome]:
        for _ in todo:
            outcome, device = line.wait(lambda: results.get(timeout=POLL_SECONDS), times.stages["write"])
            yield outcome
            # Whoever asks for the next has committed this one.
            if device is not None:
                device.commit()

    settings = context.settings
    with ExitStack() as stack:
        # Threads end last: those that talk to a device do when its process is gone.
        stack.callback(line.stop)
        line.start(read_all)
        line.start(tokenize_all)
        began = time.monotonic()
        prepared = prepare(context.checkpoint, settings.compute_precision, context.cache)
        devices = stack.enter_context(
            open_devices(prepared, tokenizer.known_genes, settings.device, settings.batch_size, processes)
        )
        stack.callback(line.stopped.set)
        times.load = time.monotonic() - began
        times.devices = [device.about for device in devices]
        for number, device in enumerate(devices):
            line.start(feed, device)
            line.start(collect, number, device)
        yield leave()


@dataclass(frozen=True)
class _Sent:
    """What is known of a megabatch while a device works on it."""

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


def _no_embeddings(context: ReleaseContext) -> npt.NDArray[np.float32]:
    return np.empty((0, context.identity.embedding_dim), np.float32)


def _acquire(slots: threading.Semaphore) -> None:
    if not slots.acquire(timeout=POLL_SECONDS):
        raise queue.Full
