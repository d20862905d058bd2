"""Writes a prepared checkpoint from upstream's state dict: it selects, fuses, checks and casts the weights.

It holds one block of one tensor at a time, because a node may give a shard less memory than the model has weights.
Reading the prepared file belongs in `prepared_checkpoint`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import WEIGHTS, Checkpoint, wrong_width
from census_tf_dagster.inference.checkpoint_config import START
from census_tf_dagster.inference.prepared_checkpoint import DTYPES, join_names
from census_tf_dagster.inference.sealed_file import SEAL, UNSEALED
from census_tf_dagster.inference.state_dict import MATRIX
from census_tf_dagster.inference.tensor_writer import LazyTensor, write_tensors

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

    def finite(name: str, tensor: LazyTensor) -> LazyTensor:
        def blocks() -> Iterator[Tensor]:
            for block in tensor.blocks():
                if not torch.isfinite(block).all():
                    raise _not_finite(checkpoint, precision, name)
                yield block

        return replace(tensor, blocks=blocks) if tensor.dtype.is_floating_point else tensor

    write_tensors(path, {name: finite(name, tensor) for name, tensor in tensors.items()}, metadata)


def _not_finite(checkpoint: Checkpoint, precision: str, name: str) -> UserError:
    return UserError(
        f"{checkpoint.folder}: weights ({name}) leave the range of {precision}; expected finite values: set "
        f"`compute_precision` to {'fp32' if precision == 'bf16' else 'bf16 or fp32'} in the set's YAML."
        if precision != "fp32"
        else f"{checkpoint.folder}: the embeddings of genes and assays ({name}) are not finite; expected "
        "finite values, because otherwise no cell's embedding is finite. Get the checkpoint from its publisher "
        "again."
    )


def _prepared_tensors(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, LazyTensor]:
    weights = checkpoint.folder / WEIGHTS
    shapes = {name: tuple(tensor.shape) for name, tensor in _load_state(weights).items()}
    tensors: dict[str, LazyTensor] = {}

    def add(name: str, *parts: str) -> None:
        if parts[0] not in shapes:
            return

        def blocks() -> Iterator[Tensor]:
            # Each block opens the file anew: pages that were read stay in memory as long as their mapping.
            for part in parts:
                yield _load_state(weights)[part].float().to(dtype)

        rows = sum(shapes[part][0] for part in parts)
        tensors[name] = LazyTensor((rows, *shapes[parts[0]][1:]), dtype, blocks)

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
    genes = _genes_of_table(checkpoint)
    names = join_names(genes)
    rows = len(checkpoint.aux_vocab) + 1 + len(genes)
    return {
        **tensors,
        "genes": LazyTensor(tuple(names.shape), names.dtype, lambda: iter([names])),
        "table": LazyTensor(
            (rows, checkpoint.shape.embed_dim), dtype, lambda: (block.to(dtype) for block in _table(checkpoint, genes))
        ),
    }


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


def _genes_of_table(checkpoint: Checkpoint) -> list[str]:
    """Return the genes in the order of their rows in the table."""
    if checkpoint.pretrained:
        return sorted(checkpoint.pretrained_genes)
    # Other special tokens are kept as if they were genes, because no Census has genes with such names.
    return [token for token in checkpoint.gene_rows if token != START]


@torch.inference_mode()
def _table(checkpoint: Checkpoint, genes: Sequence[str]) -> Iterator[Tensor]:
    """Yield the embeddings of assays, START and genes, float32 ``(rows, embed_dim)``, block by block."""
    weights, dim = checkpoint.folder / WEIGHTS, checkpoint.shape.embed_dim
    state = _load_state(weights)
    # Linear, ReLU, LayerNorm, Dropout, Linear.
    first, norm, second = (
        [state[f"gene_embeddings.mlp.layers.{layer}.{part}"].float() for part in ("weight", "bias")]
        for layer in (0, 2, 4)
    )
    yield state[f"aux_embeddings.{checkpoint.aux_column}.weight"].float()
    esm_dim = state[MATRIX].shape[1]
    del state
    start = checkpoint.gene_rows[START]
    with ExitStack() as stack:
        pretrained = _PretrainedRows(checkpoint, esm_dim, stack) if checkpoint.pretrained else None
        tokens = [START, *genes]
        for begin in range(0, len(tokens), TABLE_ROWS_AT_ONCE):
            block = tokens[begin : begin + TABLE_ROWS_AT_ONCE]
            # As above, each block opens the file anew.
            matrix = _load_state(weights)[MATRIX]
            if pretrained is None:
                rows = matrix[torch.tensor([checkpoint.gene_rows[token] for token in block])].float()
            else:
                rows = pretrained.rows([token for token in block if token != START])
                rows = rows if begin else torch.cat([matrix[start][None].float(), rows])
            del matrix
            hidden = F.layer_norm(F.relu(F.linear(rows, *first)), (dim,), norm[0], norm[1])
            yield F.linear(hidden, *second)


class _PretrainedRows:
    """Reads the embeddings of genes from the files that replace the checkpoint's. The files stay open in `stack`."""

    def __init__(self, checkpoint: Checkpoint, esm_dim: int, stack: ExitStack) -> None:
        self._esm_dim = esm_dim
        self._place: dict[str, tuple[Path, h5py.Group]] = {}
        for path in checkpoint.pretrained:
            file = stack.enter_context(h5py.File(path, "r"))
            for key in file["keys"][:]:
                # If several files have a gene, the first counts, as in upstream.
                self._place.setdefault(key.decode(), (path, file["arrays"]))

    def rows(self, genes: Sequence[str]) -> Tensor:
        """Return the embeddings of genes, float32 ``(n_genes, esm_dim)``."""
        rows = np.empty((len(genes), self._esm_dim), np.float32)
        for row, gene in enumerate(genes):
            path, arrays = self._place[gene]
            values = arrays[gene][()]
            if values.shape != (self._esm_dim,):
                raise wrong_width(path, gene, values.shape, self._esm_dim)
            rows[row] = values
        return torch.from_numpy(rows)
