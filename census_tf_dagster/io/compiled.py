"""Functions that numba compiles, and where the results are kept for the next process."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

_kept_nowhere: list[Any] = []


class _Cache(FunctionCache):
    def save_overload(self, signature: Any, data: Any) -> None:
        # A full disk or quota: the next process compiles again.
        with suppress(OSError):
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call; it runs without Python's lock.

    The result is kept where numba keeps its own: in ``NUMBA_CACHE_DIR``, beside the source, or in the user's cache
    folder. Where none of them can be written (a root's environment, no home), `keep_below` says where.

    Parameters
    ----------
    options
        As `numba.njit` takes them.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        if not _keep(dispatcher):
            _kept_nowhere.append(dispatcher)
        return dispatcher

    return decorate


def keep_below(cache: Path) -> None:
    """Let what numba finds no place for be kept in this folder: our functions, and those of packages imported later.

    umap, for example, cannot be imported where there is no place.
    """
    # umap and others are installed beside numba.
    if _kept_nowhere or not _has_place(numba.njit):
        numba.config.CACHE_DIR = str(cache / "numba")  # type: ignore[attr-defined]
        _kept_nowhere[:] = [dispatcher for dispatcher in _kept_nowhere if not _keep(dispatcher)]


def _has_place(function: Any) -> bool:
    try:
        FunctionCache(function)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return True


def _keep(dispatcher: Any) -> bool:
    if found := _has_place(dispatcher.py_func):
        # What `cache=True` does, which is an error where there is no place.
        dispatcher._cache = _Cache(dispatcher.py_func)  # type: ignore[no-untyped-call]
    return found
