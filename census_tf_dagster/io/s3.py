"""Reaches S3: settings, retries, and reads and writes of whole objects.

TileDB reads and writes arrays on S3 itself, with the configuration from here. Code that works for local paths, too,
belongs in `storage`.
"""

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

from census_tf_dagster.errors import StoreError, UserError
from census_tf_dagster.io.proxies import proxy_for, tiledb_proxy

PATIENCE = {
    # Number of tries of a failing request (500, reset, time-out, refused), with doubling pauses of 51 s in all.
    # If S3 asks to slow down, TileDB tries for 150 s. Then the operation fails.
    "vfs.s3.connect_max_tries": "11",
    # TileDB's default of 3 s gives up on an answer that is only slow.
    "vfs.s3.request_timeout_ms": "5000",
}
"""TileDB's configuration of how long it waits for S3 (docs/operate.md explains the consequences)."""
OBJECT_PATIENCE: dict[str, Any] = {
    "retries": {"mode": "standard", "total_max_attempts": 10},
    "connect_timeout": 10,
    "read_timeout": 10,
}
"""boto3's configuration for whole objects: pauses of up to 20 s, a minute or two in all."""


@dataclass(frozen=True)
class S3Settings:
    """How to reach S3. Credentials come from the environment or the role, never from here.

    Attributes
    ----------
    region
        AWS region of the bucket; empty: the one of the environment.
    endpoint
        ``http(s)://host:port`` of an S3-compatible server; empty: AWS.
    anonymous
        Whether to send unsigned requests, as for the public Census.
    """

    region: str = ""
    endpoint: str = ""
    anonymous: bool = False

    @property
    def address(self) -> str:
        """URL of the server, which decides about the proxy."""
        return self.endpoint or f"https://s3.{self.region or 'us-east-1'}.amazonaws.com"

    def proxies(self) -> dict[str, str]:
        """Return the proxy in boto3's form. Without this, boto3 would use a proxy even for this machine itself."""
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
                raise UserError(
                    f"the S3 endpoint is {self.endpoint!r}; expected http://host:port or https://host:port: correct "
                    "the endpoint."
                )
            config["vfs.s3.endpoint_override"] = parsed.netloc
            config["vfs.s3.scheme"] = parsed.scheme
            config["vfs.s3.use_virtual_addressing"] = "false"
        if self.anonymous:
            config["vfs.s3.no_sign_request"] = "true"
        return config | tiledb_proxy(self.address)


@dataclass(frozen=True)
class S3Object:
    """One version of an object, as S3 describes it.

    Attributes
    ----------
    size
        Size in bytes.
    etag
        S3's tag, which differs if the content differs.
    etag_is_md5
        Whether the tag is the MD5 of the content or of its parts' MD5s. It is not for an object encrypted by KMS.
    """

    size: int
    etag: str
    etag_is_md5: bool


_AGAIN = "run this again."
_REFUSED_KEYS = ("ExpiredToken", "400")
"""S3's codes when keys have expired. The answer to a HEAD request has no body, so boto3 only knows its status."""

ARCHIVE_CLASS = "GLACIER_IR"
"""S3's storage class for objects that are read about once a quarter: much cheaper, and readable within milliseconds."""


@dataclass(frozen=True)
class StoredObject:
    """An object in a listing of S3.

    Attributes
    ----------
    bucket, key
        Its name.
    size
        Size in bytes.
    written
        Time of its last write, in seconds since 1970.
    archived
        Whether it is in the storage class of `ARCHIVE_CLASS`.
    """

    bucket: str
    key: str
    size: int
    written: float
    archived: bool


