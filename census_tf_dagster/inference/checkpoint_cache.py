"""Where a prepared checkpoint lies: built once from upstream's folder, kept on local disk.

What is prepared is what the fingerprint says, and what is loaded is what was prepared:

- before it builds, `prepare` reads all of the checkpoint's files again and compares fingerprints. That takes 2 seconds
  for each GiB, once for each precision and machine, and covers copies whose remembered digest is out of date
  (`digests`, `fetch`);
- a prepared file carries a digest of its own bytes (`seal`), which `prepare` and each device's process check before
  they use it: a tenth of a second for each GiB. A damaged file is built again.

Imports torch to build only.
"""

from pathlib import Path

from safetensors import SafetensorError

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import WEIGHTS, Checkpoint, read_checkpoint
from census_tf_dagster.inference.digests import forget
from census_tf_dagster.inference.sealed_file import is_sealed, seal
from census_tf_dagster.io.files import replacing

FORMAT = 2
"""Raised when what is in a prepared file changes."""


def prepare(checkpoint: Checkpoint, precision: str, cache: Path) -> Path:
    """Return the prepared file of a checkpoint; build it when it is not in `cache`, or damaged.

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
        When the checkpoint's files are not what they were when they were read, a weight is out of the range of
        `precision`, or `cache` cannot be written.
    """
    path = cache / "prepared" / f"{checkpoint.fingerprint}-{precision}-{FORMAT}.safetensors"
    if is_sealed(path):
        return path
    _require_unchanged(checkpoint, cache)
    from census_tf_dagster.inference.weights import write_prepared

    try:
        with replacing(path) as partial:
            write_prepared(checkpoint, precision, partial)
            seal(partial)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the prepared checkpoint cannot be written below {cache} ({error}): free space there, or set "
            "CENSUS_TF_CACHE to another local folder that can be written."
        ) from error
    return path


def _require_unchanged(checkpoint: Checkpoint, cache: Path) -> None:
    again = ""
    try:
        again = read_checkpoint(checkpoint.folder, checkpoint.pretrained).fingerprint
    finally:
        if again != checkpoint.fingerprint:
            for path in (checkpoint.folder / WEIGHTS, *checkpoint.pretrained):
                forget(path, cache)
    if again != checkpoint.fingerprint:
        raise UserError(
            f"{checkpoint.folder} has the fingerprint {again}, and had {checkpoint.fingerprint} when it was last read: "
            "its files were changed or damaged since. Run this again: a copy from S3 is then fetched anew; get a local "
            "checkpoint from its publisher again."
        )
