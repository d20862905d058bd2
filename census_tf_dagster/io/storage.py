"""Reads and writes files below a local folder or an S3 prefix, and configures TileDB for both.

The Census side and the store side share it: TileDB's contexts, and reads and writes of small whole files. The content
of arrays belongs in `census` and `store`.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

import tiledb
import tiledbsoma

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.files import replacing, temporary_folder
from census_tf_dagster.io.names import is_local
from census_tf_dagster.io.s3 import S3Object, S3Objects, S3Settings

READ_BUFFER_BYTES = 128 * 2**20
"""Read buffer per column. The library's default of 1 GiB per column lets memory grow to several GB."""

NO_PARALLEL_MERGE = {"sm.query.sparse_global_order.preprocess_tile_merge": "0"}
"""Switches off TileDB's parallel tile merge. TileDB 2.30 may free a merge's memory while a thread still uses it, which
kills the process under load (TileDB pull request 5723). Drop this setting with a TileDB that has the fix."""

MANY_AT_ONCE = {"sm.compute_concurrency_level": "32"}
"""Number of TileDB's compute threads. They request each fragment's metadata and mostly wait for S3, so the default of
one per core is too small."""

UNCHECKED_WRITES = dict.fromkeys(("sm.check_coord_dups", "sm.check_coord_oob", "sm.check_global_order"), "false")
"""Switches off TileDB's checks of each coordinate, which take a third of a write. `EmbeddingsArray` checks before."""


WRITABLE = "make the store writable, and free space where its disk is full"
SIGNS_OF_LACK = ("std::bad_alloc", "Error initializing thread pool")
"""Texts in TileDB's errors when the system gives it no memory, or no memory for threads."""


