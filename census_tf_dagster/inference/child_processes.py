"""Child processes that must not outlive their parent."""


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, whatever it is doing then. Does nothing outside Linux.

    Linux means the *thread* that started this process (prctl(2), PR_SET_PDEATHSIG), so that thread has to wait for it.

    Parameters
    ----------
    parent
        Process id of the parent, which may have ended before this was called: then this process ends here.
    """
    # All here: the source of this function also runs where this package is not installed.
    import ctypes
    import os
    import signal
    import sys

    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)
