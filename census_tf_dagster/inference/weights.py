"""From upstream's state dict to what inference reads: checked, fused, cast, and nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import START, Checkpoint
from census_tf_dagster.inference.model import ACTIVATIONS
from census_tf_dagster.inference.prepared import DTYPES, join_names

TABLE_ROWS_AT_ONCE = 4096


def write_prepared(checkpoint: Checkpoint, precision: str, path: Path) -> None:
    """Write a checkpoint's prepared file; the embedding MLP is applied in float32, then everything is cast."""
    metadata = {
        "precision": precision,
        "shape": json.dumps(asdict(checkpoint.shape)),
        "assays": str(len(checkpoint.aux_vocab)),
    }
    save_file(_prepared_tensors(checkpoint, DTYPES[precision]), path, metadata)


def _prepared_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    state = _State(checkpoint.folder / "model_weights.pt")
    shape = checkpoint.shape
    dim, hidden = shape.embed_dim, shape.model_dim
    if shape.activation not in ACTIVATIONS:
        raise UserError(f"{checkpoint.folder}: activation {shape.activation!r}; expected one of {sorted(ACTIVATIONS)}.")
    tensors: dict[str, Tensor] = {}

    def add(name: str, parts: Sequence[str], *size: int) -> None:
        tensors[name] = torch.cat([state.get(part, size) for part in parts]).to(dtype)

    def add_bias(name: str, parts: Sequence[str], size: int) -> None:
        if any(part in state for part in parts):
            add(name, parts, size)

    for i in range(shape.num_layers):
        at = f"transformer_encoder.encoder_layers.{i}"
        projections = [f"{at}.self_attn.linears.{k}" for k in range(4)]
        for norm in ("norm1", "norm2"):
            add(f"{i}.{norm}.weight", [f"{at}.{norm}.weight"], dim)
            add(f"{i}.{norm}.bias", [f"{at}.{norm}.bias"], dim)
        add(f"{i}.qkv", [f"{name}.weight" for name in projections[:3]], dim, dim)
        add_bias(f"{i}.qkv_bias", [f"{name}.bias" for name in projections[:3]], dim)
        add(f"{i}.out", [f"{projections[3]}.weight"], dim, dim)
        add_bias(f"{i}.out_bias", [f"{projections[3]}.bias"], dim)
        add(f"{i}.linear1", [f"{at}.linear1.weight"], hidden, dim)
        add_bias(f"{i}.linear1_bias", [f"{at}.linear1.bias"], hidden)
        add(f"{i}.linear2", [f"{at}.linear2.weight"], dim, hidden)
        add_bias(f"{i}.linear2_bias", [f"{at}.linear2.bias"], dim)
    genes, table = _embedding_table(checkpoint, state)
    return {**tensors, "genes": join_names(genes), "table": table.to(dtype)}


class _State:
    """A state dict on disk. Tensors are mapped, not read, until they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # weights_only admits tensors alone: no code of the file runs.
            self.tensors: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise UserError(f"{path} cannot be read as a state dict of tensors: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str, size: tuple[int, ...]) -> Tensor:
        """Return a tensor whose size must be as given; -1 allows any."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise UserError(f"{self.path} has no {name}; expected the weights of the model in config.json.")
        same_rank = len(tensor.shape) == len(size)
        if not same_rank or any(want not in (-1, got) for got, want in zip(tensor.shape, size, strict=True)):
            raise UserError(f"{self.path}: {name} is {tuple(tensor.shape)}; config.json says {size}.")
        return tensor


@torch.inference_mode()
def _embedding_table(checkpoint: Checkpoint, state: _State) -> tuple[list[str], Tensor]:
    """Return the genes, and the embeddings of assays, START and them, float32."""
    dim, assays = checkpoint.shape.embed_dim, len(checkpoint.aux_vocab)
    at = "gene_embeddings.mlp.layers"
    matrix = state.get("gene_embeddings.embedding.weight", (len(checkpoint.gene_rows), -1))
    esm_dim = matrix.shape[1]
    # Linear, ReLU, LayerNorm, Dropout, Linear.
    first = state.get(f"{at}.0.weight", (dim, esm_dim)), state.get(f"{at}.0.bias", (dim,))
    norm = state.get(f"{at}.2.weight", (dim,)), state.get(f"{at}.2.bias", (dim,))
    second = state.get(f"{at}.4.weight", (dim, dim)), state.get(f"{at}.4.bias", (dim,))

    start = checkpoint.gene_rows[START]
    if checkpoint.pretrained:
        genes = sorted(checkpoint.pretrained_genes)
        source = torch.cat([matrix[start][None], _pretrained_rows(checkpoint, genes, esm_dim)])
        order = torch.arange(len(source))
    else:
        # Other special tokens go along as if they were genes: no Census has genes of such names.
        genes = [token for token in checkpoint.gene_rows if token != START]
        source = matrix
        order = torch.tensor([start, *(checkpoint.gene_rows[gene] for gene in genes)])

    table = torch.empty(assays + len(order), dim)
    table[:assays] = state.get(f"aux_embeddings.{checkpoint.aux_column}.weight", (assays, dim))
    for begin in range(0, len(order), TABLE_ROWS_AT_ONCE):
        rows = source[order[begin : begin + TABLE_ROWS_AT_ONCE]]
        hidden = F.layer_norm(F.relu(F.linear(rows, *first)), (dim,), *norm)
        table[assays + begin : assays + begin + len(rows)] = F.linear(hidden, *second)
    return genes, table


def _pretrained_rows(checkpoint: Checkpoint, genes: Sequence[str], esm_dim: int) -> Tensor:
    rows = np.empty((len(genes), esm_dim), np.float32)
    position = {gene: row for row, gene in enumerate(genes)}
    for path in checkpoint.pretrained:
        with h5py.File(path, "r") as file:
            arrays = file["arrays"]
            for key in file["keys"][:]:
                # A gene in several files: the first counts, as in upstream.
                row = position.pop(key.decode(), None)
                if row is None:
                    continue
                values = arrays[key][()]
                if values.shape != (esm_dim,):
                    raise UserError(
                        f"{path}: the embedding of {key.decode()} is {values.shape}; the checkpoint takes ({esm_dim},)."
                    )
                rows[row] = values
    return torch.from_numpy(rows)
