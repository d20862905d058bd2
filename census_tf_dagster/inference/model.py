"""TranscriptFormer's forward pass, as far as the cell embedding needs it.

Several cells stand in one row, one after the other, without padding: everything but attention works on
tokens, and attention stays within a cell. Neither head (counts, gene ids) is computed.

Rules of the original (`Transcriptformer.forward`, `FlexAttnTransformerLayer`, `mean_embeddings`):

- a layer replaces its input by its normalised input before the skip connection:
  ``h = norm1(x); h = attention(h) + h; h = norm2(h); x = mlp(h) + h``; nothing is normalised at the end;
- attention is causal; the score of a key gets ``log1p(count)`` added, then ``softcap * tanh(score / softcap)``;
- the embedding is the sum over START and the genes, not the assay, **divided by seq_len always**.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from census_tf_dagster.inference.checkpoint import ModelShape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
QUERY_BLOCK = 512
"""Queries per block: keys after a block's last query are never multiplied."""


@dataclass(frozen=True)
class Layer:
    """Weights of one transformer layer; query, key and value projections as one matrix."""

    norm1: tuple[Tensor, Tensor]
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    norm2: tuple[Tensor, Tensor]
    linear1: Tensor
    linear1_bias: Tensor | None
    linear2: Tensor
    linear2_bias: Tensor | None


@dataclass(frozen=True)
class Model:
    """Weights on one device in one precision.

    Attributes
    ----------
    shape
        The model's numbers.
    table
        Embedding of each token after the embedding MLP, ``(n_rows, embed_dim)``.
    pooled_from
        First table row that is pooled: assays stand before it.
    layers
        The transformer.
    """

    shape: ModelShape
    table: Tensor
    pooled_from: int
    layers: tuple[Layer, ...]

    @torch.inference_mode()
    def embed(self, tokens: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        """Embed the packed cells of one batch.

        Parameters
        ----------
        tokens, bias
            Table rows (int) and attention biases (float32) of all tokens, ``(n_tokens,)``.
        offsets
            Cell boundaries on the CPU, int64 ``(n_cells + 1,)``.

        Returns
        -------
        Tensor
            float32 ``(n_cells, embed_dim)``.
        """
        bounds = offsets.tolist()
        x = F.embedding(tokens, self.table)
        for layer in self.layers:
            x = self._layer(layer, x, bias, bounds)
        lengths = offsets.diff().to(x.device)
        cell_of_token = torch.repeat_interleave(torch.arange(len(lengths), device=x.device), lengths)
        pooled = (tokens >= self.pooled_from).to(torch.float32)
        sums = torch.zeros(len(lengths), self.shape.embed_dim, dtype=torch.float32, device=x.device)
        sums.index_add_(0, cell_of_token, x.float() * pooled[:, None])
        return sums / self.shape.seq_len

    def _layer(self, layer: Layer, x: Tensor, bias: Tensor, bounds: list[int]) -> Tensor:
        width = (self.shape.embed_dim,)
        h = F.layer_norm(x, width, *layer.norm1)
        q, k, v = F.linear(h, layer.qkv, layer.qkv_bias).view(len(h), 3, self.shape.num_heads, -1).unbind(1)
        attended = torch.empty_like(h)
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            cell = slice(start, stop)
            attended[cell] = cell_attention(q[cell], k[cell], v[cell], bias[cell], self.shape.softcap).flatten(1)
        h = F.linear(attended, layer.out, layer.out_bias) + h
        h = F.layer_norm(h, width, *layer.norm2)
        hidden = ACTIVATIONS[self.shape.activation](F.linear(h, layer.linear1, layer.linear1_bias))
        return F.linear(hidden, layer.linear2, layer.linear2_bias) + h


def cell_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, softcap: float) -> Tensor:
    """Causal attention within one cell, in float32 where it sums.

    Parameters
    ----------
    q, k, v
        ``(n_tokens, heads, head_dim)``.
    bias
        Added to each key's scores, ``(n_tokens,)``.
    softcap
        Scores are capped smoothly at this; 0: not at all.

    Returns
    -------
    Tensor
        ``(n_tokens, heads, head_dim)``, the dtype of `v`.
    """
    q, k, v = (part.transpose(0, 1) for part in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    blocks = []
    for start in range(0, q.shape[1], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[1])
        scores = (q[:, start:stop] @ k[:, :stop].transpose(1, 2)).float() * scale + bias[:stop]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        future = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(1 + start)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype)
        blocks.append(weights @ v[:, :stop])
    return torch.cat(blocks, dim=1).transpose(0, 1)
