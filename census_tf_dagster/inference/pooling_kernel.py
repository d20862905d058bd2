"""The Triton kernel of `pooling` for CUDA. Importing it needs Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16
"""Tokens that a program reads at once."""
WIDTH = 128
"""Values of a token that a program sums. In half precision, they are two cache lines of 128 bytes."""


def sum_of_tokens(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum the tokens of each cell; see `pooling.pool`. `bounds` is on the device of `values`."""
    cells, width = len(bounds), values.shape[1]
    sums = torch.empty(cells, width, dtype=torch.float32, device=values.device)
    sum_kernel[cells, triton.cdiv(width, WIDTH)](values, bounds, sums, width, TOKENS, WIDTH)
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(values, bounds, sums, width, TOKENS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Sum `WIDTH` values of one cell's tokens; programs are ``(n_cells, width / WIDTH)``."""
    cell = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start, stop = tl.load(bounds + 2 * cell), tl.load(bounds + 2 * cell + 1)
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        # What is not loaded is 0: a product with 0 would keep a neighbour's NaN.
        inside = (token < stop)[:, None] & (column < width)[None, :]
        total += tl.load(values + token[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + cell * width + column, tl.sum(total, 0), mask=column < width)
