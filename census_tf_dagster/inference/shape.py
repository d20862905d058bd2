"""The numbers that make one TranscriptFormer model differ from another."""

from dataclasses import dataclass

ACTIVATIONS = ("gelu", "relu", "silu")
"""Those of the feed-forward part that upstream knows."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of `model.model_config` that the embedding depends on."""

    embed_dim: int
    num_heads: int
    num_layers: int
    model_dim: int
    seq_len: int
    softcap: float
    log_counts_eps: float
    activation: str
