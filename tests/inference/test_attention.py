"""Packed attention equals plain attention, and its mask equals the rule evaluated at every pair."""

import importlib.util
import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from census_tf_dagster.inference import attention
from census_tf_dagster.inference.attention import (
    MASK_BLOCK,
    TRITON,
    PackedKernel,
    mask_blocks,
    packed_attention,
    packed_terms,
    plain_attention,
)
from census_tf_dagster.inference.attention_choice import FLASH, QUERY_BLOCKS, TOLERANCE
from tests.support.project import DEVICE, relative_errors

HEADS, HEAD_DIM, SOFTCAP = 2, 16, 10.0
ROWS = {
    "one cell": [1024],
    "aligned": [128, 256, 640],
    "short": [90, 95, 3, 2, 1, 128, 127, 129, 200],
    "long and short": [700, 5, 300],
    "ends at a block": [300, 84],
    "nearly empty": [2],
}
LENGTH = 1024


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def rule(offsets: np.ndarray) -> np.ndarray:
    """Return which pairs attend: same cell, causal, no padding."""
    cell = np.full(LENGTH, -1)
    for number, (start, stop) in enumerate(itertools.pairwise(offsets)):
        cell[start:stop] = number
    position = np.arange(LENGTH)
    return (cell[:, None] == cell) & (position[:, None] >= position) & (cell >= 0)


