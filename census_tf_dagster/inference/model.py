"""Computes TranscriptFormer's forward pass, as far as the cell embedding needs it.

A row holds several cells, one after the other. Everything except attention works on single tokens, and attention stays
within a cell. The heads (counts, gene ids) are not computed.

Upstream's rules (`Transcriptformer.forward`, `FlexAttnTransformerLayer`, `mean_embeddings`):

- A layer replaces its input by its normalised input before the skip connection:
  ``h = norm1(x); h = attention(h) + h; h = norm2(h); x = mlp(h) + h``. Nothing is normalised at the end.
- The embedding is the sum over START and the genes, not the assay, **always divided by seq_len**.

Two shortcuts are exact. The model has no positions, so the first layer's norm and projections depend on the token alone
and are kept as a table. The last projection is linear, so tokens are pooled before it, not after.

Attention belongs in `attention`, packing cells into rows in `packing`, loading weights in `prepared_checkpoint`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from census_tf_dagster.inference.attention import (
    TRITON,
    PackedKernel,
    compiled,
    packed_attention,
    packed_terms,
    plain_attention,
    to_device,
)
from census_tf_dagster.inference.packing import Row
from census_tf_dagster.inference.pooling import pool
from census_tf_dagster.inference.shape import ModelShape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class QkvProjection(NamedTuple):
    """The first weights of a layer: its first norm, and the query, key and value projections as one matrix."""

    norm_weight: Tensor
    norm_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None


class BlockWeights(NamedTuple):
    """The other weights of a layer."""

    out: Tensor
    out_bias: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    linear1: Tensor
    linear1_bias: Tensor | None
    linear2: Tensor
    linear2_bias: Tensor | None


Attention = tuple[Callable[..., Tensor], tuple[Any, ...]]
"""A function of query, key, value and further arguments, and those arguments."""
Projected = tuple[Tensor, Tensor]
"""Normalised input and projections of a layer: ``(n, embed_dim)`` and ``(n, 3 * embed_dim)``."""


def project(x: Tensor, projection: QkvProjection) -> Projected:
    """Compute the start of a layer: normalise, then project to query, key and value."""
    h = F.layer_norm(x, x.shape[-1:], projection.norm_weight, projection.norm_bias)
    return h, F.linear(h, projection.qkv, projection.qkv_bias)


def to_hidden(
    projected: Projected, weights: BlockWeights, attend: Attention, heads: int, activation: Callable[[Tensor], Tensor]
) -> Projected:
    """Compute a layer up to the MLP's hidden layer; return the skip connection and the hidden layer."""
    h, qkv = projected
    q, k, v = qkv.view(len(h), 3, heads, -1).unbind(1)
    attention, terms = attend
    attended = attention(q, k, v, *terms).reshape(h.shape)
    h = F.linear(attended, weights.out, weights.out_bias) + h
    h = F.layer_norm(h, h.shape[-1:], weights.norm_weight, weights.norm_bias)
    return h, activation(F.linear(h, weights.linear1, weights.linear1_bias))


def block(
    projected: Projected,
    weights: BlockWeights,
    following: QkvProjection,
    attend: Attention,
    heads: int,
    activation: Callable[[Tensor], Tensor],
) -> Projected:
    """Compute the rest of a layer and the start of the next."""
    h, hidden = to_hidden(projected, weights, attend, heads, activation)
    return project(F.linear(hidden, weights.linear2, weights.linear2_bias) + h, following)


@dataclass(frozen=True)
class Model:
    """Weights on one device in one precision.

    Attributes
    ----------
    shape
        The model's sizes and constants.
    table
        Each token's normalised input and projections at the first layer: ``(n_rows, embed_dim)`` and ``(n_rows,
        3 * embed_dim)``.
    pooled_from
        First table row that is pooled. The rows before it are assays.
    projections
        First weights of all layers except the first.
    blocks
        Other weights of all layers.
    last_linear2
        A second copy of the last layer's last projection, in float32.
    kernel
        The attention kernel of packed rows.
    """

    shape: ModelShape
    table: Projected
    pooled_from: int
    projections: tuple[QkvProjection, ...]
    blocks: tuple[BlockWeights, ...]
    last_linear2: Tensor
    kernel: PackedKernel = TRITON

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.last_linear2.device

    @torch.inference_mode()
    def embed(self, row: Row, row_length: int | None = None) -> Tensor:
        """Embed the cells of a row.

        Parameters
        ----------
        row
            The cells.
        row_length
            Pad the row to this length and use FlexAttention, compiled on CUDA; None: no padding, attend cell by cell.

        Returns
        -------
        Tensor
            float32 ``(n_cells, embed_dim)``, on the device.
        """
        used = len(row.tokens)
        padding = 0 if row_length is None else row_length - used
        tokens = to_device(np.pad(row.tokens, (0, padding)), self.device)
        bias = to_device(np.pad(row.bias, (0, padding)), self.device)
        attend: Attention
        if row_length is None:
            attend = plain_attention, (bias, tuple(row.offsets.tolist()), self.shape.softcap)
        else:
            head_dim = self.shape.embed_dim // self.shape.num_heads
            attend = packed_attention, packed_terms(bias, row.offsets, self.shape.softcap, head_dim, self.kernel)
        functions: tuple[Callable[..., Projected], Callable[..., Projected]] = block, to_hidden
        if row_length is not None and self.device.type == "cuda":
            functions = compiled(block), compiled(to_hidden)
        go_on, go_to_hidden = functions
        heads, activation = self.shape.num_heads, ACTIVATIONS[self.shape.activation]
        projected = F.embedding(tokens, self.table[0]), F.embedding(tokens, self.table[1])
        for weights, following in zip(self.blocks[:-1], self.projections, strict=True):
            projected = go_on(projected, weights, following, attend, heads, activation)
        last = self.blocks[-1]
        h, hidden = go_to_hidden(projected, last, attend, heads, activation)

        # An assay, which comes first in its cell, is not pooled.
        first = row.offsets[:-1] + (row.tokens[row.offsets[:-1]] < self.pooled_from)
        bounds = np.stack([first, row.offsets[1:]], axis=1)
        summed = F.linear(pool(hidden, bounds), self.last_linear2) + pool(h, bounds)
        if last.linear2_bias is not None:
            pooled = to_device(bounds[:, 1] - bounds[:, 0], self.device)
            summed += pooled[:, None] * last.linear2_bias.float()
        return summed / self.shape.seq_len


def first_table(embeddings: Tensor, projection: QkvProjection, rows_at_once: int = 4096) -> Projected:
    """Compute the start of the first layer for every row of the embedding table."""
    starts = range(0, len(embeddings), rows_at_once)
    parts = [project(embeddings[start : start + rows_at_once], projection) for start in starts]
    return torch.cat([h for h, _ in parts]), torch.cat([qkv for _, qkv in parts])