FAR_FUTURE = 2**62
"""TileDB timestamp (milliseconds) that is later than any clock's."""


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes, and time of the last write in seconds since 1970."""

    size: int
    written: float


class Storage:
    """Access to files with one set of S3 settings.

    Parameters
    ----------
    s3
        Settings to reach S3. They have no effect on local paths.
    """

    def __init__(self, s3: S3Settings | None = None) -> None:
        self.s3 = s3 or S3Settings()
        config = {**self.s3.tiledb_config(), **NO_PARALLEL_MERGE, **MANY_AT_ONCE}
        with naming_lack_of_memory():
            self.tiledb_ctx = tiledb.Ctx(config)
        # All openings share one context, because each context has its own thread pools. It has no timestamp, so every
        # opening sees everything that was committed before it.
        self._soma_config: dict[str, str | float] = {
            **config,
            "soma.init_buffer_bytes": str(READ_BUFFER_BYTES),
            **UNCHECKED_WRITES,
        }
        self.soma_context = tiledbsoma.SOMATileDBContext(tiledb_config=self._soma_config)
        self._vfs = tiledb.VFS(ctx=self.tiledb_ctx)
        self._objects = S3Objects(self.s3)

    @cached_property
    def soma_context_of_the_future(self) -> tiledbsoma.SOMATileDBContext:
        """A context that shows everything that was written, even if this machine's clock is behind the writer's."""
        # In tiledbsoma 2.3.0, `replace` would lose the configuration.
        return tiledbsoma.SOMATileDBContext(tiledb_config=self._soma_config, timestamp=FAR_FUTURE)

    def make_place(self, uri: str) -> None:
        """Create the bucket of an S3 `uri` if it does not exist. Folders are created with the files in them.

        Raises
        ------
        UserError
            When the bucket cannot be created.
        """
        if not is_local(uri):
            self._objects.make_bucket(uri)

    def storage_version(self, uri: str) -> int:
        """Return the TileDB storage version of the array at `uri`."""
        return int(tiledb.ArraySchema.load(uri, ctx=self.tiledb_ctx).version)

    def exists(self, uri: str) -> bool:
        """Tell whether there is a file at `uri`."""
        return _path(uri).is_file() if is_local(uri) else self._objects.exists(uri)

    def is_folder(self, uri: str) -> bool:
        """Tell whether there is a folder at `uri`; on S3, whether there are objects below that prefix."""
        return _path(uri).is_dir() if is_local(uri) else self._objects.any_below(uri)

    def holds_files(self, uri: str) -> bool:
        """Tell whether there is a file at any depth below `uri`. On S3, every folder has one."""
        if not is_local(uri):
            return self._objects.any_below(uri)
        return any(files for _, _, files in os.walk(_path(uri)))

    def list(self, uri: str) -> list[str]:
        """Return the URIs of the entries directly below the folder `uri`, sorted; none if there is no such folder."""
        if not is_local(uri):
            names = self._objects.entries(uri)
        else:
            names = {entry.name for entry in _path(uri).iterdir()} if self.is_folder(uri) else set()
        return [f"{uri.rstrip('/')}/{name}" for name in sorted(names)]

    def files(self, uri: str) -> dict[str, FileFacts]:
        """Return facts about each file at any depth below the folder `uri`, by relative path with ``/``."""
        if not is_local(uri):
            return {
                name: FileFacts(stored.size, stored.written) for name, stored in self._objects.named_below(uri).items()
            }
        root = _path(uri)
        found = {}
        for folder, _, names in os.walk(root):
            for file in (Path(folder) / name for name in names):
                # Another process may remove a file meanwhile.
                with suppress(FileNotFoundError):
                    stat = file.stat()
                    found[file.relative_to(root).as_posix()] = FileFacts(stat.st_size, stat.st_mtime)
        return found

    def file_sizes(self, uri: str) -> dict[str, int]:
        """Return the size in bytes of each file at any depth below the folder `uri`, by relative path with ``/``."""
        return {name: found.size for name, found in self.files(uri).items()}

    def size(self, uri: str) -> int:
        """Return the size in bytes of all files below the folder `uri`."""
        return int(self._vfs.dir_size(uri))

    def last_written(self, uri: str) -> float:
        """Return the time of the last write below the folder `uri`, in seconds since 1970; 0 for an empty folder."""
        return max((found.written for found in self.files(uri).values()), default=0.0)

    def is_archived(self, uri: str) -> bool:
        """Tell whether every object below the prefix `uri` is archived."""
        return not is_local(uri) and all(stored.archived for stored in self._objects.below(uri))

    def archive_folder(self, uri: str) -> None:
        """Move every object below the prefix `uri` to the storage class of `s3.ARCHIVE_CLASS`; names stay."""
        for stored in self._objects.below(uri):
            if not stored.archived:
                self._objects.archive(stored)

    def remove_folder(self, uri: str) -> None:
        """Delete the folder `uri` and everything below it.

        Raises
        ------
        UserError
            When deleting is not allowed.
        """
        try:
            self._vfs.remove_dir(uri)
        except tiledb.TileDBError as error:
            raise UserError(
                f"{uri} cannot be removed ({error}). Expected a writable folder: make it writable, and run this again."
            ) from error

    def remove_file(self, uri: str) -> None:
        """Delete the file `uri`."""
        self._vfs.remove_file(uri)

    def remove_empty_folders(self, uri: str) -> None:
        """Delete the local folder `uri` and all folders below it, if they are empty.

        Raises
        ------
        OSError
            When one of them has a file.
        """
        if is_local(uri):
            for folder, _, _ in os.walk(_path(uri), topdown=False):
                Path(folder).rmdir()

    def read(self, uri: str) -> bytes:
        """Return the whole content of a file.

        Raises
        ------
        UserError
            When there is no such file, or it cannot be read.
        """
        content = None
        if not is_local(uri):
            content = self._objects.read(uri)
        elif self.exists(uri):
            with _naming(uri, "read", "make it readable"):
                content = _path(uri).read_bytes()
        if content is None:
            raise UserError(f"there is no file at {uri}; expected one: correct the address, or make the file again.")
        return content

    def open(self, uri: str) -> io.BufferedReader:
        """Open a file for seeking reads.

        Raises
        ------
        FileNotFoundError, tiledb.TileDBError
            When there is no such file: the first for a local path, the second on S3.
        UserError
            When it cannot be read.
        """
        if not is_local(uri):
            return io.BufferedReader(self._vfs.open(uri, "rb"), buffer_size=2**20)
        # TileDB would sync a local file when it closes it, which fails on a read-only disk.
        with _naming(uri, "read", "make it readable"):
            return io.BufferedReader(io.FileIO(_path(uri)), buffer_size=2**20)

    def write(self, uri: str, content: bytes) -> None:
        """Replace the file at `uri` atomically: a reader sees the old or the new content, never a part.

        Raises
        ------
        UserError
            When writing is not allowed, or the disk is full.
        StoreError
            When S3 stays unreachable.
        """
        if not is_local(uri):
            self._objects.write(uri, content)
            return
        with _naming(uri, "written", WRITABLE), replacing(_path(uri)) as partial:
            partial.write_bytes(content)

    def find_object(self, uri: str) -> S3Object | None:
        """Return S3's description of the object at `uri`; None if there is none."""
        return self._objects.find(uri)

    @contextmanager
    def writing(self, uri: str) -> Iterator[IO[bytes]]:
        """Yield a file to write piece by piece; it replaces the one at `uri` when the block ends without error.

        Raises
        ------
        UserError
            When writing is not allowed, or the disk is full. For S3, this concerns the folder of temporary files.
        StoreError
            When S3 stays unreachable.
        """
        if is_local(uri):
            with _naming(uri, "written", WRITABLE), replacing(_path(uri)) as partial, partial.open("wb") as file:
                yield file
            return
        with temporary_folder() as folder:
            part = Path(folder) / "part"
            with (
                _naming(folder, "written", "free space there, or set TMPDIR to another folder"),
                part.open("wb") as file,
            ):
                yield file
            self._objects.upload(uri, part)

    def download(self, uri: str, path: Path, expected: S3Object) -> None:
        """Copy an object of S3 to the local `path`, atomically.

        Raises
        ------
        StoreError
            When the object is no longer the `expected` one, or the copy differs from what S3 states.
        """
        with replacing(path) as partial:
            self._objects.download(uri, partial, expected)


def is_lack_of_memory(error: Exception) -> bool:
    """Tell whether an error of TileDB or Python means that the system gave it no memory."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS_OF_LACK)


@contextmanager
def naming_lack_of_memory() -> Iterator[None]:
    """Replace the error of TileDB or Python that gets no memory by a clear message.

    Raises
    ------
    UserError
        When memory was missing. All other errors pass unchanged.
    """
    try:
        yield
    except (MemoryError, tiledb.TileDBError, tiledbsoma.SOMAError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise UserError(
            f"this process got no more memory ({str(error)[:200] or 'MemoryError'}). Expected enough for a megabatch: "
            "give the machine more, raise its limit (`ulimit -v`, `ulimit -u`, the container's memory), or set a "
            "smaller `megabatch_size` in the set's YAML."
        ) from error


@contextmanager
def _naming(uri: str, action: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{uri} cannot be {action} ({error.strerror or error}): {remedy}, and run this again."
        ) from error


def _path(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))
