"""Processes that import this module fork their device processes, because importing torch takes seconds.

They start them as outside of tests if the variable REAL_DEVICES is set (the fixture `real_devices`).
"""

import os
from pathlib import Path
from typing import BinaryIO

from census_tf_dagster.inference import devices
from tests.support.fork_server import OURS, ForkedProcess

REAL_DEVICES = "CENSUS_TF_TEST_REAL_DEVICES"

_start = devices._start


class WarmDevice(ForkedProcess):
    """A device process. It ends with the fork server, and when its standard input is closed."""

    def __init__(self, module: str, environment: dict[str, str]) -> None:
        theirs, ours = os.pipe()
        answers, answering = os.pipe()
        # Its parent is the server, not this process.
        arguments = [str(OURS.pid())]
        with os.fdopen(theirs), os.fdopen(answering):
            super().__init__(module, arguments, Path.cwd(), environment, stdin=theirs, stdout=answering)
        self.stdin: BinaryIO = os.fdopen(ours, "wb", buffering=0)
        self.stdout: BinaryIO = os.fdopen(answers, "rb", buffering=0)


def _start_or_fork(command: list[str], environment: dict[str, str]) -> object:
    if REAL_DEVICES in os.environ:
        return _start(command, environment)
    _, _, module, _ = command
    return WarmDevice(module, environment)


devices._start = _start_or_fork  # type: ignore[assignment]
