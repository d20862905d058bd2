"""Sums the tokens of each cell of a row in float32.

A cell's tokens lie side by side, so each value is read once, in the precision it has, and in a fixed order. No sum
depends on the other cells of the row, even if their values are not finite.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from census_tf_dagster.inference.attention import to_device


def pool(values: Tensor, bounds: npt.NDArray[np.int64]) -> Tensor:
    """Sum the tokens of each cell.

    Parameters
    ----------
    values
        Values of each token, ``(n_tokens, width)``, contiguous.
    bounds
        First token of each cell, and the one after its last, int64 ``(n_cells, 2)``.

    Returns
    -------
    Tensor
        float32 ``(n_cells, width)``, on the device of `values`.
    """
    if values.is_cuda:
        # Torch for the CPU comes without Triton.
        from census_tf_dagster.inference.pooling_kernel import sum_of_tokens

        return sum_of_tokens(values, to_device(bounds, values.device))
    return plain_sums(values, bounds)


def plain_sums(values: Tensor, bounds: npt.NDArray[np.int64] | Tensor) -> Tensor:
    """Sum the tokens of each cell without a kernel; see `pool`."""
    return torch.stack([values[start:stop].sum(0, dtype=torch.float32) for start, stop in bounds.tolist()])
