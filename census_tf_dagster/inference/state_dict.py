"""Lists the tensors of a TranscriptFormer model, and checks that a file holds exactly these.

Names and shapes are those of `Transcriptformer` in upstream's ``model.py`` and ``layers.py`` (0.6.1). Upstream loads
them strictly: a tensor that is missing, superfluous or of another shape is an error. Reading the file belongs in
`torch_file`.
"""

from collections.abc import Mapping
from pathlib import Path

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint_config import CheckpointConfig
from census_tf_dagster.inference.pickled_tensors import PickledTensor
from census_tf_dagster.inference.torch_file import ITEM_BYTES

MATRIX = "gene_embeddings.embedding.weight"
HEADS = ("mu.", "gene_id_head.")
"""Prefixes of the tensors that only the count head and the gene-id head use. No embedding needs them."""
PREFIXES = ("module._orig_mod.", "_orig_mod.module.", "module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, torch.compile and training modules put before each name."""

Shapes = dict[str, tuple[int, ...]]


def expected_tensors(config: CheckpointConfig, *, tokens: int, aux_values: int, esm_dim: int) -> Shapes:
    """Return the shape of each tensor of a model.

    Parameters
    ----------
    config
        The checkpoint's configuration.
    tokens
        Number of genes and special tokens of the vocabulary.
    aux_values
        Number of values of the auxiliary column, including ``unknown``.
    esm_dim
        Width of the gene embedding matrix.
    """
    shape = config.shape
    dim = shape.embed_dim
    found: Shapes = {MATRIX: (tokens, esm_dim), f"aux_embeddings.{config.aux_column}.weight": (aux_values, dim)}
    found |= _mlp("gene_embeddings.mlp", esm_dim, dim, dim)
    for i in range(shape.num_layers):
        at = f"transformer_encoder.encoder_layers.{i}"
        for norm in ("norm1", "norm2"):
            found |= {f"{at}.{norm}.weight": (dim,), f"{at}.{norm}.bias": (dim,)}
        for k in range(4):
            found |= _linear(f"{at}.self_attn.linears.{k}", dim, dim, bias=config.attn_bias)
        found |= _linear(f"{at}.linear1", dim, shape.model_dim, bias=config.fw_bias)
        found |= _linear(f"{at}.linear2", shape.model_dim, dim, bias=config.fw_bias)
    found["mu.gene_embedding.weight"] = (tokens, 1)
    found |= _mlp("mu.mlp", 2 * dim, 2 * dim // 4, 1)
    if config.gene_head_dim is not None:
        found |= _mlp("gene_id_head", dim, config.gene_head_dim, tokens)
    return found


def require_state(path: Path, stored: Mapping[str, PickledTensor], config: CheckpointConfig, **sizes: int) -> None:
    """Raise an error if a file's tensors are not exactly those of the model.

    Parameters
    ----------
    path
        The file.
    stored
        Its tensors by name.
    config
        The checkpoint's configuration.
    sizes
        ``tokens`` and ``aux_values`` of `expected_tensors`.

    Raises
    ------
    UserError
        When tensors are missing, superfluous, of another shape, or not floating-point. The message names the first.
    """
    matrix = stored.get(MATRIX)
    esm_dim = matrix.shape[1] if matrix is not None and len(matrix.shape) == 2 else 0
    expected = expected_tensors(config, esm_dim=esm_dim, **sizes)
    missing = [name for name in expected if name not in stored]
    for prefix in PREFIXES:
        if missing and all(f"{prefix}{name}" in stored for name in missing):
            raise UserError(
                f"{path}: the names of its tensors begin with {prefix!r}, as a training wrapper saves them; expected "
                f"{MATRIX} and so on. Save them without it: torch.save({{name.removeprefix({prefix!r}): tensor for "
                "name, tensor in torch.load(path, weights_only=True).items()}, path)."
            )
    if matrix is not None and matrix.shape[:1] != (sizes["tokens"],):
        raise UserError(
            f"{path}: {MATRIX} has {matrix.shape[0] if matrix.shape else 0} rows; expected {sizes['tokens']}, one for "
            f"each special token and each gene in {path.parent / 'vocabs'}. Get config.json, vocabs and "
            "model_weights.pt from the same checkpoint again."
        )
    left_over = [name for name in stored if name not in expected]
    faults = []
    if missing:
        faults.append(f"it has no {_first(missing)}")
    if left_over:
        faults.append(f"it has {_first(left_over)}, which such a model does not have")
    other = [name for name in expected if name in stored and stored[name].shape != expected[name]]
    if other:
        faults.append(f"{other[0]} is {stored[other[0]].shape}; config.json says {expected[other[0]]}")
    numbers = [name for name, tensor in stored.items() if tensor.kind not in ITEM_BYTES]
    if numbers and not faults:
        faults.append(f"{numbers[0]} is a {stored[numbers[0]].kind}; expected floating-point numbers")
    if faults:
        raise UserError(
            f"{path} does not hold the weights of the model in config.json: {'; '.join(faults)}. Get config.json, "
            "vocabs and model_weights.pt from the same checkpoint again."
        )


def _first(names: list[str]) -> str:
    return names[0][:100] + (f" (and {len(names) - 1} more)" if names[1:] else "")


def _linear(name: str, n_in: int, n_out: int, *, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (n_out, n_in)}
    return weight | {f"{name}.bias": (n_out,)} if bias else weight


def _mlp(name: str, n_in: int, hidden: int, n_out: int) -> Shapes:
    # Linear, ReLU, LayerNorm, Dropout, Linear.
    first, last = _linear(f"{name}.layers.0", n_in, hidden), _linear(f"{name}.layers.4", hidden, n_out)
    return first | {f"{name}.layers.2.weight": (hidden,), f"{name}.layers.2.bias": (hidden,)} | last
