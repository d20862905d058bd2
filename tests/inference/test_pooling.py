"""Pooling is a float32 sum of each cell's own tokens, the same bits wherever the cell lies in a row."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from census_tf_dagster.inference.pooling import pool
from tests.support.project import DEVICE, REPOSITORY

WIDTH = 200
BOUNDS = np.array([[1, 2], [2, 3], [4, 36], [36, 300], [300, 317]])
"""A cell of one token, cells with and without a token that is not pooled, and padding after the last one."""
LENGTH = 384


def values(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Make values whose sums leave the range of float16. Tokens that no cell pools are not finite."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(LENGTH, WIDTH, generator=generator) + 400
    tokens[[0, 3]] = torch.nan
    tokens[BOUNDS[-1, 1] :] = torch.inf
    return tokens.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_in_float32(dtype: torch.dtype) -> None:
    tokens = values(dtype)
    expected = np.stack([tokens[start:stop].double().sum(0).numpy() for start, stop in BOUNDS])
    found = pool(tokens.to(DEVICE), BOUNDS)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=1e-6)
    assert expected.max() > torch.finfo(torch.float16).max


def test_a_cell_has_the_same_bits_in_any_row() -> None:
    tokens = values().to(DEVICE)
    together = pool(tokens, BOUNDS)
    for number, (start, stop) in enumerate(BOUNDS):
        alone = pool(tokens[start:stop].contiguous(), np.array([[0, stop - start]]))
        assert torch.equal(alone[0], together[number])
    tokens[36:300] = torch.nan
    changed = pool(tokens, BOUNDS)
    assert changed[3].isnan().all()
    others = [0, 1, 2, 4]
    assert torch.equal(changed[others], together[others])


INTERPRETED = """
import sys
import numpy, torch
from census_tf_dagster.inference.pooling_kernel import sum_of_tokens
found = numpy.load(sys.argv[1])
sums = sum_of_tokens(torch.from_numpy(found["values"]), torch.from_numpy(found["bounds"]))
numpy.save(sys.argv[2], sums.numpy())
"""


def test_the_kernel_of_gpus(tmp_path: Path) -> None:
    """Triton's interpreter runs the kernel on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed (`make test` installs it on Linux)")
    tokens = values()
    np.savez(tmp_path / "given.npz", values=tokens.numpy(), bounds=BOUNDS)
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, tmp_path / "given.npz", tmp_path / "sums.npy"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(np.load(tmp_path / "sums.npy"), pool(tokens, BOUNDS).numpy(), rtol=1e-6)
