"""Compiles functions with numba, and chooses the folder that keeps the results for later processes."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher

_kept_nowhere: list[Any] = []


class _Cache(FunctionCache):
    def save_overload(self, signature: Any, data: Any) -> None:
        # If the disk or quota is full, the next process compiles again.
        with suppress(OSError):
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function at its first call; it runs without Python's interpreter lock.

    Numba chooses the folder for the result: ``NUMBA_CACHE_DIR``, the source's folder, or the user's cache folder. If
    none of them is writable (root's environment, no home), `keep_below` sets the folder.

    Parameters
    ----------
    options
        Options of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **options)(function)
        if not _keep(dispatcher):
            _kept_nowhere.append(dispatcher)
        return dispatcher

    return decorate


def keep_below(cache: Path) -> None:
    """Keep compiled functions below this folder if numba finds no writable one, also those of packages imported later.

    Without a writable folder some packages cannot be imported, such as umap.
    """
    # umap and other packages are installed beside numba, so numba's own functions show whether they have a folder.
    if _kept_nowhere or not _has_place(numba.njit):
        numba.config.CACHE_DIR = str(cache / "numba")  # type: ignore[attr-defined]
        _kept_nowhere[:] = [dispatcher for dispatcher in _kept_nowhere if not _keep(dispatcher)]


def keep_compiled(module: ModuleType) -> None:
    """Keep the compiled functions of a module of another package, which does not ask numba to keep them."""
    for value in vars(module).values():
        if isinstance(value, Dispatcher):
            _keep(value)


def _has_place(function: Any) -> bool:
    try:
        FunctionCache(function)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return True


def _keep(dispatcher: Any) -> bool:
    if found := _has_place(dispatcher.py_func):
        # This does the same as `cache=True`, which would be an error without a writable folder.
        dispatcher._cache = _Cache(dispatcher.py_func)  # type: ignore[no-untyped-call]
    return found
