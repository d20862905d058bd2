"""The sizes and constants in which TranscriptFormer models differ. Reading them belongs in `checkpoint_config`."""

from dataclasses import dataclass

ACTIVATIONS = ("gelu", "relu", "silu")
"""Activations of the feed-forward part that upstream knows."""


@dataclass(frozen=True)
class ModelShape:
    """The entries of `model.model_config` on which the embedding depends."""

    embed_dim: int
    num_heads: int
    num_layers: int
    model_dim: int
    seq_len: int
    softcap: float
    log_counts_eps: float
    activation: str
