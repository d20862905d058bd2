"""Runs commands as forks (`fork_server`), because importing what they need takes seconds."""

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.fork_server import OURS, ForkedProcess, ForkServer


class WarmProcess(ForkedProcess):
    """A running `python -m MODULE ARGUMENTS`.

    Attributes
    ----------
    stdout
        The text that the command prints.
    errors
        The file of the text that it prints to standard error.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        server: ForkServer = OURS,
    ) -> None:
        self._place = tempfile.TemporaryDirectory()
        self.errors = Path(self._place.name) / "errors"
        reading, writing = os.pipe()
        with self.errors.open("w") as errors, os.fdopen(writing):
            streams = {"stdout": writing, "stderr": errors.fileno()}
            super().__init__(module, arguments, folder, environment, **streams, server=server)
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
    module: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    *,
    server: ForkServer = OURS,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` in a folder and wait for it."""
    process = WarmProcess(module, arguments, folder, environment, server=server)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), output, errors)
