"""Identifies the process that does a run's work in the run's tags, and tells whether it is still alive.

This module knows nothing about Dagster. Acting on a dead process belongs in the sensor `lost_runs`, showing it in
`status`.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

WORKER_TAG = "census_tf/worker"
"""On a run: the process that does its work. A retry carries its parent's value until its own process starts."""

PROC = Path("/proc")


@dataclass(frozen=True)
class WorkerProcess:
    """A process, identified so that it cannot be confused with another one, even after a reboot.

    Attributes
    ----------
    run
        Id of the run; empty if it was not known when the run started.
    host, machine
        Name of the host, and its `/etc/machine-id`. Machines made from one image may share either.
    boot, namespace
        Ids of the host's boot and of the container's process namespace; empty outside Linux.
    pid
        Process id in that namespace.
    started
        Start time of the process, in ticks since that boot. It is needed because process ids are used again.
    """

    run: str
    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    started: str

    @classmethod
    def this(cls, run: str) -> Self:
        """Return this process as the worker of a run."""
        pid = os.getpid()
        return cls(
            run=run,
            host=platform.node(),
            machine=_text(Path("/etc/machine-id")),
            boot=_text(PROC / "sys/kernel/random/boot_id"),
            namespace=_namespace(),
            pid=pid,
            started=(_state(pid) or ("", ""))[1],
        )

    @classmethod
    def of(cls, run: str, tags: Mapping[str, str]) -> Self | None:
        """Return the process in a run's tags; None if they have none, or only that of the run that it retries."""
        try:
            found = cls(**json.loads(tags[WORKER_TAG]))
        except (KeyError, ValueError, TypeError):
            return None
        return found if found.run in ("", run) else None

    def tags(self) -> dict[str, str]:
        """Return the tag that identifies this process on its run."""
        return {WORKER_TAG: json.dumps(asdict(self))}

    def alive(self) -> bool | None:
        """Tell whether the process is still alive; None if this process cannot know it."""
        here = self.this(self.run)
        if not self.boot or (self.host, self.machine) != (here.host, here.machine):
            return None
        if self.boot != here.boot:
            return False
        if self.namespace != here.namespace:
            return None
        state = _state(self.pid)
        if state is not None:
            return state[1] == self.started and state[0] not in "ZX"
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            # The process belongs to another user, so this one may not inspect it.
            return None
        return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str((PROC / "self/ns/pid").readlink())
    except OSError:
        return ""


def _state(pid: int) -> tuple[str, str] | None:
    """Return the state letter and the start time in ticks of a process; None if it is not visible."""
    # The second field is the program's name in parentheses, which may contain any character.
    fields = _text(PROC / str(pid) / "stat").rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else None
