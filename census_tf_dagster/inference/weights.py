"""From a checkpoint's weights to a `Model`: only what the embedding needs, checked, in the wanted precision."""

from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import START, Checkpoint
from census_tf_dagster.inference.model import ACTIVATIONS, Layer, Model
from census_tf_dagster.inference.tokens import Tokenizer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TABLE_ROWS_AT_ONCE = 4096


def load_model(checkpoint: Checkpoint, tokenizer: Tokenizer, precision: str, device: torch.device) -> Model:
    """Load the model for one gene axis.

    The embedding MLP is applied here, once for each gene that can occur, in float32.

    Parameters
    ----------
    checkpoint, tokenizer
        What to load, and which rows of the embedding matrix.
    precision
        A key of `DTYPES`: of weights and activations.
    device
        Where the model computes.

    Raises
    ------
    UserError
        When a weight is missing or has another shape than the configuration says.
    """
    state = _State(checkpoint.folder / "model_weights.pt")
    shape = checkpoint.shape
    dim, hidden, dtype = shape.embed_dim, shape.model_dim, DTYPES[precision]
    if shape.activation not in ACTIVATIONS:
        raise UserError(f"{checkpoint.folder}: activation {shape.activation!r}; expected one of {sorted(ACTIVATIONS)}.")

    def weight(name: str, *size: int) -> Tensor:
        return state.get(name, size).to(device=device, dtype=dtype)

    def bias(name: str, size: int) -> Tensor | None:
        return weight(name, size) if name in state else None

    layers = []
    for number in range(shape.num_layers):
        at = f"transformer_encoder.encoder_layers.{number}"
        projections = [f"{at}.self_attn.linears.{i}" for i in range(4)]
        qkv_bias = [part for name in projections[:3] if (part := bias(f"{name}.bias", dim)) is not None]
        layers.append(
            Layer(
                norm1=(weight(f"{at}.norm1.weight", dim), weight(f"{at}.norm1.bias", dim)),
                qkv=torch.cat([weight(f"{name}.weight", dim, dim) for name in projections[:3]]),
                qkv_bias=torch.cat(qkv_bias) if qkv_bias else None,
                out=weight(f"{projections[3]}.weight", dim, dim),
                out_bias=bias(f"{projections[3]}.bias", dim),
                norm2=(weight(f"{at}.norm2.weight", dim), weight(f"{at}.norm2.bias", dim)),
                linear1=weight(f"{at}.linear1.weight", hidden, dim),
                linear1_bias=bias(f"{at}.linear1.bias", hidden),
                linear2=weight(f"{at}.linear2.weight", dim, hidden),
                linear2_bias=bias(f"{at}.linear2.bias", dim),
            )
        )
    return Model(
        shape=shape,
        table=_embedding_table(checkpoint, tokenizer, state, device).to(dtype),
        pooled_from=tokenizer.start_row,
        layers=tuple(layers),
    )


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
def _embedding_table(checkpoint: Checkpoint, tokenizer: Tokenizer, state: _State, device: torch.device) -> Tensor:
    dim = checkpoint.shape.embed_dim
    at = "gene_embeddings.mlp.layers"
    matrix = state.get("gene_embeddings.embedding.weight", (len(checkpoint.gene_rows), -1))
    esm_dim = matrix.shape[1]

    def weight(name: str, *size: int) -> Tensor:
        return state.get(f"{at}.{name}", size).to(device)

    # Linear, ReLU, LayerNorm, Dropout, Linear.
    first = weight("0.weight", dim, esm_dim), weight("0.bias", dim)
    norm = weight("2.weight", dim), weight("2.bias", dim)
    second = weight("4.weight", dim, dim), weight("4.bias", dim)

    start = matrix[checkpoint.gene_rows[START]][None]
    if checkpoint.pretrained:
        source = torch.cat([start, _pretrained_rows(checkpoint, tokenizer.known_genes, esm_dim)])
        order = torch.arange(len(source))
    else:
        source = matrix
        order = torch.tensor([checkpoint.gene_rows[gene] for gene in (START, *tokenizer.known_genes)])

    assays = state.get(f"aux_embeddings.{checkpoint.aux_column}.weight", (tokenizer.start_row, dim))
    table = torch.empty(tokenizer.start_row + len(order), dim, device=device)
    table[: tokenizer.start_row] = assays.to(device)
    for begin in range(0, len(order), TABLE_ROWS_AT_ONCE):
        rows = source[order[begin : begin + TABLE_ROWS_AT_ONCE]].to(device)
        hidden = F.layer_norm(F.relu(F.linear(rows, *first)), (dim,), *norm)
        row = tokenizer.start_row + begin
        table[row : row + len(rows)] = F.linear(hidden, *second)
    return table


def _pretrained_rows(checkpoint: Checkpoint, genes: tuple[str, ...], esm_dim: int) -> Tensor:
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