class S3Objects:
    """Reads and replaces whole objects in one request each.

    TileDB's file layer is not used for them, because it deletes an object before it replaces it. Listings omit empty
    objects whose name ends in ``/``. The S3 console makes them to show a folder.
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
        """Tell whether there is an object at `uri`."""
        bucket, key = _split(uri)
        return self._ask(uri, lambda: self._client.head_object(Bucket=bucket, Key=key)) is not None

    def find(self, uri: str) -> S3Object | None:
        """Return S3's description of the object at `uri`; None if there is none."""
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
        """Copy an object to `path`, several parts at once, and verify the copy.

        Raises
        ------
        StoreError
            When the object at `uri` is no longer the `expected` one, or the copy has another size or MD5.
        """
        bucket, key = _split(uri)
        self._ask(uri, lambda: self._client.download_file(bucket, key, str(path)))
        if self.find(uri) != expected:
            raise StoreError(f"{uri} changed while it was fetched; expected the version {expected.etag}: {_AGAIN}")
        size = path.stat().st_size
        if size != expected.size:
            raise StoreError(f"{uri}: {size} bytes came; expected {expected.size}, as S3 states: {_AGAIN}")
        if (part := self._part_size(uri, expected)) is None:
            return
        md5 = _etag_of(path, part, in_parts="-" in expected.etag)
        if md5 != expected.etag:
            raise StoreError(f"{uri}: the copy has the MD5 {md5}; expected {expected.etag}, as S3 states: {_AGAIN}")

    def _part_size(self, uri: str, found: S3Object) -> int | None:
        """Return the bytes of each part whose MD5 is in the ETag; None if it has no MD5 or parts differ in size."""
        if not found.etag_is_md5:
            return None
        _, in_parts, parts = found.etag.partition("-")
        if not in_parts:
            return max(found.size, 1)
        bucket, key = _split(uri)
        head = self._ask(uri, lambda: self._client.head_object(Bucket=bucket, Key=key, PartNumber=1))
        size = int(head["ContentLength"]) if head else 0
        return size if size and math.ceil(found.size / size) == int(parts) else None

    def any_below(self, uri: str) -> bool:
        """Tell whether there is an object below the prefix `uri`; False if there is no such bucket."""
        return next(self.below(uri), None) is not None

    def named_below(self, uri: str) -> dict[str, StoredObject]:
        """Return the objects below the prefix `uri`, by their names relative to `uri`."""
        start = len(_prefix(uri))
        return {stored.key[start:]: stored for stored in self.below(uri)}

    def entries(self, uri: str) -> set[str]:
        """Return the names of objects and prefixes directly below the prefix `uri`."""
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
        """Yield the pages of the listing below the prefix `uri`; none if there is no such bucket."""
        bucket, _ = _split(uri)
        request = {"Bucket": bucket, "Prefix": _prefix(uri), **more}
        while (page := self._ask(uri, lambda: self._client.list_objects_v2(**request))) is not None:
            yield page
            if not page["IsTruncated"]:
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, uri: str) -> bytes | None:
        """Return an object's content; None if there is no such object."""
        bucket, key = _split(uri)
        content = self._ask(uri, lambda: self._client.get_object(Bucket=bucket, Key=key)["Body"].read())
        return None if content is None else bytes(content)

    def write(self, uri: str, content: bytes) -> None:
        """Replace an object. A reader sees the old or the new one.

        Raises
        ------
        UserError
            When writing is not allowed, or there is no such bucket.
        """
        bucket, key = _split(uri)
        if self._ask(uri, lambda: self._client.put_object(Bucket=bucket, Key=key, Body=content)) is None:
            raise UserError(
                f"there is no bucket {bucket!r} for {uri}; expected it to exist: create it, or correct the address."
            )

    def archive(self, stored: StoredObject) -> None:
        """Copy an object onto itself in the storage class of `ARCHIVE_CLASS`. Readers see it all the time."""
        source = {"Bucket": stored.bucket, "Key": stored.key}
        # A plain copy_object is limited to 5 GB.
        extra = {"StorageClass": ARCHIVE_CLASS, "MetadataDirective": "COPY"}
        uri = f"s3://{stored.bucket}/{stored.key}"
        self._ask(uri, lambda: self._client.copy(source, stored.bucket, stored.key, ExtraArgs=extra))

    def upload(self, uri: str, path: Path) -> None:
        """Replace an object by a file's content, in parts. A reader sees the old or the new one.

        Raises
        ------
        StoreError
            When the store stays unreachable.
        """
        bucket, key = _split(uri)
        self._ask(uri, lambda: self._client.upload_file(str(path), bucket, key))

    def make_bucket(self, uri: str) -> None:
        """Create the bucket of `uri` if it does not exist.

        Raises
        ------
        UserError
            When it cannot be created.
        """
        bucket, _ = _split(uri)
        if self._ask(uri, lambda: self._client.head_bucket(Bucket=bucket)) is not None:
            return
        region = self._client.meta.region_name
        # For its first region, S3 expects no location.
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            self._client.create_bucket(Bucket=bucket, **where)
        except (ClientError, BotoCoreError) as error:
            raise UserError(
                f"there is no bucket {bucket!r} for {uri}, and it cannot be created ({error}). Expected a bucket: "
                "create it, or correct the address."
            ) from error

    def _ask(self, uri: str, request: Callable[[], Any]) -> Any:
        """Return the answer to a request; None if the requested object or bucket does not exist."""
        try:
            return request()
        except ClientError as error:
            if error.response["Error"]["Code"] in _REFUSED_KEYS:
                raise UserError(
                    f"S3 refuses the AWS keys of this environment at {uri} ({error}). Expected keys that have not "
                    "expired, and the bucket's region: use a role, whose keys are renewed, or set new keys."
                ) from error
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == HTTPStatus.NOT_FOUND:
                return None
            if status == HTTPStatus.FORBIDDEN:
                who = "without credentials" if self._settings.anonymous else "with the credentials of this environment"
                raise UserError(
                    f"access to {uri} is denied {who} ({error}). Expected access: give this environment's role or AWS "
                    "keys the permission."
                ) from error
            raise StoreError(f"{uri} cannot be reached: {error}") from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise UserError(
                f"there are no credentials for {uri}; expected a role or AWS keys: give this environment one of them."
            ) from error
        except (BotoCoreError, Boto3Error) as error:
            raise StoreError(f"{uri} cannot be reached: {error}") from error


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _prefix(uri: str) -> str:
    """Return the prefix of the keys of all objects below `uri`."""
    _, key = _split(uri)
    return f"{key.rstrip('/')}/" if key else ""


def _is_marker(listed: Mapping[str, Any]) -> bool:
    """Tell whether a listed object only marks a folder."""
    return listed["Key"].endswith("/") and not listed["Size"]


def _etag_of(path: Path, part_size: int, *, in_parts: bool) -> str:
    """Compute the ETag that S3 gives to a file that was uploaded at once or in parts."""
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