@pytest.mark.parametrize("query_block", [MASK_BLOCK, 2 * MASK_BLOCK, 3 * MASK_BLOCK])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_blocks_are_those_of_the_rule(lengths: list[int], query_block: int) -> None:
    offsets = offsets_of(lengths)
    blocks = -(-LENGTH // query_block)
    # The last block of queries may reach beyond the row.
    pairs = np.zeros((blocks * query_block, LENGTH), bool)
    pairs[:LENGTH] = rule(offsets)
    pairs = pairs.reshape(blocks, query_block, LENGTH // MASK_BLOCK, MASK_BLOCK)
    some, every = pairs.any(axis=(1, 3)), pairs.all(axis=(1, 3))
    part_number, part_index, whole_number, whole_index = mask_blocks(offsets, LENGTH, query_block)
    for block in range(blocks):
        part = part_index[block, : part_number[block]].tolist()
        whole = whole_index[block, : whole_number[block]].tolist()
        assert sorted(part + whole) == np.flatnonzero(some[block]).tolist()
        assert whole == np.flatnonzero(every[block]).tolist()


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # The scores are as wide as real ones, so that the softcap has an effect.
    q, k, v = (torch.randn(LENGTH, HEADS, HEAD_DIM, generator=generator) * 3 for _ in range(3))
    bias = torch.rand(LENGTH, generator=generator) * 3
    return q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), bias.to(DEVICE)


def compare(lengths: list[int], attend: Callable[..., Tensor], seed: int = 0, kernel: PackedKernel = TRITON) -> None:
    offsets = offsets_of(lengths)
    q, k, v, bias = inputs(seed)
    used = offsets[-1]
    expected = plain_attention(q[:used], k[:used], v[:used], bias[:used], tuple(offsets.tolist()), SOFTCAP)
    found = attend(q, k, v, *packed_terms(bias, offsets, SOFTCAP, HEAD_DIM, kernel))
    assert relative_errors(found[:used].flatten(1).cpu().numpy(), expected.flatten(1).cpu().numpy()).max() < 3e-6
    assert (found[used:] == 0).all(), "padding sees no key and gets 0"


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without compilation warns that it is slow."""

    flex = attention.flex_attention

    def quiet(*arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return flex(*arguments, **options)

    monkeypatch.setattr(attention, "flex_attention", quiet)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("query_block", [MASK_BLOCK, 2 * MASK_BLOCK, 3 * MASK_BLOCK])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_packed_is_plain(lengths: list[int], query_block: int) -> None:
    compare(lengths, packed_attention, kernel=replace(TRITON, query_block=query_block))


@pytest.mark.usefixtures("uncompiled")
def test_without_softcap() -> None:
    q, k, v, bias = inputs()
    plain = plain_attention(q, k, v, bias, (0, 500, LENGTH), 0.0)
    packed = packed_attention(q, k, v, *packed_terms(bias, np.array([0, 500, LENGTH]), 0.0, HEAD_DIM))
    assert relative_errors(packed.flatten(1).cpu().numpy(), plain.flatten(1).cpu().numpy()).max() < 3e-6


def flash_of_this_gpu() -> PackedKernel | None:
    """Return FlashAttention 4's kernel if this GPU and this environment have it."""
    if DEVICE == "cpu" or importlib.util.find_spec("flash_attn") is None:
        return None
    query_block = QUERY_BLOCKS.get(torch.cuda.get_device_capability()[0])
    return replace(FLASH, query_block=query_block) if query_block else None


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("flash", [False, True], ids=["triton", "flash"])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_half_precision(lengths: list[int], flash: bool, dtype: torch.dtype) -> None:
    """The same rows as in float32, with each kernel of this device."""
    kernel = flash_of_this_gpu() if flash else TRITON
    if kernel is None:
        pytest.skip("FlashAttention 4 needs CENSUS_TF_TEST_DEVICE=cuda on Hopper or Blackwell, and flash-attn-4")
    offsets = offsets_of(lengths)
    *qkv, bias = inputs()
    q, k, v = (part.to(dtype) for part in qkv)
    used = offsets[-1]
    cell = tuple(offsets.tolist())
    expected = plain_attention(q[:used].float(), k[:used].float(), v[:used].float(), bias[:used], cell, SOFTCAP)
    attend = packed_attention if DEVICE == "cpu" else attention.compiled(packed_attention)
    found = attend(q, k, v, *packed_terms(bias, offsets, SOFTCAP, HEAD_DIM, kernel)).float()
    errors = relative_errors(found[:used].flatten(1).cpu().numpy(), expected.flatten(1).cpu().numpy())
    assert errors.max() <= TOLERANCE * torch.finfo(dtype).eps
    assert (found[used:] == 0).all()


@pytest.mark.skipif(DEVICE == "cpu" and shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_once_for_all_rows() -> None:
    """The mask's blocks matter only in compiled code. Each row has its own mask, and all share one compilation."""
    # In a process of its own: once, one that had run other tests before compiled a second time.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(graphs_of_all_rows).result() == 1


def graphs_of_all_rows() -> int:
    """Compare each row's attention when compiled; return the number of graphs."""
    warnings.simplefilter("ignore")

    def projected(q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> Tensor:
        return compiled(torch.stack([q, k, v], dim=1), *terms)

    @torch.compile(dynamic=False)
    def compiled(qkv: Tensor, *terms: Any) -> Tensor:
        return packed_attention(*qkv.unbind(1), *terms)

    for seed, lengths in enumerate(ROWS.values()):
        compare(lengths, projected, seed)
    graphs: int = counters["stats"]["unique_graphs"]
    return graphs


MKL_FUNCTIONS = frozenset(
    "acos asin atan cos cosh erf erfc erfinv exp expm1 lgamma log log10 log1p sin sinh sqrt tan tanh trunc".split()  # noqa: SIM905
)
"""Unary functions that torch takes from MKL (`aten/src/ATen/cpu/vml.h`)."""

RECORD = """
import json, numpy, torch
from torch.utils._python_dispatch import TorchDispatchMode

class Record(TorchDispatchMode):
    calls = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.calls.append((function._schema.name.removeprefix("aten::").rstrip("_"), args[0].numel()))
        return function(*args, **(kwargs or {}))

torch.set_default_device("cpu")
with Record():
    from census_tf_dagster.inference.attention import plain_attention
    from census_tf_dagster.inference.model import ACTIVATIONS
    q, k, v, bias = (torch.ones(300, 2, 16), torch.ones(300, 2, 16), torch.ones(300, 2, 16), torch.ones(300))
    plain_attention(q, k, v, bias, (0, 300), 10.0)
    for activation in ACTIVATIONS.values():
        activation(q)
print(json.dumps(Record.calls))
"""


def test_no_two_threads_make_the_first_call_of_a_function_of_mkl() -> None:
    """A first call by several threads at once may give values with half the digits, without any error."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", RECORD], capture_output=True, text=True, check=True)
    first: dict[str, int] = {}
    for name, elements in json.loads(done.stdout):
        first.setdefault(name, elements)
    assert {name: elements for name, elements in first.items() if name in MKL_FUNCTIONS} == {"tanh": 1}
