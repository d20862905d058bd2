"""SHA-256 of files, remembered: those of tf_metazoa have several GB.

A remembered digest is found by the file's path, size, time of change and inode, and has a checksum of its own: an entry
that is damaged or was written in part is as good as none. What changes a file and keeps all four (a disk that fails)
is not noticed here. So `prepare` reads the files again before it computes anything from them, and calls `forget` when
they are not what was remembered. Small files are hashed each time.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_128_digest

from census_tf_dagster.io.files import replacing

REMEMBERED_FROM = 2**26
"""Bytes of a file that is worth remembering; less is hashed in a tenth of a second."""
SHA256_BYTES = 32


def file_digest(path: Path, cache: Path | None, check: Callable[[], None] | None = None) -> bytes:
    """Return the SHA-256 of a file.

    Parameters
    ----------
    path
        The file.
    cache
        Local folder that remembers digests below ``digests``; None: hash it now.
    check
        Judges the content, and raises when it is not fit; not called for a file that passed and was remembered.
    """
    entry = _entry(path, cache, checked=check is not None) if cache is not None else None
    if entry is not None and (digest := _remembered(entry)) is not None:
        return digest
    if check is not None:
        check()
    digest = _hash_file(path)
    # A cache that cannot be written costs time alone; a file that changed meanwhile is another one.
    if entry is not None and cache is not None and entry == _entry(path, cache, checked=check is not None):
        with suppress(OSError), replacing(entry) as partial:
            partial.write_bytes(digest + _own_checksum(entry, digest))
    return digest


def forget(path: Path, cache: Path) -> None:
    """Drop what is remembered of a file as it is now."""
    for checked in (False, True):
        if (entry := _entry(path, cache, checked=checked)) is not None:
            with suppress(OSError):
                entry.unlink()


def _entry(path: Path, cache: Path, *, checked: bool) -> Path | None:
    state = path.stat()
    if state.st_size < REMEMBERED_FROM:
        return None
    key = f"{os.fspath(path.resolve())} {state.st_size} {state.st_mtime_ns} {state.st_ino} {checked}"
    return cache / "digests" / hashlib.sha256(key.encode()).hexdigest()


def _remembered(entry: Path) -> bytes | None:
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    digest = content[:SHA256_BYTES]
    return digest if content[SHA256_BYTES:] == _own_checksum(entry, digest) else None


def _own_checksum(entry: Path, digest: bytes) -> bytes:
    return xxh3_128_digest(entry.name.encode() + digest)


def _hash_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
