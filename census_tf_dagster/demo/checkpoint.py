"""Writes a small checkpoint with random weights, in the layout of TranscriptFormer 0.6.1.

Names and shapes follow that release's ``model.py``, ``layers.py`` and ``vocab.py``. Its command line loads the result
with a strict state dict. Reading a checkpoint belongs in `inference.checkpoint`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import torch

from census_tf_dagster.errors import UserError

SPECIAL_TOKENS = ("unknown", "[START]", "[END]", "[RD]", "[CELL]", "[PAD]", "[MASK]")
UNKNOWN_ASSAY = "unknown"

# With this gain, attention scores have a standard deviation near 4. So attention is far from uniform, and the softcap
# of 10 has an effect.
_QUERY_KEY_GAIN = 2.0


def build_checkpoint(
    folder: Path,
    gene_ids: Sequence[str] | Mapping[str, Sequence[str]],
    assays: Sequence[str],
    *,
    embed_dim: int = 64,
    num_heads: int = 4,
    num_layers: int = 2,
    model_dim: int = 128,
    esm_dim: int = 96,
    seq_len: int = 2047,
    block_len: int = 128,
    gene_head_dim: int = 32,
    seed: int = 0,
) -> None:
    """Write ``config.json``, ``model_weights.pt`` and ``vocabs/``.

    Parameters
    ----------
    folder
        Folder to write; created if it is missing.
    gene_ids
        The vocabulary: ``{species: ids}`` becomes one ``<species>_gene.h5`` per species, in that order; a plain
        sequence becomes ``demo_gene.h5``.
    assays
        Labels that the model knows; ``"unknown"`` is added as index 0.
    embed_dim, num_heads, num_layers, model_dim, esm_dim
        Sizes of the model: token width, attention heads, layers, feed-forward width, width of the protein
        embeddings. The real models have 2048, 16, 12, 2048 and 2560.
    seq_len, block_len
        Number of gene positions, and the attention block, which must divide ``seq_len + 1``.
    gene_head_dim
        Hidden width of the gene-id head, which no embedding needs; 2048 in the real models.
    seed
        Equal arguments give equal weights.

    Raises
    ------
    UserError
        If a gene or assay occurs twice, or sizes are not multiples.
    """
    species = dict(gene_ids) if isinstance(gene_ids, Mapping) else {"demo": gene_ids}
    genes = [gene for ids in species.values() for gene in ids]
    _require_unique("gene", genes)
    _require_unique("assay", [UNKNOWN_ASSAY, *assays])
    if embed_dim % (2 * num_heads) or (seq_len + 1) % block_len:
        raise UserError(
            f"embed_dim is {embed_dim}, num_heads {num_heads}, seq_len {seq_len}, block_len {block_len}; expected "
            "embed_dim as a multiple of 2 x num_heads and seq_len + 1 as a multiple of block_len. Change the sizes; "
            "the real models have 2048, 16, 2047, 128."
        )
    vocabs = folder / "vocabs"
    vocabs.mkdir(parents=True, exist_ok=True)
    assay_vocab = {assay: index for index, assay in enumerate([UNKNOWN_ASSAY, *assays])}
    (vocabs / "assay_vocab.json").write_text(json.dumps(assay_vocab, indent=1))
    # Upstream makes the special tokens' embeddings this way.
    special = np.random.RandomState(42).rand(len(SPECIAL_TOKENS), esm_dim).astype(np.float32)
    tables = [special]
    rng = np.random.default_rng([0, seed])
    for name, ids in species.items():
        tables.append(_protein_embeddings(rng, len(ids), esm_dim))
        _write_gene_h5(vocabs / f"{name}_gene.h5", ids, tables[-1])

    model_config = {
        "log_counts_eps": 1e-6,
        "num_heads": num_heads,
        "num_layers": num_layers,
        "model_dim": model_dim,
        "embed_dim": embed_dim,
        "dropout": 0.1,
        "activation": "gelu",
        "attn_bias": False,
        "fw_bias": False,
        "mu_link_fn": "softmax",
        "softcap": 10,
        "seq_len": seq_len,
        "aux_len": 1,
        "block_len": block_len,
        "gene_head_hidden_dim": gene_head_dim,
        "use_aux": True,
        "compile_block_mask": True,
    }
    config = {
        "model": {
            "model_config": {"_target_": "transcriptformer.data.dataclasses.ModelConfig", **model_config},
            "loss_config": {
                "_target_": "transcriptformer.data.dataclasses.LossConfig",
                "gene_id_loss_weight": 1.0,
                "softplus_approx": True,
            },
            "data_config": _data_config([f"{name}_gene.h5" for name in species]),
        }
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))

    generator = torch.Generator().manual_seed(seed)
    weights = _weights(
        np.concatenate(tables), len(assay_vocab), embed_dim, model_dim, num_layers, gene_head_dim, generator
    )
    torch.save(weights, folder / "model_weights.pt")


def build_pretrained_embeddings(path: Path, gene_ids: Sequence[str], esm_dim: int, seed: int) -> None:
    """Write protein embeddings of a species outside the vocabulary, as in upstream's ``all_embeddings``.

    Parameters
    ----------
    path
        The ``.h5`` file.
    gene_ids
        Genes of the species, each once.
    esm_dim
        The `esm_dim` of the checkpoint for which the file is made.
    seed
        Equal arguments give equal embeddings.

    Raises
    ------
    UserError
        If a gene occurs twice.
    """
    _require_unique("gene", gene_ids)
    _write_gene_h5(path, gene_ids, _protein_embeddings(np.random.default_rng([1, seed]), len(gene_ids), esm_dim))


def _data_config(esm2_mappings: list[str]) -> dict[str, object]:
    return {
        "_target_": "transcriptformer.data.dataclasses.DataConfig",
        "aux_vocab_path": None,
        "pin_memory": True,
        "aux_cols": "assay",
        "gene_col_name": "ensembl_id",
        "clip_counts": 30,
        "filter_to_vocabs": True,
        "filter_outliers": 0.0,
        "pad_zeros": True,
        "normalize_to_scale": 0,
        "n_data_workers": 0,
        "sort_genes": False,
        "randomize_genes": False,
        "min_expressed_genes": 0,
        "gene_pad_token": "[PAD]",
        "aux_pad_token": UNKNOWN_ASSAY,
        "esm2_mappings": esm2_mappings,
        "special_tokens": list(SPECIAL_TOKENS),
        "esm2_mappings_path": None,
        "use_raw": None,
        "remove_duplicate_genes": False,
    }


def _weights(
    embeddings: npt.NDArray[np.float32],
    n_assays: int,
    embed_dim: int,
    model_dim: int,
    num_layers: int,
    gene_head_dim: int,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    n_genes, esm_dim = embeddings.shape
    state: dict[str, torch.Tensor] = {}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def linear(name: str, n_in: int, n_out: int, gain: float = 1.0, bias: bool = True) -> None:
        state[f"{name}.weight"] = normal(n_out, n_in) * (gain / n_in**0.5)
        if bias:
            state[f"{name}.bias"] = 0.1 * normal(n_out)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1.0 + 0.2 * normal(width)
        state[f"{name}.bias"] = 0.1 * normal(width)

    def mlp(name: str, n_in: int, n_hidden: int, n_out: int) -> None:
        # These are positions in upstream's nn.Sequential. ReLU (1) and Dropout (3) have no weights.
        linear(f"{name}.layers.0", n_in, n_hidden)
        norm(f"{name}.layers.2", n_hidden)
        linear(f"{name}.layers.4", n_hidden, n_out)

    state["gene_embeddings.embedding.weight"] = torch.from_numpy(embeddings)
    mlp("gene_embeddings.mlp", esm_dim, embed_dim, embed_dim)
    state["aux_embeddings.assay.weight"] = normal(n_assays, embed_dim)
    for index in range(num_layers):
        layer = f"transformer_encoder.encoder_layers.{index}"
        linear(f"{layer}.linear1", embed_dim, model_dim, bias=False)
        linear(f"{layer}.linear2", model_dim, embed_dim, bias=False)
        for part, gain in enumerate((_QUERY_KEY_GAIN, _QUERY_KEY_GAIN, 1.0, 1.0)):
            linear(f"{layer}.self_attn.linears.{part}", embed_dim, embed_dim, gain, bias=False)
        norm(f"{layer}.norm1", embed_dim)
        norm(f"{layer}.norm2", embed_dim)
    # No embedding needs the count and gene-id heads, but the state dict is strict.
    state["mu.gene_embedding.weight"] = normal(n_genes, 1)
    mlp("mu.mlp", 2 * embed_dim, embed_dim // 2, 1)
    mlp("gene_id_head", embed_dim, gene_head_dim, n_genes)
    return state


def _protein_embeddings(rng: np.random.Generator, n: int, width: int) -> npt.NDArray[np.float32]:
    # Mean ESM-2 embeddings share a large part across all species, and genes differ from it a little.
    common = np.random.default_rng(width).normal(0.0, 0.5, width)
    return (common + rng.normal(0.0, 0.3, (n, width))).astype(np.float32)


def _write_gene_h5(path: Path, gene_ids: Sequence[str], embeddings: npt.NDArray[np.float32]) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        file.create_dataset("keys", data=np.array(gene_ids, dtype="S"))
        arrays = file.create_group("arrays")
        # h5py's low-level functions are twice as fast, which matters for 20,000 datasets, one per gene.
        space = h5py.h5s.create_simple((embeddings.shape[1],))
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_layout(h5py.h5d.COMPACT)
        for gene, row in zip(gene_ids, embeddings, strict=True):
            dataset = h5py.h5d.create(arrays.id, gene.encode(), h5py.h5t.NATIVE_FLOAT, space, create)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, row)


def _require_unique(kind: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{kind} {name!r} occurs twice in the vocabulary; expected each once: remove one of them.")
        seen.add(name)
