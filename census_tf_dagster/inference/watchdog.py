"""Ends a process whose device has stopped answering, because its node is paid meanwhile.

A fault of a driver or a GPU may leave a call that never returns. No exception tells of it.
"""

import os
import sys
import threading
from types import TracebackType
from typing import Self

LONGEST_SECONDS = 900.0
"""How long loading a model, or one row, may take. A row takes seconds on a GPU; compiling takes a minute or two; on a
CPU, a row of the real models takes minutes."""

EXIT_STATUS = 1


class Watchdog:
    """A context manager for work on a device; it may be entered many times.

    Parameters
    ----------
    what
        Name of the device, for the message.
    longest
        Seconds that one entry may last.
    """

    def __init__(self, what: str, longest: float = LONGEST_SECONDS) -> None:
        self._what, self._longest = what, longest
        self._entries = 0
        self._working = False
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Self:
        self._entries += 1
        self._working = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._working = False

    def _watch(self) -> None:
        # Time is counted in waits of this thread. A clock would also count the time in which the process was frozen.
        waits, last = 0, 0
        while waits < 100:
            threading.Event().wait(self._longest / 100)
            waits = waits + 1 if self._working and self._entries == last else 0
            last = self._entries
        print(
            f"{self._what} has not finished a row for {self._longest:.0f} s; expected seconds. The driver or the "
            "device hangs, so this process ends. Run the shard again on another node.",
            file=sys.stderr,
            flush=True,
        )
        # A normal exit would clean up on the device, which hangs.
        os._exit(EXIT_STATUS)
