"""Puts a digest of all bytes into a safetensors file, so that damage is noticed before the file is used.

The digest is XXH3 (128 bits). It is as fast as memory, so each load checks it. It is part of the file's own metadata,
so one rename publishes both. While it is computed, zeros are in its place.
"""

import mmap
from pathlib import Path

from xxhash import xxh3_128

SEAL = "digest"
"""Key of the digest in the metadata."""
UNSEALED = "0" * 32
"""Value in the place of the digest while it is computed."""
MARK = f'"{SEAL}":"'.encode()
LENGTH_BYTES = 8
"""Bytes of the header's length, with which a safetensors file begins."""


def seal(path: Path) -> None:
    """Write the digest into a file whose metadata has `UNSEALED` in its place."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        at = _place(content)
        content[at : at + len(UNSEALED)] = _digest(content, at)


def is_sealed(path: Path) -> bool:
    """Tell whether a file exists and is unchanged since `seal`. Reads the whole file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            at = _place(content)
            return content[at : at + len(UNSEALED)] == _digest(content, at)
    except (OSError, ValueError):
        return False


def _place(content: mmap.mmap) -> int:
    """Return the position of the digest in a file."""
    header = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
    at = content.find(MARK, 0, header)
    if at < 0:
        raise ValueError("the file has no place for a digest")
    return at + len(MARK)


def _digest(content: mmap.mmap, at: int) -> bytes:
    with memoryview(content) as view:
        digest = xxh3_128(view[:at])
        digest.update(UNSEALED.encode())
        digest.update(view[at + len(UNSEALED) :])
    return digest.hexdigest().encode()
