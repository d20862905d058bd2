"""S3: how it is reached, how long it is tried, and whole objects in it. Arrays in it are TileDB's."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import boto3
from boto3.exceptions import Boto3Error
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.proxies import proxy_for, tiledb_proxy

PATIENCE = {
    # Tries of a request that fails (500, reset, time-out, refused), with doubling pauses: 51 s of pauses in all.
    # Where S3 asks to slow down, TileDB tries for 150 s. Then the operation fails.
    "vfs.s3.connect_max_tries": "11",
    # Its default of 3 s gives up on an answer that only takes long.
    "vfs.s3.request_timeout_ms": "5000",
}
"""How long TileDB waits for S3, as its configuration (docs/operate.md has what that amounts to)."""
OBJECT_PATIENCE: dict[str, Any] = {
    "retries": {"mode": "standard", "total_max_attempts": 10},
    "connect_timeout": 10,
    "read_timeout": 10,
}
"""The same for whole objects, as boto3's configuration: pauses of up to 20 s, a minute or two in all."""


class StoreError(Exception):
    """The store stayed unreachable, or refused a write, for as long as it was tried."""


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

    @property
    def address(self) -> str:
        """URL of the server, by which a proxy is chosen."""
        return self.endpoint or f"https://s3.{self.region or 'us-east-1'}.amazonaws.com"

    def proxies(self) -> dict[str, str]:
        """Return the proxy as boto3 takes it, which would use one for this machine itself, too."""
        proxy = proxy_for(self.address)
        return {urlparse(self.address).scheme: proxy} if proxy else {}

    def tiledb_config(self) -> dict[str, str]:
        """Return these settings as TileDB configuration keys."""
        config = dict(PATIENCE)
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
        return config | tiledb_proxy(self.address)


@dataclass(frozen=True)
class S3Object:
    """What S3 says of one version of an object.

    Attributes
    ----------
    size
        Bytes.
    etag
        Differs when the content does.
    etag_is_md5
        It is the MD5 of the content, or of its parts' MD5s, which an object encrypted by KMS does not tell.
    """

    size: int
    etag: str
    etag_is_md5: bool


ARCHIVE_CLASS = "GLACIER_IR"
"""S3's class for what is read about once a quarter: a fraction of the price, still readable within milliseconds."""


@dataclass(frozen=True)
class StoredObject:
    """An object of S3.

    Attributes
    ----------
    bucket, key
        Its name.
    size
        Bytes.
    written
        When it was written, in seconds since 1970.
    archived
        Whether it is in the storage class of `ARCHIVE_CLASS`.
    """

    bucket: str
    key: str
    size: int
    written: float
    archived: bool


