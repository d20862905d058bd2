"""Reads upstream's checkpoint folder, checks that it is complete, and computes the fingerprint that identifies it.

Layout (TranscriptFormer 0.6.1): ``config.json`` (`checkpoint_config`); ``model_weights.pt``, a strict state dict that
already holds the gene embedding matrix (`torch_file`, `state_dict`); ``vocabs/assay_vocab.json``; ``vocabs/*_gene.h5``,
of which inference needs the names only.

This module imports no torch, so the control plane can plan with it. Loading weights belongs in `weights`.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint_config import UNKNOWN, CheckpointConfig, read_config, read_json
from census_tf_dagster.inference.digests import file_digest
from census_tf_dagster.inference.shape import ModelShape
from census_tf_dagster.inference.state_dict import HEADS, MATRIX, require_state
from census_tf_dagster.inference.torch_file import read_index, require_whole

WEIGHTS = "model_weights.pt"
SPECIAL_TOKENS = ("unknown", "[START]", "[END]", "[RD]", "[CELL]", "[PAD]", "[MASK]")
"""Upstream's order. Upstream relies on it when it exchanges embeddings."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that `read_checkpoint` read and found complete.

    Attributes
    ----------
    folder
        Local folder with `model_weights.pt`.
    shape
        The model's sizes and constants.
    aux_column
        The obs column of the auxiliary token ("assay").
    aux_vocab
        Token of each value of that column; ``unknown`` is one of the values.
    gene_rows
        Row of each gene and special token in the checkpoint's embedding matrix.
    pretrained
        Embedding files that replace the genes' rows, for species outside the vocabulary. Special tokens keep the
        checkpoint's rows.
    pretrained_genes
        Position of each gene of those files: one file after the other, each in its own order.
    fingerprint
        SHA-256 over all content that inference uses.
    """

    folder: Path
    shape: ModelShape
    aux_column: str
    aux_vocab: Mapping[str, int]
    gene_rows: Mapping[str, int]
    pretrained: tuple[Path, ...]
    pretrained_genes: Mapping[str, int]
    fingerprint: str

    def knows(self, gene: str) -> bool:
        """Tell whether a gene id gets a token."""
        return gene in self._vocabulary

    def in_vocabulary_order(self, genes: Iterable[str]) -> tuple[str, ...]:
        """Return the given genes that get a token, in the order of the vocabulary."""
        return tuple(sorted((gene for gene in genes if self.knows(gene)), key=self._vocabulary.__getitem__))

    @property
    def _vocabulary(self) -> Mapping[str, int]:
        return self.pretrained_genes if self.pretrained else self.gene_rows


def read_checkpoint(folder: Path, pretrained: Sequence[Path] = (), cache: Path | None = None) -> Checkpoint:
    """Read and check a checkpoint folder; load no weights.

    Parameters
    ----------
    folder
        Local checkpoint folder.
    pretrained
        ``.h5`` embedding files ("all-embeddings") for a species outside the vocabulary.
    cache
        Local folder that remembers which files were read and found undamaged (`digests`); None: read them all now.

    Raises
    ------
    UserError
        When a file is missing or damaged, or this project cannot compute the model. `checkpoint_config` checks the
        configuration, `state_dict` the names and shapes of the weights.
    """
    for name in ("config.json", "model_weights.pt", "vocabs"):
        if not (folder / name).exists():
            inside = sorted(folder.glob("*/config.json"))
            hint = f" Did you mean {' or '.join(str(path.parent) for path in inside)}?" if inside else ""
            raise UserError(
                f"{folder} has no {name}; expected a checkpoint folder as `transcriptformer download` makes it: "
                f"correct `checkpoint`.{hint}"
            )
    config = read_config(folder / "config.json")
    gene_files = [folder / "vocabs" / name for name in config.gene_files]
    genes = unique_in_order(name for path in gene_files for name in read_gene_names(path))
    gene_rows = {token: row for row, token in enumerate([*config.special_tokens, *genes])}
    if len(gene_rows) < len(config.special_tokens) + len(genes):
        both = sorted({*config.special_tokens} & {*genes})
        raise UserError(
            f"{folder}: {', '.join(both)[:200]} is a special token and a gene; expected different names. Get the "
            "checkpoint from its publisher again."
        )
    aux_vocab = _read_aux_vocab(folder / "vocabs" / f"{config.aux_column}_vocab.json")
    pretrained_genes = _pretrained_genes(folder, config, pretrained) if pretrained else {}

    weights = folder / WEIGHTS
    index = read_index(weights)
    require_state(weights, index, config, tokens=len(gene_rows), aux_values=len(aux_vocab))
    for path in pretrained:
        _require_width(path, index[MATRIX].shape[1])
    used = {name: tensor for name, tensor in index.items() if not name.startswith(HEADS)}
    digest = hashlib.sha256(json.dumps([config.content, aux_vocab, genes], sort_keys=True).encode())
    digest.update(file_digest(weights, cache, partial(require_whole, weights, used)))
    for path in pretrained:
        digest.update(file_digest(path, cache))
    return Checkpoint(
        folder=folder,
        shape=config.shape,
        aux_column=config.aux_column,
        aux_vocab=aux_vocab,
        gene_rows=gene_rows,
        pretrained=tuple(pretrained),
        pretrained_genes=pretrained_genes,
        fingerprint=digest.hexdigest(),
    )


def _read_aux_vocab(path: Path) -> dict[str, int]:
    vocabulary = read_json(path)
    tokens = list(vocabulary.values())
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < len(tokens) for token in tokens):
        raise UserError(
            f"{path} has tokens that are not whole numbers from 0 to {len(tokens) - 1}; expected one such token for "
            "each value. Get it from its publisher again."
        )
    if UNKNOWN not in vocabulary:
        raise UserError(
            f"{path} has no {UNKNOWN}; expected it as the token of values that the model does not know. Get it from "
            "its publisher again."
        )
    return vocabulary


def _pretrained_genes(folder: Path, config: CheckpointConfig, pretrained: Sequence[Path]) -> dict[str, int]:
    # Upstream keeps the old row numbers of START and PAD when it exchanges the matrix, so another order of special
    # tokens would silently select other rows.
    if config.special_tokens != SPECIAL_TOKENS[: len(config.special_tokens)]:
        raise UserError(
            f"{folder}: the order of the special tokens is {config.special_tokens}; expected {SPECIAL_TOKENS}, on "
            "which upstream relies when it exchanges embeddings. Remove `pretrained_embeddings` from the set, or use a "
            "checkpoint with that order."
        )
    listed = unique_in_order(name for path in pretrained for name in read_gene_names(path))
    return {gene: position for position, gene in enumerate(listed)}


def read_gene_names(path: Path) -> list[str]:
    """Read the gene ids of an embedding file, in its order.

    Raises
    ------
    UserError
        When the file is missing, a pickle, or not an HDF5 file of gene embeddings.
    """
    if path.suffix == ".pkl":
        raise UserError(
            f"{path} is a pickle, which this project never loads; expected an HDF5 file: use upstream's .h5 version."
        )
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; expected an HDF5 file with the embeddings of the genes: correct the path, or get "
            "the file again."
        )
    try:
        with h5py.File(path, "r") as file:
            return [key.decode() for key in file["keys"][:]]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a gene embedding file: {error}. Expected HDF5 with `keys` and `arrays`.") from (
            error
        )


def wrong_width(path: Path, gene: str, shape: tuple[int, ...], esm_dim: int) -> UserError:
    """Make the error for an embedding file whose vectors do not have the width that the checkpoint needs."""
    return UserError(
        f"{path}: the embedding of {gene} has shape {shape}; expected ({esm_dim},), as the checkpoint needs. Use the "
        "embedding files that belong to the checkpoint."
    )


def _require_width(path: Path, esm_dim: int) -> None:
    """Check the first embedding of a file; `weights` checks the others when it prepares the checkpoint."""
    try:
        with h5py.File(path, "r") as file:
            gene = file["keys"][0].decode()
            shape = file["arrays"][gene].shape
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a gene embedding file: {error}. Expected HDF5 with `keys` and `arrays`.") from (
            error
        )
    if shape != (esm_dim,):
        raise wrong_width(path, gene, shape, esm_dim)


def unique_in_order(names: Any) -> list[str]:
    """Return each name once, at its first occurrence, as upstream does."""
    return list(dict.fromkeys(names))
