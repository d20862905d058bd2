"""Writes a prepared checkpoint from upstream's state dict: it selects, fuses, checks and casts the weights.

Reading the prepared file belongs in `prepared_checkpoint`.
"""

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
from census_tf_dagster.inference.checkpoint import WEIGHTS, Checkpoint, wrong_width
from census_tf_dagster.inference.checkpoint_config import START
from census_tf_dagster.inference.prepared_checkpoint import DTYPES, join_names
from census_tf_dagster.inference.sealed_file import SEAL, UNSEALED
from census_tf_dagster.inference.state_dict import MATRIX

TABLE_ROWS_AT_ONCE = 4096


def write_prepared(checkpoint: Checkpoint, precision: str, path: Path) -> None:
    """Write a checkpoint's prepared file, unsealed: apply the embedding MLP in float32, then cast everything.

    Parameters
    ----------
    checkpoint
        The result of `read_checkpoint`, which guarantees that all tensors exist.
    precision
        ``fp32``, ``fp16`` or ``bf16``.
    path
        The file to write.

    Raises
    ------
    UserError
        When a value is not finite in that precision.
    """
    metadata = {
        SEAL: UNSEALED,
        "precision": precision,
        "shape": json.dumps(asdict(checkpoint.shape)),
        "assays": str(len(checkpoint.aux_vocab)),
    }
    tensors = _prepared_tensors(checkpoint, DTYPES[precision])
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"{checkpoint.folder}: weights ({name}) leave the range of {precision}; expected finite values: set "
                f"`compute_precision` to {'fp32' if precision == 'bf16' else 'bf16 or fp32'} in the set's YAML."
                if precision != "fp32"
                else f"{checkpoint.folder}: the embeddings of genes and assays ({name}) are not finite; expected "
                "finite values, because otherwise no cell's embedding is finite. Get the checkpoint from its publisher "
                "again."
            )
    save_file(tensors, path, metadata)


def _prepared_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    state = _load_state(checkpoint.folder / WEIGHTS)
    tensors: dict[str, Tensor] = {}

    def add(name: str, *parts: str) -> None:
        if parts[0] in state:
            tensors[name] = torch.cat([state[part].float() for part in parts]).to(dtype)

    for i in range(checkpoint.shape.num_layers):
        at = f"transformer_encoder.encoder_layers.{i}"
        projections = [f"{at}.self_attn.linears.{k}" for k in range(4)]
        for norm in ("norm1", "norm2"):
            add(f"{i}.{norm}.weight", f"{at}.{norm}.weight")
            add(f"{i}.{norm}.bias", f"{at}.{norm}.bias")
        add(f"{i}.qkv", *(f"{name}.weight" for name in projections[:3]))
        add(f"{i}.qkv_bias", *(f"{name}.bias" for name in projections[:3]))
        add(f"{i}.out", f"{projections[3]}.weight")
        add(f"{i}.out_bias", f"{projections[3]}.bias")
        for linear in ("linear1", "linear2"):
            add(f"{i}.{linear}", f"{at}.{linear}.weight")
            add(f"{i}.{linear}_bias", f"{at}.{linear}.bias")
    genes, table = _embedding_table(checkpoint, state)
    return {**tensors, "genes": join_names(genes), "table": table.to(dtype)}


def _load_state(path: Path) -> Mapping[str, Tensor]:
    """Open a state dict on disk. Tensors are mapped into memory and read when they are used."""
    try:
        # weights_only admits only tensors, so no code of the file runs.
        state: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected a state dict of tensors. Get the checkpoint from its publisher "
            "again."
        ) from error
    return state


@torch.inference_mode()
def _embedding_table(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> tuple[list[str], Tensor]:
    """Return the genes, and the embeddings of assays, START and genes, float32 ``(n_rows, embed_dim)``."""
    dim, assays = checkpoint.shape.embed_dim, len(checkpoint.aux_vocab)
    matrix = state[MATRIX]
    esm_dim = matrix.shape[1]
    # Linear, ReLU, LayerNorm, Dropout, Linear.
    first, norm, second = (
        [state[f"gene_embeddings.mlp.layers.{layer}.{part}"].float() for part in ("weight", "bias")]
        for layer in (0, 2, 4)
    )

    start = checkpoint.gene_rows[START]
    if checkpoint.pretrained:
        genes = sorted(checkpoint.pretrained_genes)
        source = torch.cat([matrix[start][None].float(), _pretrained_rows(checkpoint, genes, esm_dim)])
        order = torch.arange(len(source))
    else:
        # Other special tokens are kept as if they were genes, because no Census has genes with such names.
        genes = [token for token in checkpoint.gene_rows if token != START]
        source = matrix
        order = torch.tensor([start, *(checkpoint.gene_rows[gene] for gene in genes)])

    table = torch.empty(assays + len(order), dim)
    table[:assays] = state[f"aux_embeddings.{checkpoint.aux_column}.weight"]
    for begin in range(0, len(order), TABLE_ROWS_AT_ONCE):
        rows = source[order[begin : begin + TABLE_ROWS_AT_ONCE]].float()
        hidden = F.layer_norm(F.relu(F.linear(rows, *first)), (dim,), norm[0], norm[1])
        table[assays + begin : assays + begin + len(rows)] = F.linear(hidden, *second)
    return genes, table


def _pretrained_rows(checkpoint: Checkpoint, genes: Sequence[str], esm_dim: int) -> Tensor:
    rows = np.empty((len(genes), esm_dim), np.float32)
    position = {gene: row for row, gene in enumerate(genes)}
    for path in checkpoint.pretrained:
        with h5py.File(path, "r") as file:
            arrays = file["arrays"]
            for key in file["keys"][:]:
                # If several files have a gene, the first counts, as in upstream.
                row = position.pop(key.decode(), None)
                if row is None:
                    continue
                values = arrays[key][()]
                if values.shape != (esm_dim,):
                    raise wrong_width(path, key.decode(), values.shape, esm_dim)
                rows[row] = values
    return torch.from_numpy(rows)