class S3Objects:
    """Whole objects: asked for, read and replaced in one request each.

    TileDB's file layer is not used for these: it deletes an object before it replaces it. No listing shows the empty
    objects with a name that ends in ``/``: the S3 console makes them so that a person sees a folder.
    """

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings

    @cached_property
    def _client(self) -> Any:
        signing = {"signature_version": UNSIGNED} if self._settings.anonymous else {}
        return boto3.client(
            "s3",
            region_name=self._settings.region or None,
            endpoint_url=self._settings.endpoint or None,
            config=Config(**OBJECT_PATIENCE, **signing, proxies=self._settings.proxies()),
        )

    def exists(self, uri: str) -> bool:
        """Tell whether an object stands at `uri`."""
        bucket, key = _split(uri)
        return self._ask(uri, lambda: self._client.head_object(Bucket=bucket, Key=key)) is not None

    def find(self, uri: str) -> S3Object | None:
        """Return what S3 says of the object at `uri`; None when there is none."""
        bucket, key = _split(uri)
        head = self._ask(uri, lambda: self._client.head_object(Bucket=bucket, Key=key))
        if head is None:
            return None
        etag = str(head["ETag"]).strip('"')
        is_md5 = bool(re.fullmatch("[0-9a-f]{32}(-[0-9]+)?", etag)) and "kms" not in head.get(
            "ServerSideEncryption", ""
        )
        return S3Object(int(head["ContentLength"]), etag, is_md5)

    def download(self, uri: str, path: Path, expected: S3Object) -> None:
        """Copy an object to `path`, its parts side by side, and verify what came.

        Raises
        ------
        StoreError
            When the object at `uri` is not the `expected` one any more, or its size or MD5 is another.
        """
        bucket, key = _split(uri)
        self._ask(uri, lambda: self._client.download_file(bucket, key, str(path)))
        if self.find(uri) != expected:
            raise StoreError(f"{uri} changed while it was fetched; expected the version {expected.etag}.")
        size = path.stat().st_size
        if size != expected.size:
            raise StoreError(f"{uri}: {size} bytes came, and S3 says it holds {expected.size}.")
        if (part := self._part_size(uri, expected)) is None:
            return
        md5 = _etag_of(path, part, in_parts="-" in expected.etag)
        if md5 != expected.etag:
            raise StoreError(f"{uri}: what came has the MD5 {md5}, and S3 says it holds {expected.etag}.")

    def _part_size(self, uri: str, of: S3Object) -> int | None:
        """Return of how many bytes an ETag is an MD5 each; None when it is none, or parts are of several sizes."""
        if not of.etag_is_md5:
            return None
        _, in_parts, parts = of.etag.partition("-")
        if not in_parts:
            return max(of.size, 1)
        bucket, key = _split(uri)
        head = self._ask(uri, lambda: self._client.head_object(Bucket=bucket, Key=key, PartNumber=1))
        size = int(head["ContentLength"]) if head else 0
        return size if size and math.ceil(of.size / size) == int(parts) else None

    def any_below(self, uri: str) -> bool:
        """Tell whether there is an object below the prefix `uri`; not when there is no such bucket."""
        return next(self.below(uri), None) is not None

    def list_below(self, uri: str) -> dict[str, int]:
        """Return the size in bytes of each object below the prefix `uri`, by its name from there on."""
        start = len(_prefix(uri))
        return {one.key[start:]: one.size for one in self.below(uri)}

    def entries(self, uri: str) -> set[str]:
        """Return the names directly below the prefix `uri`: of objects, and of prefixes of further ones."""
        start = len(_prefix(uri))
        names = set()
        for page in self._pages(uri, Delimiter="/"):
            names |= {one["Key"][start:] for one in page.get("Contents", ()) if not _is_marker(one)}
            names |= {one["Prefix"][start:].rstrip("/") for one in page.get("CommonPrefixes", ())}
        return names - {""}

    def below(self, uri: str) -> Iterator[StoredObject]:
        """Yield the objects below the prefix `uri`."""
        bucket, _ = _split(uri)
        for page in self._pages(uri):
            for one in page.get("Contents", ()):
                if not _is_marker(one):
                    archived = one.get("StorageClass") == ARCHIVE_CLASS
                    written = one["LastModified"].timestamp()
                    yield StoredObject(bucket, one["Key"], int(one["Size"]), written, archived)

    def _pages(self, uri: str, **more: str) -> Iterator[Any]:
        """Yield the pages of the listing below the prefix `uri`; none when there is no such bucket."""
        bucket, _ = _split(uri)
        request = {"Bucket": bucket, "Prefix": _prefix(uri), **more}
        while (page := self._ask(uri, lambda: self._client.list_objects_v2(**request))) is not None:
            yield page
            if not page["IsTruncated"]:
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, uri: str) -> bytes | None:
        """Return an object's content; None when there is none."""
        bucket, key = _split(uri)
        content = self._ask(uri, lambda: self._client.get_object(Bucket=bucket, Key=key)["Body"].read())
        return None if content is None else bytes(content)

    def write(self, uri: str, content: bytes) -> None:
        """Replace an object: a reader sees the old or the new one.

        Raises
        ------
        UserError
            When it may not be written, or there is no such bucket.
        """
        bucket, key = _split(uri)
        if self._ask(uri, lambda: self._client.put_object(Bucket=bucket, Key=key, Body=content)) is None:
            raise UserError(f"there is no bucket {bucket!r} for {uri}.")

    def archive(self, one: StoredObject) -> None:
        """Copy an object onto itself in the storage class of `ARCHIVE_CLASS`; a reader sees it all the time."""
        source = {"Bucket": one.bucket, "Key": one.key}
        # Not a plain copy_object: that ends at 5 GB.
        extra = {"StorageClass": ARCHIVE_CLASS, "MetadataDirective": "COPY"}
        uri = f"s3://{one.bucket}/{one.key}"
        self._ask(uri, lambda: self._client.copy(source, one.bucket, one.key, ExtraArgs=extra))

    def upload(self, uri: str, path: Path) -> None:
        """Replace an object by a file's content, in parts: a reader sees the old or the new one.

        Raises
        ------
        StoreError
            When the store stays unreachable.
        """
        bucket, key = _split(uri)
        self._ask(uri, lambda: self._client.upload_file(str(path), bucket, key))

    def make_bucket(self, uri: str) -> None:
        """Make the bucket of `uri` when there is none.

        Raises
        ------
        UserError
            When it cannot be made.
        """
        bucket, _ = _split(uri)
        if self._ask(uri, lambda: self._client.head_bucket(Bucket=bucket)) is not None:
            return
        region = self._client.meta.region_name
        # S3 names its first region by leaving it out.
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            self._client.create_bucket(Bucket=bucket, **where)
        except (ClientError, BotoCoreError) as error:
            raise UserError(f"there is no bucket {bucket!r} for {uri}, and it cannot be made: {error}") from error

    def _ask(self, uri: str, request: Callable[[], Any]) -> Any:
        """Return the answer to a request; None when what it asks for does not exist."""
        try:
            return request()
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == HTTPStatus.NOT_FOUND:
                return None
            if status == HTTPStatus.FORBIDDEN:
                who = "without credentials" if self._settings.anonymous else "with the credentials found here"
                raise UserError(f"access to {uri} is denied {who}: {error}") from error
            raise StoreError(f"{uri} cannot be reached: {error}") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise UserError(f"there are no credentials for {uri}: give this environment a role or AWS keys.") from error
        except (BotoCoreError, Boto3Error) as error:
            raise StoreError(f"{uri} cannot be reached: {error}") from error


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _prefix(uri: str) -> str:
    """Return how the keys of all objects below `uri` begin."""
    _, key = _split(uri)
    return f"{key.rstrip('/')}/" if key else ""


def _is_marker(listed: Mapping[str, Any]) -> bool:
    """Tell whether a listed object only marks a folder."""
    return listed["Key"].endswith("/") and not listed["Size"]


def _etag_of(path: Path, part_size: int, *, in_parts: bool) -> str:
    """Work out the ETag that S3 gives to a file, uploaded whole or in parts."""
    digests = []
    with path.open("rb") as file:
        for _ in range(0, max(path.stat().st_size, 1), part_size):
            digest = hashlib.md5(usedforsecurity=False)
            left = part_size
            while left and (block := file.read(min(left, 2**20))):
                digest.update(block)
                left -= len(block)
            digests.append(digest)
    if not in_parts:
        return digests[0].hexdigest()
    whole = hashlib.md5(b"".join(digest.digest() for digest in digests), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(digests)}"
