"""A safetensors file that carries a digest of all its bytes, so that damage is noticed before it is computed with.

The digest is XXH3 (128 bits), which is as fast as memory: it is checked at each load. It is in the file's own metadata,
and is taken with zeros in its place, so one rename brings both.
"""

import mmap
from pathlib import Path

from xxhash import xxh3_128

SEAL = "digest"
"""The metadata's key."""
UNSEALED = "0" * 32
"""In the place of the digest while it is taken."""
MARK = f'"{SEAL}":"'.encode()
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""


def seal(path: Path) -> None:
    """Put the digest into a file whose metadata has `UNSEALED` in its place."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        at = _place(content)
        content[at : at + len(UNSEALED)] = _digest(content, at)


def is_sealed(path: Path) -> bool:
    """Tell whether a file is there and as `seal` left it; reads all of it."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            at = _place(content)
            return content[at : at + len(UNSEALED)] == _digest(content, at)
    except (OSError, ValueError):
        return False


def _place(content: mmap.mmap) -> int:
    """Return where the digest is in a file."""
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
