"""Keeps prepared checkpoints and compiled kernels on local disk; builds a missing or damaged checkpoint.

Two checks guarantee that a device loads what the fingerprint identifies:

- Before it builds, `prepare` reads all files of the checkpoint again and compares fingerprints. That takes 2 seconds
  per GiB, once per precision and machine. It also finds copies whose remembered digest is out of date (`digests`,
  `fetch`).
- A prepared file contains a digest of its own bytes (`seal`). `prepare` and each device's process check it before they
  use the file, which takes 0.2 seconds per GiB. A damaged file is built again.

This module imports torch only to build. Reading a prepared file belongs in `prepared_checkpoint`.
"""

import os
from contextlib import ExitStack
from pathlib import Path

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import WEIGHTS, Checkpoint, read_checkpoint
from census_tf_dagster.inference.digests import forget
from census_tf_dagster.inference.sealed_file import is_sealed, seal
from census_tf_dagster.io.files import one_at_a_time, replacing

FORMAT = 2
"""Version of the content of prepared files. Increase it when that content changes."""


def prepare(checkpoint: Checkpoint, precision: str, cache: Path) -> Path:
    """Return the prepared file of a checkpoint; build it if it is damaged or not in `cache`, one process at a time.

    Parameters
    ----------
    checkpoint
        The checkpoint to prepare; its fingerprint is in the file's name.
    precision
        Precision of weights and activations: ``fp32``, ``fp16`` or ``bf16``.
    cache
        Local folder.

    Raises
    ------
    UserError
        When the checkpoint's files have changed since they were read, a weight is out of the range of `precision`, or
        `cache` cannot be written.
    """
    path = cache / "prepared" / f"{checkpoint.fingerprint}-{precision}-{FORMAT}.safetensors"
    if is_sealed(path):
        return path
    with ExitStack() as stack:
        # The other shards of a node wait for the one that builds.
        try:
            stack.enter_context(one_at_a_time(cache / "locks" / f"{path.stem}.lock"))
        except OSError as error:
            raise _not_writable(cache, error) from error
        if is_sealed(path):
            return path
        _require_unchanged(checkpoint, cache)
        from census_tf_dagster.inference.weights import write_prepared

        try:
            with replacing(path) as partial:
                write_prepared(checkpoint, precision, partial)
                seal(partial)
        except OSError as error:
            raise _not_writable(cache, error) from error
    return path


def kernel_folders(prepared: Path) -> dict[str, str]:
    """Return the variables that make torch keep compiled kernels in the cache of a prepared file.

    All processes and runs that share the cache then compile once. Empty if this process cannot write there; torch then
    keeps them in the folder of temporary files.
    """
    cache = prepared.parents[1]
    if not os.access(cache, os.W_OK):
        return {}
    return {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}


def _not_writable(cache: Path, error: OSError) -> UserError:
    return UserError(
        f"the prepared checkpoint cannot be written below {cache} ({error}). Expected a writable local folder with "
        "enough space: free space there, or set CENSUS_TF_CACHE to another folder."
    )


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
            f"{checkpoint.folder} has the fingerprint {again}; expected {checkpoint.fingerprint}, as when it was last "
            "read. Its files were changed or damaged since. Run this again: it fetches a copy from S3 anew. Get a "
            "local checkpoint from its publisher again."
        )
