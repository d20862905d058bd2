"""A checkpoint with which only the cells of one gene exceed the range of a precision."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from census_tf_dagster.demo.checkpoint import SPECIAL_TOKENS, build_checkpoint

OVERFLOWS_FP16 = 3e4
"""A gain with which a hidden unit exceeds 65,504 and stays finite in bf16 and fp32."""
OVERFLOWS_FP32 = 1e38
"""A gain with which it is infinite in all of them."""


def build_overflowing(
    folder: Path, genes: Sequence[str], assays: Sequence[str], gene: str, gain: float, **sizes: Any
) -> None:
    """Write a checkpoint as `build_checkpoint` does, whose first layer multiplies a mark of `gene` by `gain`.

    The first feature of a token is about 5 for this gene and negative for every other token; attention does not
    change it. One hidden unit of the first layer is that feature times `gain`, so GELU makes 0 of it for the others.
    """
    build_checkpoint(folder, {"o": genes}, assays, **sizes)
    path = folder / "model_weights.pt"
    state = torch.load(path, weights_only=True)

    def only(name: str, value: float) -> None:
        """Let the first output of a projection be its first input times a value."""
        state[name][0] = 0
        state[name][0, 0] = value

    esm2, mlp = state["gene_embeddings.embedding.weight"], "gene_embeddings.mlp.layers"
    esm2[:, 0] = 0
    esm2[len(SPECIAL_TOKENS) + list(genes).index(gene), 0] = 1e4
    for layer in ("0", "4"):
        only(f"{mlp}.{layer}.weight", 1.0)
        state[f"{mlp}.{layer}.bias"][0] = 0
    state["aux_embeddings.assay.weight"][:, 0] = -2
    first = "transformer_encoder.encoder_layers.0"
    for norm in (f"{mlp}.2", f"{first}.norm1", f"{first}.norm2"):
        state[f"{norm}.weight"][0], state[f"{norm}.bias"][0] = 1, 0
    only(f"{first}.self_attn.linears.3.weight", 0.0)
    only(f"{first}.linear1.weight", gain)
    torch.save(state, path)
