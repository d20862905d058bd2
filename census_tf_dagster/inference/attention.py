"""Computes causal attention within each cell of a row, with the log-count bias on keys and the softcap.

There are two exact paths. On CUDA, FlexAttention runs over the whole row, and a block mask skips everything outside a
cell. On the CPU, a plain loop attends cell by cell. Upstream's rules: a key's bias is added to its score, then the
score becomes ``softcap * tanh(score / softcap)``; a query that may attend to no key gets 0.

The rest of the forward pass belongs in `model`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# MKL chooses a vector function's kernel at its first call. If several threads make that call at once, one of them may
# get a kernel with half the digits (pytorch issue 188792). A call for one element runs in one thread.
torch.tanh(torch.zeros(1))

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
QUERY_BLOCK = 128
"""Queries per block on the CPU. Keys after a block's last query are never multiplied."""
MASK_BLOCK = 128
"""Keys per block of FlexAttention's mask, and queries unless a kernel needs more. This is FlexAttention's default."""
FLOAT32_TILES = {"BLOCK_M": 32, "BLOCK_N": 16}
"""Queries and keys per tile in float32. For heads 128 wide, torch's own tiles take more shared memory than an A10G, L4
or L40S has, and spill about a kilobyte of registers on every GPU (`benchmarks/inference/kernels.py`)."""


@dataclass(frozen=True)
class PackedKernel:
    """One of the kernels that FlexAttention has for CUDA.

    Attributes
    ----------
    name
        Its name in a shard's metadata.
    options
        The options with which FlexAttention chooses it.
    query_block
        Queries per block of the mask, a multiple of `MASK_BLOCK`.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    query_block: int = MASK_BLOCK


TRITON = PackedKernel("FlexAttention: Triton")


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for fixed shapes, so that each row length is compiled once and all layers share it."""
    return torch.compile(function, dynamic=False)


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device without waiting for the device's earlier work."""
    host = torch.from_numpy(array)
    # A copy from memory that is not pinned would wait for all earlier kernels.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, bounds: tuple[int, ...], softcap: float) -> Tensor:
    """Attend cell by cell, in float32.

    Parameters
    ----------
    q, k, v
        ``(n_tokens, heads, head_dim)``.
    bias
        Value added to each key's scores, float32 ``(n_tokens,)``.
    bounds
        Start of each cell, and the end of the last cell.
    softcap
        Smooth limit of the scores; 0: no limit.

    Returns
    -------
    Tensor
        ``(n_tokens, heads, head_dim)``, the dtype of `v`.
    """
    attended = torch.empty_like(v, memory_format=torch.contiguous_format)
    for start, stop in itertools.pairwise(bounds):
        cell = slice(start, stop)
        attended[cell] = cell_attention(q[cell], k[cell], v[cell], bias[cell], softcap)
    return attended


