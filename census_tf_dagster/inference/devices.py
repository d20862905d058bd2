"""Starts one process per device of this machine, and sends megabatches to it. Imports no torch.

A device has its own process, so that its Python does nothing else: reading, tokenizing and writing happen elsewhere.
These processes end when this process ends, even if it is killed (`child_processes`). Their code belongs in
`device_process`.
"""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.cell_errors import NonFiniteError
from census_tf_dagster.inference.checkpoint_cache import kernel_folders
from census_tf_dagster.inference.packing import PackedCells
from census_tf_dagster.inference.wire import AnyArray, Header, receive, send

MOST_UNCOMMITTED = 2
"""Most megabatches that a device has received and nobody has committed: one is computed while another is written."""


def require_gpu(set_name: str, release: str) -> None:
    """Raise an error if this machine has no GPU, before anything is read or loaded for it.

    Raises
    ------
    UserError
        When there is none. The message names the command that sends the work to a node with a GPU.
    """
    if not count_gpus():
        raise UserError(
            f"set {set_name!r} has `device: cuda`, but this machine has no GPU. Expected one: run `census-tf-dagster "
            f"launch {set_name} {release}` to send the work to the deployment's GPU nodes. For a small trial on this "
            "machine, set `device: cpu` in the set's YAML."
        )


def count_gpus() -> int:
    """Return how many GPUs the driver shows to this process (CUDA_VISIBLE_DEVICES), without torch."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


class DeviceLostError(RuntimeError):
    """A device's process ended before its work was done."""


@dataclass(frozen=True)
class Embedded:
    """A device's answer to a megabatch.

    Attributes
    ----------
    key
        The key of the megabatch, as it was sent.
    embeddings
        float32 ``(n_cells, embed_dim)``, NaN for cells that are set aside; None if no cell could be embedded.
    failure
        The reason if no cell could be embedded.
    set_aside
        The reason for each cell without an embedding, by its position in the megabatch, ascending.
    widened
        Positions, ascending, of the cells whose values left the precision's range and were computed in float32.
    tokens
        Number of tokens that went through the model.
    counters
        Totals since the device loaded the model: `engine.Counters`, seconds since its first megabatch, peak memory.
    """

    key: int
    embeddings: npt.NDArray[np.float32] | None
    failure: str
    set_aside: dict[int, str]
    widened: list[int]
    tokens: int
    counters: dict[str, float]


@dataclass
class Device:
    """A device's process that has loaded its model. One thread may send to it while another receives."""

    process: "subprocess.Popen[bytes]"
    about: Header
    slots: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MOST_UNCOMMITTED))
    """The sender acquires a slot before `send`; `commit` releases it."""
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, key: int, cells: PackedCells) -> None:
        """Send a megabatch to the device."""
        self._send({"key": key}, cells.tokens, cells.bias, cells.offsets)

    def commit(self) -> None:
        """Report that the last answer is committed or discarded, so the device may complete the next megabatch."""
        self._send({"committed": True})
        self.slots.release()

    def _send(self, header: Header, *arrays: AnyArray) -> None:
        try:
            with self._sending:
                send(_pipe(self.process.stdin), header, *arrays)
        except BrokenPipeError as error:
            raise _lost(self.process, self.about["name"]) from error

    def receive(self) -> Embedded:
        """Wait for the next answer."""
        message = receive(_pipe(self.process.stdout))
        if message is None:
            raise _lost(self.process, self.about["name"])
        header, arrays = message
        return Embedded(
            key=header["key"],
            embeddings=arrays[0] if arrays else None,
            failure=header.get("failure", ""),
            # The keys of a JSON object are strings.
            set_aside={int(cell): reason for cell, reason in header.get("set_aside", {}).items()},
            widened=header.get("widened", []),
            tokens=header["tokens"],
            counters=header["counters"],
        )

    def embed(self, cells: PackedCells) -> npt.NDArray[np.float32]:
        """Embed cells and wait for the result, float32 ``(n_cells, embed_dim)``.

        Raises
        ------
        ArithmeticError
            When some or all cells cannot be embedded, with the reason.
        """
        self.send(0, cells)
        answer = self.receive()
        self.commit()
        if answer.embeddings is None:
            raise ArithmeticError(answer.failure)
        if answer.set_aside:
            raise NonFiniteError(answer.set_aside)
        return answer.embeddings


@contextmanager
def open_devices(
    prepared: Path, genes: Sequence[str], device: str, batch_size: int | None, processes: int | None = None
) -> Iterator[list[Device]]:
    """Start a process for each device and load the model in all of them at once.

    The processes end with the thread that enters this context.

    Parameters
    ----------
    prepared, genes
        Arguments of `Engine.load`.
    device
        ``cuda``: all GPUs that are visible; ``cpu``: one process.
    batch_size
        Most cells in a row; None: as many as fit.
    processes
        Number of processes; None: one per device.

    Raises
    ------
    UserError
        When there is no such device.
    DeviceLostError
        When a process ends.
    """
    with ExitStack() as stack:

        def start(number: int) -> "subprocess.Popen[bytes]":
            process = stack.enter_context(_process(prepared))
            target = f"cuda:{number}" if device == "cuda" else device
            order = {"prepared": str(prepared), "genes": list(genes), "device": target, "batch_size": batch_size}
            send(_pipe(process.stdin), order)
            return process

        # Without a GPU, a single process starts and reports why torch finds none.
        found = max(count_gpus(), 1) if device == "cuda" else 1
        started = [start(number) for number in range(processes or found)]
        yield [Device(process, _message(process)) for process in started]


@contextmanager
def _process(prepared: Path) -> "Iterator[subprocess.Popen[bytes]]":
    command = [sys.executable, "-m", "census_tf_dagster.inference.device_process", str(os.getpid())]
    # Reading and writing share the cores. Threads that spin while they wait would make them several times slower.
    env = {"OMP_WAIT_POLICY": "PASSIVE", **kernel_folders(prepared), **os.environ}
    process = _start(command, env)
    try:
        yield process
    finally:
        # The process holds nothing that could be lost.
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            _pipe(pipe).close()


def _start(command: list[str], env: dict[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env)  # noqa: S603


def _message(process: "subprocess.Popen[bytes]") -> Header:
    """Wait for the first message of a process, which describes its device and model."""
    message = receive(_pipe(process.stdout))
    if message is None:
        raise _lost(process, "a device")
    if "user_error" in message[0]:
        raise UserError(message[0]["user_error"])
    return message[0]


def _lost(process: "subprocess.Popen[bytes]", name: str) -> DeviceLostError:
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return DeviceLostError(
        f"the process of {name} ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}; expected it to "
        "run until the shard is done. Its output above says why (signal 9: usually the machine ran out of memory). Run "
        "the shard again: committed megabatches stay."
    )


def _pipe(pipe: object) -> BinaryIO:
    if pipe is None:
        raise ValueError("the process has no such pipe")
    return pipe  # type: ignore[return-value]
