"""Chooses the GPU that an engine computes on, and checks that this machine can build kernels for it.

Counting GPUs without torch belongs in `devices`.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from census_tf_dagster.errors import UserError


def choose_device(device: str) -> torch.device:
    """Return the device of a name. A GPU always has its index, because many of torch's functions require it.

    Parameters
    ----------
    device
        ``cuda`` (the first GPU), a certain GPU such as ``cuda:1``, or ``cpu``.

    Raises
    ------
    UserError
        When there is no such GPU. Falling back to the CPU would be very slow, and nobody would notice it.
    """
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"this set has `device: cuda`, but this machine has no GPU that torch can use{_why_none()}. Expected one: "
            "run it on a machine with a GPU, or set `device: cpu` in the set's YAML for a small trial."
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
    """Check that Triton can build its launchers. It needs a C compiler and Python's headers for that.

    Raises
    ------
    UserError
        When one is missing.
    """
    # Triton uses $CC unchanged; without it, it looks for these two commands.
    named = os.environ.get("CC")
    if named is not None and not shutil.which(named):
        raise UserError(
            f"$CC is {named!r}, which is not a command on this machine; expected a C compiler, which Triton needs for "
            "the GPU's kernels. Install gcc and unset CC, or set CC to a compiler."
        )
    if named is None and not any(shutil.which(name) for name in ("gcc", "clang")):
        raise UserError(
            "this machine has no C compiler; expected gcc, clang or $CC, because Triton needs one for the GPU's "
            "kernels: install gcc."
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise UserError(
            f"{headers} has no Python.h; expected it, because Triton needs Python's headers for the GPU's kernels: "
            "install them (python3-dev on Debian)."
        )


def is_lost(error: Exception) -> bool:
    """Tell whether an error of torch means that the device cannot compute anything more."""
    if (kind := getattr(torch, "AcceleratorError", None)) is not None:
        return isinstance(error, kind)
    # Before torch 2.8 there is no class for this error.
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error")


def too_small(device: torch.device) -> UserError:
    """Make the error for a model that does not fit into a GPU's memory."""
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    return UserError(
        f"the model and one cell do not fit the memory of {torch.cuda.get_device_name(device)} ({device}), of which "
        f"{free:.1f} of {total:.1f} GiB are free. Use a GPU with more memory, end other programs on this one, or set "
        "`compute_precision` to fp16 or bf16 if it is fp32."
    )
