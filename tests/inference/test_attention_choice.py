"""FlashAttention 4 is used where it works and is right; everywhere else Triton is, after one line that says why."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask

from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.inference import attention
from census_tf_dagster.inference.attention import TRITON, PackedKernel
from census_tf_dagster.inference.attention_choice import FLASH, choose_kernel
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.device_process import _about
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.model import Model
from tests.support.cells import ASSAYS, GENES, cells
from tests.support.cuda_double import gpus_of_tests
from tests.support.project import relative_errors

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU here")

HEADS, HEAD_DIM, SOFTCAP = 2, 16, 10.0
HALF = torch.float16


def choose(dtype: torch.dtype = HALF, head_dim: int = HEAD_DIM, softcap: float = SOFTCAP) -> PackedKernel:
    return choose_kernel(torch.device("cuda", 0), dtype, HEADS, head_dim, softcap)


@pytest.mark.parametrize("softcap", [SOFTCAP, 0.0])
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize(("capability", "query_block"), [((9, 0), 128), ((10, 0), 256), ((10, 3), 256)])
def test_hopper_and_blackwell_use_flash_attention(
    capability: tuple[int, int],
    query_block: int,
    dtype: torch.dtype,
    softcap: float,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with gpus_of_tests(1, capability=capability, flash=True):
        assert choose(dtype, softcap=softcap) == replace(FLASH, query_block=query_block)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0)])
def test_other_gpus_use_triton(capability: tuple[int, int], capfd: pytest.CaptureFixture[str]) -> None:
    with gpus_of_tests(1, capability=capability, flash=True):
        assert choose() is TRITON
    assert capfd.readouterr().err == "", "nothing is amiss"


def test_float32_uses_triton(capfd: pytest.CaptureFixture[str]) -> None:
    with gpus_of_tests(1, flash=True):
        assert choose(torch.float32) is TRITON
    assert capfd.readouterr().err == ""


def falls_back(capfd: pytest.CaptureFixture[str], reason: str, **options: Any) -> None:
    """Expect Triton and one line with this reason."""
    assert choose(**options) is TRITON
    assert capfd.readouterr().err == f"Attention uses Triton instead of FlashAttention 4: {reason}.\n"


def test_without_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    with gpus_of_tests(1):
        falls_back(capfd, "the package flash-attn-4 is not installed")


def test_a_torch_that_has_no_such_backend(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(flex_module, "FlexKernelOptions")
    with gpus_of_tests(1, flash=True):
        falls_back(capfd, f"torch {torch.__version__} cannot use it")


def test_heads_that_the_package_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    with gpus_of_tests(1, capability=(10, 0), flash=True):
        falls_back(capfd, "AssertionError: (head_dim, head_dim_v)=(144, 144) is not supported on SM100", head_dim=144)


@contextmanager
def kernel_that(attends: Callable[..., Any]) -> Iterator[None]:
    """Make a GPU whose kernel of FlashAttention 4 is `attends`, called with the right kernel and its arguments."""
    with gpus_of_tests(1, flash=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "flex_attention", partial(attends, attention.flex_attention))
        yield


def test_an_error_of_many_lines_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("the compiler failed\n\nSet TORCHDYNAMO_VERBOSE=1 for more")

    with kernel_that(fails):
        falls_back(capfd, "RuntimeError: the compiler failed")


def no_score_function(**given: Any) -> dict[str, Any]:
    return {**given, "score_mod": lambda score, *_: score}


def no_bias(**given: Any) -> dict[str, Any]:
    score_mod = given["score_mod"]
    zero = torch.zeros((), dtype=torch.int32)
    return {**given, "score_mod": lambda score, b, h, q, _: score_mod(score, b, h, q, zero)}


def one_key_too_many(**given: Any) -> dict[str, Any]:
    return with_mask(given, lambda rule: lambda b, h, q, k: rule(b, h, q, k) | (q + 1 == k))


def one_key_too_few(**given: Any) -> dict[str, Any]:
    return with_mask(given, lambda rule: lambda b, h, q, k: rule(b, h, q, k) & ((q != k) | (q % 128 == 0)))


def neighbours_too(**given: Any) -> dict[str, Any]:
    return with_mask(given, lambda rule: lambda b, h, q, k: q >= k)


def with_mask(given: dict[str, Any], change: Callable[..., Any]) -> dict[str, Any]:
    mask = given["block_mask"]
    parts = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    with torch._C.DisableTorchFunction():
        changed = BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=change(mask.mask_mod))
    return {**given, "block_mask": changed}


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
@pytest.mark.parametrize(
    "mistake", [no_score_function, no_bias, one_key_too_many, one_key_too_few, neighbours_too], ids=lambda f: f.__name__
)
def test_a_kernel_with_wrong_values_is_not_used(
    mistake: Callable[..., dict[str, Any]], dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    with kernel_that(lambda right, *qkv, **given: right(*qkv, **mistake(**given))):
        assert choose(dtype) is TRITON
    assert "its values differ from plain attention by" in capfd.readouterr().err


def test_padding_that_is_not_finite_is_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    def pads_with_nan(right: Callable[..., torch.Tensor], *qkv: torch.Tensor, **given: Any) -> torch.Tensor:
        found = right(*qkv, **given)
        found[:, :, -1] = torch.nan
        return found

    with kernel_that(pads_with_nan):
        assert choose() is TRITON
    assert "differ from plain attention by nan" in capfd.readouterr().err


def test_a_lost_device_is_no_reason_to_go_on() -> None:
    def lost(*arguments: Any, **options: Any) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with kernel_that(lost), pytest.raises(torch.AcceleratorError):
        choose()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    build_checkpoint(folder / "checkpoint", {"o": GENES}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128)
    return prepare(read_checkpoint(folder / "checkpoint"), "fp16", folder / "cache")


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_an_engine_embeds_with_it_and_says_so(prepared: Path, capability: tuple[int, int]) -> None:
    packed = cells(20, seed=0)
    expected = Engine.load(prepared, GENES, "cpu").embed(packed)
    with gpus_of_tests(1, capability=capability, flash=True):
        # Five cells are 640 tokens: the last block of 256 queries ends beyond the row.
        engine = Engine.load(prepared, GENES, "cuda", batch_size=5)
        found = engine.embed(packed)
        about = _about(engine)
    assert engine.row_length == 640
    assert relative_errors(found, expected).max() < 5e-3
    assert about["attention"] == "FlexAttention: FlashAttention 4"


def test_a_model_that_fails_with_it_is_loaded_with_triton(
    prepared: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = Model.embed

    def fails(self: Model, *arguments: Any) -> torch.Tensor:
        if self.kernel is not TRITON:
            raise RuntimeError("no kernel image for this shape")
        return embed(self, *arguments)

    monkeypatch.setattr(Model, "embed", fails)
    packed = cells(20, seed=0)
    with gpus_of_tests(1, flash=True):
        engine = Engine.load(prepared, GENES, "cuda", batch_size=5)
        assert np.isfinite(engine.embed(packed)).all()
        assert _about(engine)["attention"] == "FlexAttention: Triton"
    message = "Attention uses Triton instead of FlashAttention 4: RuntimeError: no kernel image for this shape.\n"
    assert capfd.readouterr().err == message
