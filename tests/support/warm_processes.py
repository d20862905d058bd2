"""Runs commands in forks of one process that has imported Dagster and TileDB, because importing takes them seconds.

Each command still has a process, environment, working folder and exit status of its own.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

_CONTEXT = multiprocessing.get_context("forkserver")
# None of these starts a thread when it is imported, which a fork would lack.
_CONTEXT.set_forkserver_preload(
    [
        "cellxgene_census",
        "census_tf_dagster.cli",
        "census_tf_dagster.definitions",
        "census_tf_dagster.pipeline.embed_shard",
        "census_tf_dagster.pipeline.finish_array",
        "census_tf_dagster.pipeline.plan_release",
        "dagster._cli",
        "dagster_aws.components",
    ]
)


class WarmProcess:
    """A running `python -m MODULE ARGUMENTS`. Its methods are those of `subprocess.Popen`.

    Attributes
    ----------
    stdout
        The text that the command prints.
    errors
        The file of the text that it prints to standard error.
    """

    def __init__(self, module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.command = [module, *arguments]
        reading, writing = _CONTEXT.Pipe(duplex=False)
        self._place = tempfile.TemporaryDirectory()
        self.errors = Path(self._place.name) / "errors"
        self.errors.touch()
        self._process = _CONTEXT.Process(
            target=_become, args=(self.command, str(folder), dict(environment), writing, str(self.errors))
        )
        self._process.start()
        writing.close()
        self.stdout = os.fdopen(os.dup(reading.fileno()))
        reading.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.wait()
        self._close()

    def _close(self) -> None:
        self.stdout.close()
        self._place.cleanup()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout or 0)
        return self._process.exitcode

    def until_it_logs(self, text: str) -> None:
        """Wait until the command prints a text to standard error."""
        deadline = time.monotonic() + 120
        while text not in self.errors.read_text():
            assert self.poll() is None, self.errors.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

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
    return subprocess.CompletedProcess(process.command, process.wait(), output, errors)


def _become(command: list[str], folder: str, environment: dict[str, str], output: Connection, errors: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.dup2(output.fileno(), 1)
    output.close()
    with Path(errors).open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
