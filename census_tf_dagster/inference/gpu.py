"""The GPU that an engine computes on: which one it is, and what this machine must have before kernels can be built."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from census_tf_dagster.errors import UserError


def choose_device(device: str) -> torch.device:
    """Resolve the name of a device; a GPU's comes with its index, without which many of torch's functions refuse it.

    Parameters
    ----------
    device
        ``cuda`` (the first GPU), one of several as ``cuda:1``, or ``cpu``.

    Raises
    ------
    UserError
        When there is no such GPU: a job that needs one must not crawl on a CPU unnoticed.
    """
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"this set asks for a GPU (device: cuda) and this machine has none that torch can use{_why_none()}. Run it "
            "where one is, or set `device: cpu` in the set's YAML for a small trial."
        )
    index, count = torch.device(device).index or 0, torch.cuda.device_count()
    if index >= count:
        seen = f"{count} GPUs: cuda:0 to cuda:{count - 1}" if count > 1 else "1 GPU: cuda:0"
        raise UserError(f"{device} is not on this machine; torch sees {seen}. Check CUDA_VISIBLE_DEVICES.")
    return torch.device("cuda", index)


def _why_none() -> str:
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f": this torch ({torch.__version__}) is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"


def require_compiler() -> None:
    """Check that Triton can build its launchers, which it does with a C compiler and Python's headers.

    Raises
    ------
    UserError
        Naming what is missing.
    """
    # Triton takes $CC as it is, or looks for these two.
    named = os.environ.get("CC")
    if named is not None and not shutil.which(named):
        raise UserError(
            f"$CC is {named!r}, which is no command here; Triton needs a C compiler for the GPU's kernels. Install gcc "
            "and unset CC, or set it to a compiler."
        )
    if named is None and not any(shutil.which(name) for name in ("gcc", "clang")):
        raise UserError(
            "no C compiler (gcc, clang or $CC) is here; Triton needs one for the GPU's kernels: install gcc."
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise UserError(
            f"{headers} has no Python.h; Triton needs Python's headers for the GPU's kernels: install them "
            "(python3-dev on Debian)."
        )


def is_lost(error: Exception) -> bool:
    """Return whether torch raised this because the device cannot go on, whatever it computes next."""
    if (kind := getattr(torch, "AcceleratorError", None)) is not None:
        return isinstance(error, kind)
    # Before torch 2.8 there is no class for it.
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error")


def too_small(device: torch.device) -> UserError:
    """Make the error of a model that does not fit a GPU."""
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    return UserError(
        f"the model and one cell do not fit the memory of {torch.cuda.get_device_name(device)} ({device}), of which "
        f"{free:.1f} of {total:.1f} GiB are free. Use a GPU with more, end what else runs on this one, or set "
        "`compute_precision` to fp16 or bf16 if it is fp32."
    )
