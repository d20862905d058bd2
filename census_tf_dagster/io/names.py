"""Checks and normalises names, locations and addresses that users write."""

import re
from pathlib import Path

from census_tf_dagster.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")

LONGEST_LOCATION = 1024
"""Most characters of a location. It is S3's limit for a key."""

CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that no name, location or title may have: control characters, line breaks, halves of a UTF-16 pair."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_S3 = re.compile(r"s3://[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9](/[^/]+)*/*")


def require_name(name: str, what: str) -> str:
    """Return `name` if it can be a folder of the store and part of a partition key.

    Raises
    ------
    UserError
        When it cannot, because it could lead out of the store's folder.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"{what} {name!r} is not a valid name: expected letters, digits, '_', '-' and '.', not starting with '.'. "
            "Use another name."
        )
    return name


def check_location(text: str) -> None:
    """Raise an error if a text is neither a path of this machine nor an S3 prefix or object.

    Raises
    ------
    ValueError
        When it is neither. The message says what is wrong and what was expected; callers put the name and the value
        before it.
    """
    if not text:
        raise ValueError("It is empty. Expected a path, or s3://BUCKET/PREFIX")
    if len(text) > LONGEST_LOCATION:
        raise ValueError(f"It has {len(text)} characters. Expected at most {LONGEST_LOCATION}")
    if CONTROL_CHARACTERS.search(text):
        raise ValueError("It has a control character or line break. Expected a path, or s3://BUCKET/PREFIX")
    if text != text.strip():
        raise ValueError("It has a space at its start or end. Remove the space")
    if text.startswith("s3://"):
        if not _S3.fullmatch(text):
            raise ValueError(
                "Expected s3://BUCKET/PREFIX with a bucket's name of 3 to 63 characters, and single slashes"
            )
    elif text.lower().startswith("file:"):
        if not text.startswith("file:///"):
            raise ValueError("Expected a path, or file:/// followed by an absolute path")
    elif _SCHEME.match(text):
        raise ValueError("Expected a path, or s3://BUCKET/PREFIX with s3 in small letters and two slashes")
    elif text.startswith("~") and not _home_is_known(text):
        raise ValueError("The user after ~ is unknown on this machine. Write the whole path")


def require_location(text: str, what: str) -> str:
    """Return a location, normalised.

    Raises
    ------
    UserError
        When it is neither a path of this machine nor an S3 prefix or object.
    """
    try:
        check_location(text)
    except ValueError as error:
        raise UserError(f"{what} is {without_secrets(text)!r}. {error}.") from None
    return normalise(text)


def _home_is_known(path: str) -> bool:
    try:
        Path(path).expanduser()
    except RuntimeError:
        return False
    return True


def normalise(uri: str) -> str:
    """Return `uri` without a trailing slash; a local path becomes absolute."""
    if "://" not in uri:
        return str(Path(uri).expanduser().absolute())
    return uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Tell whether `uri` is a path of this machine's file system."""
    return "://" not in uri or uri.startswith("file://")


def without_secrets(address: str) -> str:
    """Return an address for an error message: without user and password, and without the part after ``?`` or ``#``."""
    bare = re.sub(r"(?s)^(\w+:/*)?.*@", lambda found: f"{found[1] or ''}***@", address)
    return re.sub(r"(?s)([?#]).*", r"\1***", bare)
