"""Starts commands and device processes as forks (`fork_server`), because importing what they need takes seconds."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from census_tf_dagster.inference import devices
from tests.support.fork_server import ForkedProcess, server_pid

REAL_DEVICES = "CENSUS_TF_TEST_REAL_DEVICES"
"""If this variable is set, commands start their device processes as they do outside of tests."""

start_device = devices._process


class WarmProcess(ForkedProcess):
    """A running `python -m MODULE ARGUMENTS`.

    Attributes
    ----------
    stdout
        The text that the command prints.
    errors
        The file of the text that it prints to standard error.
    """

    def __init__(self, module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._place = tempfile.TemporaryDirectory()
        self.errors = Path(self._place.name) / "errors"
        reading, writing = os.pipe()
        with self.errors.open("w") as errors, os.fdopen(writing):
            super().__init__(module, arguments, folder, environment, stdout=writing, stderr=errors.fileno())
        self.stdout = os.fdopen(reading)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.wait()
        self._close()

    def _close(self) -> None:
        self.stdout.close()
        self._place.cleanup()

    def until_it_logs(self, text: str) -> None:
        """Wait until the command prints a text to standard error."""
        deadline = time.monotonic() + 120
        while text not in self.errors.read_text():
            assert self.poll() is None, self.errors.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def communicate(self) -> tuple[str, str]:
        output = self.stdout.read()
        self.wait()
        errors = self.errors.read_text()
        self._close()
        return output, errors


def run_module(
    module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` in a folder and wait for it."""
    process = WarmProcess(module, arguments, folder, environment)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), output, errors)


class WarmDevice(ForkedProcess):
    """A device process. It ends with the fork server, and when its standard input is closed."""

    def __init__(self) -> None:
        theirs, ours = os.pipe()
        answers, answering = os.pipe()
        with os.fdopen(theirs), os.fdopen(answering):
            super().__init__(
                "census_tf_dagster.inference.device_process",
                [str(server_pid())],
                Path.cwd(),
                os.environ,
                stdin=theirs,
                stdout=answering,
            )
        self.stdin: BinaryIO = os.fdopen(ours, "wb", buffering=0)
        self.stdout: BinaryIO = os.fdopen(answers, "rb", buffering=0)


@contextmanager
def warm_device() -> Iterator[WarmDevice]:
    """Do what `devices` does to start and end a device process."""
    process = WarmDevice()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def use_warm_devices() -> None:
    """Let this process fork its device processes."""
    devices._process = warm_device  # type: ignore[assignment]
