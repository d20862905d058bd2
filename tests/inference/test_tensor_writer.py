"""Files that are written block by block are those of the safetensors library."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from census_tf_dagster.inference.tensor_writer import LazyTensor, write_tensors

METADATA = {"precision": "fp16", "shape": '{"a": "ä"}'}


def lazy(tensor: torch.Tensor, cuts: Sequence[int] = ()) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: iter(tensor.tensor_split(list(cuts))))


def content(path: Path) -> tuple[dict[str, object], bytes]:
    """Return the header of a file and its values."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    assert end % 8 == 0
    return json.loads(whole[8:end]), whole[end:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_is_the_same_as_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "names": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "b": torch.arange(35).reshape(7, 5).to(dtype),
        "a": torch.arange(5).to(dtype),
        "none": torch.empty(0, 5, dtype=dtype),
    }
    save_file(tensors, tmp_path / "theirs", METADATA)
    cuts = {"b": (2, 2, 6), "names": (1,)}
    written = {name: lazy(tensor, cuts.get(name, ())) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "ours", written, METADATA)
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == METADATA
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_blocks_that_are_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "file", {"a": LazyTensor((4, 3), torch.float32, lambda: iter([tensor.T]))}, {})
    with safe_open(tmp_path / "file", "pt") as file:
        assert torch.equal(file.get_tensor("a"), tensor.T)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (torch.zeros(2, 5), r"the blocks of a have 40 bytes; expected 60"),
        (torch.zeros(3, 5).half(), r"a has a block of torch.float16; expected torch.float32"),
    ],
)
def test_blocks_of_another_size_or_dtype(tmp_path: Path, block: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path / "file", {"a": LazyTensor((3, 5), torch.float32, lambda: iter([block]))}, {})
