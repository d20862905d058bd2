"""The processes that tests fork behave as those that `subprocess` starts."""

import os
import time
from pathlib import Path

from tests.support.processes import alive
from tests.support.warm_processes import WarmProcess


def test_a_process_that_ended_unseen_can_be_killed(tmp_path: Path) -> None:
    process = WarmProcess("this", [], tmp_path, os.environ)
    # Its status is on its way for as long as this is held.
    with process._waiting:
        while alive(process.pid):
            time.sleep(0.01)
        assert process.poll() is None
        process.kill()
    assert process.communicate()[0].startswith("The Zen of Python")
    assert process.returncode == 0
