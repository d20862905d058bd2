"""Processes that import this module fork their device processes, because importing torch takes seconds.

They start them as outside of tests if the variable REAL_DEVICES is set (the fixture `real_devices`).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from census_tf_dagster.inference import devices
from census_tf_dagster.inference.checkpoint_cache import kernel_folders
from tests.support.fork_server import OURS, ForkedProcess

REAL_DEVICES = "CENSUS_TF_TEST_REAL_DEVICES"

_really = devices._process


class WarmDevice(ForkedProcess):
    """A device process. It ends with the fork server, and when its standard input is closed."""

    def __init__(self, prepared: Path) -> None:
        theirs, ours = os.pipe()
        answers, answering = os.pipe()
        module, parent = "census_tf_dagster.inference.device_process", str(OURS.pid())
        with os.fdopen(theirs), os.fdopen(answering):
            environment = {**kernel_folders(prepared), **os.environ}
            super().__init__(module, [parent], Path.cwd(), environment, stdin=theirs, stdout=answering)
        self.stdin: BinaryIO = os.fdopen(ours, "wb", buffering=0)
        self.stdout: BinaryIO = os.fdopen(answers, "rb", buffering=0)


@contextmanager
def _warm(prepared: Path) -> Iterator[WarmDevice]:
    process = WarmDevice(prepared)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _start(prepared: Path) -> "AbstractContextManager[Any]":
    return _really(prepared) if REAL_DEVICES in os.environ else _warm(prepared)


devices._process = _start  # type: ignore[assignment]
