"""Names and locations as users write them: checked, and brought to one form."""

import re
from pathlib import Path

from census_tf_dagster.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def require_name(name: str, what: str) -> str:
    """Return `name` when it can be a folder of the store and part of a partition key.

    Raises
    ------
    UserError
        Otherwise: such a name could leave the store's folder.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"{what} {name!r}: expected letters, digits, '_', '-' and '.', not starting with '.'.")
    return name


def normalise(uri: str) -> str:
    """Return `uri` without a trailing slash, a local path as an absolute path."""
    if "://" not in uri:
        return str(Path(uri).expanduser().absolute())
    return uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Tell whether `uri` is a path of this machine's file system."""
    return "://" not in uri or uri.startswith("file://")
