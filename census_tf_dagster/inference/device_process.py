"""The process that owns one device: it receives tokens and returns embeddings. It never commits anything.

    python -m census_tf_dagster.inference.device_process PARENT

`devices` starts it. It reads messages from standard input and answers on standard output (`wire`): the first message
says what to load, the others are megabatches. One thread reads ahead, one keeps the device busy, and one sends. The
process ends when its standard input is closed. On Linux it also ends when the process with the id PARENT ends, even if
that was killed.
"""

import sys

from census_tf_dagster.inference.child_processes import end_with_parent

if __name__ == "__main__":
    # This comes before the other imports, because importing torch takes seconds.
    end_with_parent(int(sys.argv[1]))

import os
import queue
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import torch

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.engine import Engine, PendingCells
from census_tf_dagster.inference.packing import PackedCells
from census_tf_dagster.inference.watchdog import Watchdog
from census_tf_dagster.inference.wire import AnyArray, Header, receive, send

TRIES = 2

Message = tuple[Header, list[AnyArray]]


def main() -> None:
    """Serve until standard input is closed."""
    # The parent decides when this process ends, even after Ctrl-C, which the terminal sends to both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source: BinaryIO = os.fdopen(os.dup(0), "rb", buffering=0)
    target: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
    # Text that a library prints must not mix with the messages.
    os.dup2(2, 1)
    inbox: queue.Queue[Message] = queue.Queue()
    outbox: queue.Queue[Message] = queue.Queue()
    committed = threading.Semaphore(0)
    threading.Thread(target=_read, args=(source, inbox, committed), daemon=True).start()
    threading.Thread(target=_write, args=(target, outbox), daemon=True).start()
    header, _ = inbox.get()
    watchdog = Watchdog(header["device"])
    try:
        with watchdog:
            engine = Engine.load(Path(header["prepared"]), header["genes"], header["device"], header["batch_size"])
    except UserError as error:
        outbox.put(({"user_error": str(error)}, []))
        threading.Event().wait()
        raise AssertionError from error
    outbox.put((_about(engine), []))
    _serve(engine, inbox, outbox, committed, watchdog)


def _read(source: BinaryIO, inbox: "queue.Queue[Message]", committed: threading.Semaphore) -> None:
    while (message := receive(source)) is not None:
        if "committed" in message[0]:
            committed.release()
        else:
            inbox.put(message)
    # sys.exit would end only this thread, and the main thread may be busy with anything.
    os._exit(0)


def _write(target: BinaryIO, outbox: "queue.Queue[Message]") -> None:
    while True:
        header, arrays = outbox.get()
        send(target, header, *arrays)


def _about(engine: Engine) -> Header:
    device = engine.model.device
    cuda = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if cuda else "CPU",
        "attention": engine.model.kernel.name if cuda else "cell by cell",
        "row_length": engine.row_length,
        "torch": torch.__version__,
    }


def _serve(
    engine: Engine,
    inbox: "queue.Queue[Message]",
    outbox: "queue.Queue[Message]",
    committed: threading.Semaphore,
    watchdog: Watchdog,
) -> None:
    uncommitted = 0
    started = 0.0
    keys: dict[PendingCells, tuple[int, int]] = {}
    while True:
        if engine.hungry:
            try:
                # Ask for more before the device has finished its rows, but never delay those rows.
                header, (tokens, bias, offsets) = inbox.get(block=engine.idle)
                keys[engine.add(PackedCells(tokens, bias, offsets))] = header["key"], 1
                # The time starts with the first megabatch: before that there is nothing to do.
                started = started or time.monotonic()
            except queue.Empty:
                pass
        if engine.finishing:
            # At most one megabatch is computed but not committed, so a killed worker loses at most that one.
            while uncommitted:
                committed.acquire()
                uncommitted -= 1
        with watchdog:
            done = engine.step()
        if done is None:
            continue
        key, tries = keys.pop(done)
        if done.failure and tries < TRIES:
            keys[engine.add(done.packed)] = key, tries + 1
            continue
        uncommitted += 1
        answer: dict[str, Any] = {"key": key, "tokens": len(done.packed.tokens)}
        answer["counters"] = {
            **vars(engine.counters),
            "elapsed": time.monotonic() - started,
            "peak_bytes": engine.peak_bytes(),
        }
        if done.failure:
            outbox.put(({**answer, "failure": f"{type(done.failure).__name__}: {done.failure}"}, []))
        else:
            outbox.put(({**answer, "set_aside": done.set_aside, "widened": done.widened}, [done.embeddings]))


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # A normal exit would clean up on the device, which may hang.
        os._exit(1)
