"""Writes a safetensors file block by block, so that no more than one block of one tensor is in memory.

The library's own `save_file` needs all tensors at once. This module writes the same bytes after the header: tensors
ordered by the size of a value, largest first, then by name.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from census_tf_dagster.inference.sealed_file import LENGTH_BYTES

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""The format's name of each dtype that prepared checkpoints have."""
HEADER_MULTIPLE = 8
"""The header is padded with spaces to a multiple of this, so that values are aligned."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed while it is written.

    Attributes
    ----------
    shape, dtype
        Shape and dtype of the whole tensor.
    blocks
        Yields consecutive parts of it along the first dimension, of that dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as a safetensors file.

    Raises
    ------
    ValueError
        When the blocks of a tensor do not have its size or dtype.
    OSError
        When the file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_MULTIPLE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name in order:
            tensor, written = tensors[name], 0
            for block in tensor.blocks():
                if block.dtype != tensor.dtype:
                    raise ValueError(f"{name} has a block of {block.dtype}; expected {tensor.dtype}")
                written += file.write(block.contiguous().flatten().view(torch.uint8).numpy().data)
            if written != tensor.nbytes:
                raise ValueError(f"the blocks of {name} have {written} bytes; expected {tensor.nbytes}")
