"""Chooses the attention kernel of a GPU, and lets it attend once before it may be used.

FlexAttention can compute with FlashAttention 4 on Hopper and Blackwell, if the package ``flash-attn-4`` is installed.
Everywhere else, and whenever that does not work, it computes with Triton. The kernels themselves belong to torch, and
how they are called in `attention`.
"""

import importlib.util
import sys
from dataclasses import replace

import numpy as np
import torch
from torch.nn.attention import flex_attention

from census_tf_dagster.inference import attention
from census_tf_dagster.inference.attention import TRITON, PackedKernel, packed_attention, packed_terms, plain_attention
from census_tf_dagster.inference.gpu import is_lost

FLASH = PackedKernel("FlexAttention: FlashAttention 4", {"BACKEND": "FLASH"})
QUERY_BLOCKS = {9: 128, 10: 256, 11: 256}
"""Queries per block of the mask, by the major compute capability of the GPUs for which FlashAttention 4 takes a score
function. On Blackwell, it computes two tiles of 128 queries at once."""
TRIAL_CELLS = (1, 2, 90, 127, 128, 129, 560)
"""Lengths of the cells on which a kernel is tried: within a block, at its end and beyond."""
TRIAL_LENGTH = 1280
TOLERANCE = 8
"""Largest relative error of a token's attention, in the precision's steps at 1. Two roundings to that precision, of
the softmax and of the result, cost about one; a key too many or without its bias costs hundreds."""


def choose_kernel(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, softcap: float) -> PackedKernel:
    """Choose a kernel for packed attention; print a line if it is not the one that this GPU could use.

    Parameters
    ----------
    device
        The GPU; it is torch's current device.
    dtype
        Dtype of query, key and value.
    heads, head_dim, softcap
        The model's attention heads, their width, and `ModelShape.softcap`.

    Raises
    ------
    torch.OutOfMemoryError
        When memory does not suffice for the trial.
    torch.AcceleratorError
        When the device is lost.
    """
    major, _ = torch.cuda.get_device_capability(device)
    # FlashAttention 4 computes in half precision only.
    if major not in QUERY_BLOCKS or dtype == torch.float32:
        return TRITON
    kernel = replace(FLASH, query_block=QUERY_BLOCKS[major])
    options = getattr(flex_attention, "FlexKernelOptions", None)
    if options is None or "BACKEND" not in options.__annotations__:
        return without_flash(f"torch {torch.__version__} cannot use it")
    if not _is_installed():
        return without_flash("the package flash-attn-4 is not installed")
    try:
        error = _largest_error(kernel, device, dtype, heads, head_dim, softcap)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        if is_lost(failure):
            raise
        return without_flash(first_line(failure))
    limit = TOLERANCE * torch.finfo(dtype).eps
    # An error that is not a number is too large as well.
    if not error <= limit:
        return without_flash(f"its values differ from plain attention by {error:.1e} (most: {limit:.1e})")
    return kernel


def without_flash(reason: str) -> PackedKernel:
    """Print why FlashAttention 4 is not used; return the kernel that takes its place."""
    print(f"Attention uses Triton instead of FlashAttention 4: {reason}.", file=sys.stderr, flush=True)
    return TRITON


def first_line(error: Exception) -> str:
    """Describe an error in one line."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}"


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


@torch.inference_mode()
def _largest_error(
    kernel: PackedKernel, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, softcap: float
) -> float:
    """Compare a kernel with plain attention; return the largest error of a token relative to the token's norm."""
    generator = torch.Generator().manual_seed(0)
    # Scores are as wide as a real model's, so that the softcap has an effect. Query, key and value are views of one
    # tensor, as in the model.
    qkv = (torch.randn(TRIAL_LENGTH, 3, heads, head_dim, generator=generator) * 2).to(device, dtype)
    bias = (torch.rand(TRIAL_LENGTH, generator=generator) * 3).to(device)
    offsets = np.concatenate([[0], np.cumsum(TRIAL_CELLS)])
    used = int(offsets[-1])
    terms = packed_terms(bias, offsets, softcap, head_dim, kernel)
    found = attention.compiled(packed_attention)(*qkv.unbind(1), *terms).float()
    if not torch.isfinite(found).all():
        # Padding, too, must be finite: as a masked key, it still multiplies its value.
        return float("nan")
    q, k, v = qkv[:used].float().unbind(1)
    expected = plain_attention(q, k, v, bias[:used], tuple(offsets.tolist()), softcap)
    difference = (found[:used] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(difference.max().cpu())
