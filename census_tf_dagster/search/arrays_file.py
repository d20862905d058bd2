"""Reads files with several NumPy arrays, without unpickling anything."""

import io
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def to_bytes(**arrays: npt.NDArray[np.generic]) -> bytes:
    """Return the content of a file with these arrays."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    return content.getvalue()


def from_bytes(content: bytes, names: Sequence[str]) -> list[npt.NDArray[np.generic]]:
    """Return the named arrays of a file.

    Raises
    ------
    ValueError
        When the content is damaged or lacks one of them.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            return [found[name] for name in names]
    except (OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
