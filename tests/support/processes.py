"""Reads Linux's records of processes."""

import time
from pathlib import Path


def children(parent: int) -> list[int]:
    """Return the children of a process that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(state[1]) == parent:
                found.append(int(entry.name))
    return sorted(found)


def device_processes(parent: int) -> list[int]:
    """Return the device processes of a process, without its other children."""
    module = b"census_tf_dagster.inference.device_process"
    return [pid for pid in children(parent) if module in (Path("/proc") / str(pid) / "cmdline").read_bytes()]


def alive(pid: int) -> bool:
    """Tell whether a process runs. A process that has ended and waits to be reaped does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone_within(pids: list[int], seconds: float) -> bool:
    """Wait until none of these processes runs."""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
