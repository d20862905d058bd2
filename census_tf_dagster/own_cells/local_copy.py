"""Copies an h5ad file or a zarr folder from S3 to this machine while it is read. A SOMA experiment is read from S3."""

import fcntl
import hashlib
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import is_local
from census_tf_dagster.io.s3 import S3Object
from census_tf_dagster.io.storage import FileFacts, Storage

ZARR_MARKS = ("zarr.json", ".zgroup")
"""A folder with one of these files is a zarr group, of format 3 or 2."""
COPIED_AT_ONCE = 8


def file_version(uri: str, storage: Storage) -> str:
    """Return what tells one version of a file, folder or prefix from another: its size, and when it was written."""
    if not is_local(uri):
        if found := storage.find_object(uri):
            return f"{found.size} {found.etag}"
    elif (path := Path(uri.removeprefix("file://"))).is_file():
        return f"{path.stat().st_size} {path.stat().st_mtime_ns}"
    return version_of(storage.files(uri).values())


def version_of(files: Collection[FileFacts]) -> str:
    """Return what tells one version of a folder from another: number and size of its files, and the last write."""
    last = max((one.written for one in files), default=0.0)
    return f"{len(files)} {sum(one.size for one in files)} {last}"


@contextmanager
def local_copy(uri: str, storage: Storage, cache: Path) -> Iterator[str]:
    """Yield the address at which to open a file: a local copy of an h5ad file or zarr folder on S3, otherwise `uri`.

    The copy is removed at the end, unless another process reads it. A process that was killed leaves it, and the next
    one uses it if the original is still the same.

    Raises
    ------
    UserError
        When the copy cannot be written, or there is no space for it.
    StoreError
        When S3 cannot be reached, or the file changes while it is copied.
    """
    objects = {} if is_local(uri) else _objects(uri, storage)
    if not objects:
        yield uri
        return
    version = f"{uri} {sorted((name, found.size, found.etag) for name, found in objects.items())}"
    place = cache / "files" / hashlib.sha256(version.encode()).hexdigest()[:16]
    copy = place / uri.rsplit("/", 1)[-1]
    with _copied(uri, objects, storage, place, copy):
        yield str(copy)


def _objects(uri: str, storage: Storage) -> dict[str, S3Object]:
    """Return the objects of a file or zarr folder, by their path below it (empty for a file); none if it is neither."""
    if found := storage.find_object(uri):
        return {"": found}
    if not any(storage.exists(f"{uri}/{mark}") for mark in ZARR_MARKS):
        return {}
    # A key with ".." could lead out of the folder.
    names = [name for name in storage.file_sizes(uri) if ".." not in name.split("/")]
    with ThreadPoolExecutor(COPIED_AT_ONCE) as threads:
        described = list(threads.map(storage.find_object, [f"{uri}/{name}" for name in names]))
    return {name: found for name, found in zip(names, described, strict=True) if found is not None}


@contextmanager
def _copied(uri: str, objects: dict[str, S3Object], storage: Storage, place: Path, copy: Path) -> Iterator[None]:
    whole = place / "whole"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_name(f"{place.name}.lock").open("w")
    except OSError as error:
        raise _not_copied(uri, place, error) from error
    with lock:
        # Readers share the lock; whoever copies or removes has it alone. Between two locks, another one may remove.
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not whole.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not whole.exists():
                    _copy(uri, objects, storage, place, copy)
                    whole.touch()
            except OSError as error:
                shutil.rmtree(place, ignore_errors=True)
                raise _not_copied(uri, place, error) from error
            fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)


def _copy(uri: str, objects: dict[str, S3Object], storage: Storage, place: Path, copy: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    needed, free = sum(found.size for found in objects.values()), shutil.disk_usage(place.parent).free
    if free < needed:
        raise UserError(
            f"{uri} has {needed / 2**30:,.1f} GiB, and {place.parent} has {free / 2**30:,.1f} GiB free; expected space "
            "for a copy: free space there, or set CENSUS_TF_CACHE to another folder."
        )

    def download(name: str) -> None:
        target = copy / name if name else copy
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.download(f"{uri}/{name}" if name else uri, target, objects[name])

    with ThreadPoolExecutor(COPIED_AT_ONCE) as threads:
        list(threads.map(download, objects))


def _not_copied(uri: str, place: Path, error: OSError) -> UserError:
    return UserError(
        f"{uri} cannot be copied to {place.parent} ({error}); expected a writable folder with space: free space there, "
        "or set CENSUS_TF_CACHE to another folder."
    )