def cell_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, softcap: float) -> Tensor:
    """Attend causally within one cell, in float32; see `plain_attention`."""
    q, k, v_heads = (part.transpose(0, 1).float() for part in (q, k, v))
    cap = softcap if softcap > 0 else 1.0
    # The scores' other factors include the division by the cap. The rest works in place on blocks that fit a cache,
    # which is 2.5 to 4 times faster than whole-cell expressions.
    q = q / (math.sqrt(q.shape[-1]) * cap)
    keys = k.transpose(1, 2).contiguous()
    bias = (bias / cap).expand(len(q), 1, -1)
    n = q.shape[1]
    future = torch.ones(min(n, QUERY_BLOCK), min(n, QUERY_BLOCK), dtype=torch.bool, device=q.device).triu(1)
    attended = torch.empty_like(q)
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        scores = torch.baddbmm(bias[..., :stop], q[:, start:stop], keys[..., :stop])
        if softcap > 0:
            scores.tanh_().mul_(cap)
        scores[..., start:].masked_fill_(future[: stop - start, : stop - start], -torch.inf)
        attended[:, start:stop] = scores.softmax(-1) @ v_heads[:, :stop]
    return attended.transpose(0, 1).to(v.dtype)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, score_mod: ScoreMod, mask: BlockMask, scale: float, options: Mapping[str, str]
) -> Tensor:
    """Attend within the cells of a row whose end may be padding; all tensors are ``(row_length, heads, head_dim)``."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    tiles = FLOAT32_TILES if q.is_cuda and q.dtype == torch.float32 else {}
    all_options: Any = {**options, **tiles}
    attended = flex_attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, kernel_options=all_options)
    return attended[0].transpose(0, 1)


def packed_terms(
    bias: Tensor, offsets: npt.NDArray[np.int64], softcap: float, head_dim: int, kernel: PackedKernel = TRITON
) -> tuple[ScoreMod, BlockMask, float, Mapping[str, str]]:
    """Make the other arguments that `packed_attention` needs for one row.

    Parameters
    ----------
    bias
        Value added to each key's scores, float32 ``(row_length,)``; its length is a multiple of `MASK_BLOCK`.
    offsets
        Start of each cell and end of the last, int64 ``(n_cells + 1,)``; the rest of the row is padding.
    softcap
        See `plain_attention`.
    head_dim
        Width of the attention heads.
    kernel
        The kernel that will attend.
    """
    length, device = len(bias), bias.device
    cell_of_token = to_device(_cells_of_tokens(offsets, length), device)
    scale, least = 1 / math.sqrt(head_dim), 0.0
    if softcap > 0:
        # softcap * tanh(s / softcap) = softcap - 1 / (least * 2^(exponent * s) + least). The softmax does not see the
        # constant. The exponent and the factor `least` become part of the scale and of the bias, so that a score takes
        # one multiplication and addition, one exponential and one root (`benchmarks/inference/kernels.py`). A quotient
        # takes more instructions than the root's square, and torch's tanh branches at each score.
        exponent, least = 2 * math.log2(math.e) / softcap, 1 / (2 * softcap)
        scale, bias = scale * exponent, bias * exponent + math.log2(least)

    def same_cell(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head
        cell = cell_of_token[query]
        return (cell == cell_of_token[key]) & (query >= key) & (cell >= 0)

    def with_counts(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del batch, head, query
        score = score + bias[key]
        if softcap > 0:
            root = torch.rsqrt(torch.exp2(score) + least)
            return -root * root
        return score

    blocks = (to_device(part[None, None], device) for part in mask_blocks(offsets, length, kernel.query_block))
    partly, partly_index, whole, whole_index = blocks
    sizes: dict[str, Any] = {"BLOCK_SIZE": MASK_BLOCK}
    if kernel.query_block != MASK_BLOCK:
        # The last block of queries may be longer than what is left of the row.
        sizes = {"BLOCK_SIZE": (kernel.query_block, MASK_BLOCK), "seq_lengths": (length, length)}
    # The mask is built from the offsets, because `create_block_mask` would evaluate it at every pair of tokens.
    mask = BlockMask.from_kv_blocks(partly, partly_index, whole, whole_index, mask_mod=same_cell, **sizes)
    return with_counts, mask, scale, kernel.options


def _cells_of_tokens(offsets: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int32]:
    """Return the cell of each token, -1 for padding."""
    cell_of_token = np.full(length, -1, np.int32)
    cell_of_token[: offsets[-1]] = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
    return cell_of_token


def mask_blocks(
    offsets: npt.NDArray[np.int64], length: int, query_block: int = MASK_BLOCK
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Compute which blocks of keys each block of queries needs, in part or as a whole.

    Parameters
    ----------
    offsets
        Start of each cell and end of the last, int64 ``(n_cells + 1,)``.
    length
        Tokens of the row, a multiple of `MASK_BLOCK`.
    query_block
        Queries per block, a multiple of `MASK_BLOCK`. A block of keys has `MASK_BLOCK`.

    Returns
    -------
    tuple of ndarray
        Arguments of `BlockMask.from_kv_blocks`, int32: number ``(query blocks,)`` and indices ``(query blocks, key
        blocks)`` of the blocks in which the mask must be evaluated, then of the blocks that it admits as a whole.
    """
    key_blocks = length // MASK_BLOCK
    first = np.arange(-(-length // query_block)) * query_block
    last_used = offsets[-1] - 1
    first_token, last_token = np.minimum(first, last_used), np.minimum(first + query_block - 1, last_used)
    first_cell, last_cell = (np.searchsorted(offsets, token, side="right") - 1 for token in (first_token, last_token))
    used = first <= last_used
    # For a block of queries inside one cell, the blocks of keys before it lie wholly in the cell, except the first one
    # if the cell starts within it.
    inside = used & (first_cell == last_cell) & (first + query_block <= offsets[-1])
    start = offsets[first_cell]
    earliest = start // MASK_BLOCK
    whole_from = -(-start // MASK_BLOCK)
    diagonal = first // MASK_BLOCK

    whole_number = np.where(inside, np.maximum(diagonal - whole_from, 0), 0)
    offset = np.arange(key_blocks)[None, :]
    whole_index = whole_from[:, None] + offset
    part_number = np.where(used, last_token // MASK_BLOCK - earliest + 1 - whole_number, 0)
    # The partial blocks of such a block: the cell's first one, if the cell starts within it, then those beside it.
    before = (whole_from - earliest)[:, None]
    part_index = np.where(
        inside[:, None] & (offset >= before), diagonal[:, None] + offset - before, earliest[:, None] + offset
    )
    return (
        part_number.astype(np.int32),
        np.minimum(part_index, key_blocks - 1).astype(np.int32),
        whole_number.astype(np.int32),
        np.minimum(whole_index, key_blocks - 1).astype(np.int32),
    )
