"""Where a prepared checkpoint lies: built once from upstream's folder, kept on local disk.

Imports torch to build only.
"""

import uuid
from pathlib import Path

from safetensors import SafetensorError, safe_open

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import Checkpoint

FORMAT = 1
"""Raised when what is in a prepared file changes."""


def prepare(checkpoint: Checkpoint, precision: str, cache: Path) -> Path:
    """Return the prepared file of a checkpoint; build it when it is not in `cache`, or not whole.

    Parameters
    ----------
    checkpoint
        What to prepare; its fingerprint is in the file's name.
    precision
        ``fp32``, ``fp16`` or ``bf16``: of weights and activations.
    cache
        Local folder.

    Raises
    ------
    UserError
        When a weight is missing or has another shape than the configuration says, or `cache` cannot be written.
    """
    path = cache / "prepared" / f"{checkpoint.fingerprint}-{precision}-{FORMAT}.safetensors"
    if _is_whole(path):
        return path
    from census_tf_dagster.inference.weights import write_prepared

    partial = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_prepared(checkpoint, precision, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the prepared checkpoint cannot be written below {cache} ({error}): free space there, or set `cache` "
            "of the store resource to another local folder."
        ) from error
    return path


def _is_whole(path: Path) -> bool:
    try:
        # Opening compares the file's length with what its header says.
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False
