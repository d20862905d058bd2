"""The process that does a run's work: how the run names it, and whether it is still there.

Knows nothing of Dagster. `lost_runs` acts on the answer; `status` only shows it.
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
    """A process, named so that no other one is mistaken for it, after a reboot neither.

    Attributes
    ----------
    run
        Id of the run; empty when it was not known before the run began.
    host, machine
        Name of the host, and its `/etc/machine-id`: machines made from one image may share either.
    boot, namespace
        Which boot of the host, and which container's process ids; empty where there is no Linux.
    pid
        Process id in that namespace.
    started
        When the process started, in ticks since that boot: a process id may be used again.
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
        """Return this process, as the one that works for a run."""
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
        """Return the process that a run's tags name; None when they name none, or that of the run it retries."""
        try:
            found = cls(**json.loads(tags[WORKER_TAG]))
        except (KeyError, ValueError, TypeError):
            return None
        return found if found.run in ("", run) else None

    def tags(self) -> dict[str, str]:
        """Return the tag that names this process on its run."""
        return {WORKER_TAG: json.dumps(asdict(self))}

    def alive(self) -> bool | None:
        """Tell whether the process is still there; None when that cannot be known from here."""
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
            # Another user's process, which this one may not look at.
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
    """Return a process's state letter and its start time in ticks; None when it cannot be seen."""
    # The second field is the program's name, in parentheses, with any character in it.
    fields = _text(PROC / str(pid) / "stat").rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else None
