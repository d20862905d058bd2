"""Computes the SHA-256 of files and remembers it, because the files of tf_metazoa have several GB.

A remembered digest is found by the file's path, size, time of change and inode. The entry has its own checksum, so a
damaged or partly written entry is ignored. This module does not notice a change that keeps all four (a failing disk).
So `prepare` reads the files again before it computes anything from them, and calls `forget` if they have changed. Small
files are hashed each time.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from xxhash import xxh3_128_digest

from census_tf_dagster.io.files import replacing

REMEMBERED_FROM = 2**26
"""Least bytes of a file whose digest is remembered; a smaller file is hashed in 0.1 seconds."""
SHA256_BYTES = 32


def file_digest(path: Path, cache: Path | None, check: Callable[[], None] | None = None) -> bytes:
    """Return the SHA-256 of a file.

    Parameters
    ----------
    path
        The file.
    cache
        Local folder that remembers digests below ``digests``; None: hash the file now.
    check
        Raises an error if the content is invalid. It is not called for a file that passed it and was remembered.
    """
    entry = _entry(path, cache, checked=check is not None) if cache is not None else None
    if entry is not None and (digest := _remembered(entry)) is not None:
        return digest
    if check is not None:
        check()
    digest = _hash_file(path)
    # A cache that cannot be written costs only time. A file that changed meanwhile is not remembered.
    if entry is not None and cache is not None and entry == _entry(path, cache, checked=check is not None):
        with suppress(OSError), replacing(entry) as partial:
            partial.write_bytes(digest + _own_checksum(entry, digest))
    return digest


def forget(path: Path, cache: Path) -> None:
    """Delete the remembered digests of a file."""
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
