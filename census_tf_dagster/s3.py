"""S3: how it is reached, how long it is tried, and whole objects in it. Arrays in it are TileDB's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import boto3
from boto3.exceptions import S3UploadFailedError
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from census_tf_dagster.errors import UserError

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
        return config


class S3Objects:
    """Whole objects: asked for, read and replaced in one request each.

    TileDB's file layer is not used for these: it deletes an object before it replaces it.
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
            config=Config(**OBJECT_PATIENCE, **signing),
        )

    def exists(self, uri: str) -> bool:
        """Tell whether an object stands at `uri`."""
        bucket, key = _split(uri)
        return self._ask(uri, lambda: self._client.head_object(Bucket=bucket, Key=key)) is not None

    def any_below(self, uri: str) -> bool:
        """Tell whether an object stands below the prefix `uri`; not when there is no such bucket."""
        bucket, key = _split(uri)
        prefix = f"{key.rstrip('/')}/" if key else ""
        found = self._ask(uri, lambda: self._client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1))
        return found is not None and bool(found["KeyCount"])

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

    def upload(self, uri: str, path: Path) -> None:
        """Replace an object by a file's content, in parts: a reader sees the old or the new one.

        Raises
        ------
        StoreError
            When the store stays unreachable.
        """
        bucket, key = _split(uri)
        try:
            self._ask(uri, lambda: self._client.upload_file(str(path), bucket, key))
        except S3UploadFailedError as error:
            raise StoreError(f"{uri} cannot be written: {error}") from error

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
        except BotoCoreError as error:
            raise StoreError(f"{uri} cannot be reached: {error}") from error


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
