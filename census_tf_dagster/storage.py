"""Files and arrays at one kind of place: a local folder or an S3 prefix, through TileDB's VFS.

Holds what the Census side and the store side share: S3 settings and small whole-file reads and writes.
Knows nothing of arrays' contents.
"""

import io
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import boto3
import tiledb
import tiledbsoma

from census_tf_dagster.errors import UserError
from census_tf_dagster.names import is_local


@dataclass(frozen=True)
class S3Settings:
    """How to reach S3; credentials come from the environment or the role, never from here.

    Attributes
    ----------
    region
        AWS region of the bucket; empty: as the environment says.
    endpoint
        ``http(s)://host:port`` of an S3-compatible server; empty: AWS.
    anonymous
        Send unsigned requests (the public Census).
    """

    region: str = ""
    endpoint: str = ""
    anonymous: bool = False

    def tiledb_config(self) -> dict[str, str]:
        """Return these settings as TileDB configuration keys."""
        config: dict[str, str] = {}
        if self.region:
            config["vfs.s3.region"] = self.region
        if self.endpoint:
            parsed = urlparse(self.endpoint)
            if parsed.scheme not in ("http", "https") or not parsed.netloc:
                raise UserError(f"S3 endpoint {self.endpoint!r}: expected http://host:port or https://host:port.")
            config["vfs.s3.endpoint_override"] = parsed.netloc
            config["vfs.s3.scheme"] = parsed.scheme
            config["vfs.s3.use_virtual_addressing"] = "false"
        if self.anonymous:
            config["vfs.s3.no_sign_request"] = "true"
        return config


READ_BUFFER_BYTES = 128 * 2**20
"""Per-column read buffer. The library's default of 1 GiB a column lets memory grow to several GB."""


UNCHECKED_WRITES = dict.fromkeys(("sm.check_coord_dups", "sm.check_coord_oob", "sm.check_global_order"), "false")
"""TileDB's own checks of each coordinate cost a third of a write; `EmbeddingsArray.write` checks beforehand."""


class Storage:
    """Access to one place with one set of S3 settings.

    Parameters
    ----------
    s3
        How S3 is reached; has no effect on local paths.
    """

    def __init__(self, s3: S3Settings | None = None) -> None:
        self.s3 = s3 or S3Settings()
        config = self.s3.tiledb_config()
        self.tiledb_ctx = tiledb.Ctx(config)
        # One for all openings (each has thread pools of its own); without a timestamp of its own, every opening
        # sees what was committed before it.
        self.soma_context = tiledbsoma.SOMATileDBContext(
            tiledb_config={**config, "soma.init_buffer_bytes": str(READ_BUFFER_BYTES), **UNCHECKED_WRITES}
        )
        self._vfs = tiledb.VFS(ctx=self.tiledb_ctx)

    def exists(self, uri: str) -> bool:
        """Tell whether a file stands at `uri`."""
        return bool(self._vfs.is_file(uri))

    def is_folder(self, uri: str) -> bool:
        """Tell whether a folder (or a prefix with objects below it) stands at `uri`."""
        return bool(self._vfs.is_dir(uri))

    def holds_files(self, uri: str) -> bool:
        """Tell whether a file stands at any depth below `uri`; on S3 there are no folders without one."""
        if not is_local(uri):
            return self.is_folder(uri)
        return any(files for _, _, files in os.walk(_path(uri)))

    def list(self, uri: str) -> list[str]:
        """Return the URIs of the entries directly below the folder `uri`, sorted."""
        return sorted(self._vfs.ls(uri)) if self.is_folder(uri) else []

    def size(self, uri: str) -> int:
        """Return the bytes of all files below the folder `uri`."""
        return int(self._vfs.dir_size(uri))

    def remove_folder(self, uri: str) -> None:
        """Delete the folder `uri` and all below it."""
        self._vfs.remove_dir(uri)

    def remove_empty_folders(self, uri: str) -> None:
        """Delete the local folder `uri` and all below it, each only while nothing is in it.

        Raises
        ------
        OSError
            When something is in one of them.
        """
        if is_local(uri):
            for folder, _, _ in os.walk(_path(uri), topdown=False):
                Path(folder).rmdir()

    def read(self, uri: str) -> bytes:
        """Return the whole content of a file.

        Raises
        ------
        UserError
            When nothing stands there.
        """
        if not self.exists(uri):
            raise UserError(f"no file at {uri}.")
        with self._vfs.open(uri, "rb") as file:
            return bytes(file.read())

    def open(self, uri: str) -> io.BufferedReader:
        """Open a file for seeking reads."""
        return io.BufferedReader(self._vfs.open(uri, "rb"), buffer_size=2**20)

    def write(self, uri: str, content: bytes) -> None:
        """Replace the file at `uri` as a whole: a reader sees the old or the new one, never a part."""
        if is_local(uri):
            path = _path(uri)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            try:
                partial.write_bytes(content)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        else:
            # One PutObject. TileDB's VFS deletes the old object first and leaves an empty one when interrupted.
            bucket, _, key = uri.removeprefix("s3://").partition("/")
            client = boto3.client("s3", region_name=self.s3.region or None, endpoint_url=self.s3.endpoint or None)
            client.put_object(Bucket=bucket, Key=key, Body=content)

    def download(self, uri: str, path: Path) -> None:
        """Copy a file to the local `path`, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with self._vfs.open(uri, "rb") as source, partial.open("wb") as target:
                while block := source.read(32 * 2**20):
                    target.write(block)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _path(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))
