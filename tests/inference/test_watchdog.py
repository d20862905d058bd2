"""A device that stops answering ends its process; one that works, waits or was frozen does not."""

import signal
import subprocess
import sys
import time

import pytest

from census_tf_dagster.inference.watchdog import EXIT_STATUS

START = """
import sys, time
from census_tf_dagster.inference.watchdog import Watchdog
watchdog = Watchdog("cuda:1", longest=1.0)
"""
HANGS = """
with watchdog:
    print("working", flush=True)
    time.sleep(60)
"""
WORKS = """
for _ in range(30):
    with watchdog:
        time.sleep(0.1)
"""
WAITS = """
with watchdog:
    pass
time.sleep(3)
"""
FREEZES = """
with watchdog:
    print("working", flush=True)
    time.sleep(0.5)
"""


def start(code: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", START + code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_call_that_never_returns() -> None:
    with start(HANGS) as process:
        began = time.monotonic()
        _, errors = process.communicate(timeout=50)
        assert time.monotonic() - began < 50
    assert process.returncode == EXIT_STATUS
    assert errors.startswith("cuda:1 has not finished a row for 1 s; expected seconds.")


@pytest.mark.parametrize("code", [WORKS, WAITS])
def test_work_and_waiting(code: str) -> None:
    with start(code) as process:
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_a_process_that_was_frozen() -> None:
    with start(FREEZES) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
