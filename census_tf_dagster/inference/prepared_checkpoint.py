"""Loads a model from a prepared checkpoint: one safetensors file with only what inference needs, in its precision.

The file holds the embedding MLP's output for each gene and assay instead of the ESM-2 matrix and the MLP, and it holds
no heads. `weights` writes it, and `checkpoint_cache` decides when.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.model import BlockWeights, Model, QkvProjection, first_table
from census_tf_dagster.inference.sealed_file import is_sealed
from census_tf_dagster.inference.shape import ModelShape

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_model(
    prepared: Path, genes: Sequence[str], device: torch.device, dtype: torch.dtype | None = None
) -> tuple[Model, str]:
    """Load a prepared checkpoint for one gene axis; return the model and its precision.

    Parameters
    ----------
    prepared
        The file that `prepare` returned.
    genes
        The genes that can occur, in the order of their tokens; the checkpoint must know all of them.
    device
        The device that computes.
    dtype
        Dtype of weights and activations; None: the prepared one.

    Raises
    ------
    UserError
        When the file is damaged.
    """
    if not is_sealed(prepared):
        raise UserError(
            f"{prepared} is missing or damaged; expected a prepared checkpoint: run this again, which builds it anew."
        )
    with safe_open(prepared, "pt") as file, torch.inference_mode():
        metadata = file.metadata()
        shape = ModelShape(**json.loads(metadata["shape"]))
        specials = int(metadata["assays"]) + 1

        def get(name: str) -> Tensor:
            tensor: Tensor = file.get_tensor(name)
            return tensor.to(device, dtype or tensor.dtype)

        def maybe(name: str) -> Tensor | None:
            return get(name) if name in names else None

        names = set(file.keys())
        projections = [
            QkvProjection(get(f"{i}.norm1.weight"), get(f"{i}.norm1.bias"), get(f"{i}.qkv"), maybe(f"{i}.qkv_bias"))
            for i in range(shape.num_layers)
        ]
        blocks = [
            BlockWeights(
                out=get(f"{i}.out"),
                out_bias=maybe(f"{i}.out_bias"),
                norm_weight=get(f"{i}.norm2.weight"),
                norm_bias=get(f"{i}.norm2.bias"),
                linear1=get(f"{i}.linear1"),
                linear1_bias=maybe(f"{i}.linear1_bias"),
                linear2=get(f"{i}.linear2"),
                linear2_bias=maybe(f"{i}.linear2_bias"),
            )
            for i in range(shape.num_layers)
        ]
        row_of_gene = {name: specials + i for i, name in enumerate(split_names(file.get_tensor("genes")))}
        rows = torch.tensor([*range(specials), *(row_of_gene[gene] for gene in genes)])
        table = file.get_tensor("table")[rows]
        return Model(
            shape=shape,
            table=first_table(table.to(device, dtype or table.dtype), projections[0]),
            pooled_from=specials - 1,
            projections=tuple(projections[1:]),
            blocks=tuple(blocks),
            last_linear2=blocks[-1].linear2.float(),
        ), metadata["precision"]


def join_names(names: Sequence[str]) -> Tensor:
    """Encode names as bytes, one line each, uint8."""
    return torch.frombuffer(bytearray("\n".join(names).encode()), dtype=torch.uint8)


def split_names(names: Tensor) -> list[str]:
    """Decode the names that `join_names` encoded."""
    return names.numpy().tobytes().decode().split("\n")
