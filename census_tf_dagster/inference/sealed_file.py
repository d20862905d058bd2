"""Puts a digest of all bytes into a safetensors file, so that damage is noticed before the file is used.

The digest is XXH3 (128 bits). It is nearly as fast as memory, so each load checks it. It is part of the file's own
metadata, so one rename publishes both. While it is computed, zeros are in its place.
"""

from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_128

SEAL = "digest"
"""Key of the digest in the metadata."""
UNSEALED = "0" * 32
"""Value in the place of the digest while it is computed."""
MARK = f'"{SEAL}":"'.encode()
LENGTH_BYTES = 8
"""Bytes of the header's length, with which a safetensors file begins."""
LARGEST_HEADER = 100_000_000
"""Most bytes of a header, in the format. Only a damaged length is larger."""
BLOCK = 2**20
"""Bytes read at once. A mapping of the whole file would count as memory of the process."""


def seal(path: Path) -> None:
    """Write the digest into a file whose metadata has `UNSEALED` in its place."""
    with path.open("r+b") as file:
        at = _place(file)
        digest = _digest(file, at)
        file.seek(at)
        file.write(digest)


def is_sealed(path: Path) -> bool:
    """Tell whether a file exists and is unchanged since `seal`. Reads the whole file."""
    try:
        with path.open("rb") as file:
            at = _place(file)
            file.seek(at)
            return file.read(len(UNSEALED)) == _digest(file, at)
    except (OSError, ValueError):
        return False


def _place(file: BinaryIO) -> int:
    """Return the position of the digest in a file."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    at = file.read(length).find(MARK) if length <= LARGEST_HEADER else -1
    if at < 0:
        raise ValueError("the file has no place for a digest")
    return LENGTH_BYTES + at + len(MARK)


def _digest(file: BinaryIO, at: int) -> bytes:
    file.seek(0)
    digest = xxh3_128(file.read(at))
    digest.update(UNSEALED.encode())
    file.seek(at + len(UNSEALED))
    buffer = bytearray(BLOCK)
    with memoryview(buffer) as view:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(view[:count])
    return digest.hexdigest().encode()
