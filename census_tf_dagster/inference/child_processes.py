"""Ends child processes together with their parent. It starts none: that belongs in `devices` and its likes."""


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends. Does nothing outside Linux.

    For Linux, the parent is the *thread* that started this process (prctl(2), PR_SET_PDEATHSIG). So that thread must
    live as long as this process is needed.

    Parameters
    ----------
    parent
        Process id of the parent. If the parent has already ended, this process ends at once.
    """
    # The imports are here because the source of this function also runs where this package is not installed.
    import ctypes
    import os
    import signal
    import sys

    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)
