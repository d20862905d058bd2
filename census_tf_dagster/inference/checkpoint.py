"""Upstream's checkpoint folder: what it says, whether it is whole, and what identifies it.

Layout (TranscriptFormer 0.6.1): ``config.json`` with everything below ``model``; ``model_weights.pt``, a
strict state dict that already holds the gene embedding matrix; ``vocabs/assay_vocab.json``;
``vocabs/*_gene.h5`` of which inference needs the names only. This module reads no weights and imports no
torch, so the control plane can plan with it.
"""

import hashlib
import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.shape import ModelShape

SPECIAL_TOKENS = ("unknown", "[START]", "[END]", "[RD]", "[CELL]", "[PAD]", "[MASK]")
"""Upstream's order; embedding surgery relies on it."""
TENSOR_NAMES = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
"""All that a saved state dict's index may name."""
START, PAD, UNKNOWN = "[START]", "[PAD]", "unknown"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was read and found whole.

    Attributes
    ----------
    folder
        Local folder with `model_weights.pt`.
    shape
        The model's numbers.
    aux_column
        The obs column of the auxiliary token ("assay").
    aux_vocab
        Token of each value of that column; holds ``unknown``.
    gene_rows
        Row of the checkpoint's embedding matrix of each gene and special token.
    pretrained
        Embedding files that replace the genes' rows, for species outside the vocabulary. Special tokens
        keep the checkpoint's.
    pretrained_genes
        Position of each of their genes: one file after the other, each in its own order.
    fingerprint
        SHA-256 over all of the content that inference uses.
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
        """Return those of some genes that get a token, in the order in which the vocabulary lists them."""
        return tuple(sorted((gene for gene in genes if self.knows(gene)), key=self._vocabulary.__getitem__))

    @property
    def _vocabulary(self) -> Mapping[str, int]:
        return self.pretrained_genes if self.pretrained else self.gene_rows


def read_checkpoint(folder: Path, pretrained: Sequence[Path] = (), cache: Path | None = None) -> Checkpoint:
    """Read and check a checkpoint folder.

    Parameters
    ----------
    folder
        Local checkpoint folder.
    pretrained
        ``.h5`` embedding files ("all-embeddings") for a species outside the vocabulary.
    cache
        Local folder that remembers the hashes of files, by path, size and time of change: tf_metazoa's weights take
        seconds to hash.

    Raises
    ------
    UserError
        When a file is missing or of another architecture than TranscriptFormer's published models.
    """
    for name in ("config.json", "model_weights.pt", "vocabs"):
        if not (folder / name).exists():
            inside = sorted(folder.glob("*/config.json"))
            hint = f" Did you mean {' or '.join(str(one.parent) for one in inside)}?" if inside else ""
            raise UserError(
                f"{folder} has no {name}; expected a checkpoint as `transcriptformer download` makes it.{hint}"
            )
    config = _read_json(folder / "config.json")
    try:
        model, data = config["model"]["model_config"], config["model"]["data_config"]
        shape = ModelShape(
            embed_dim=int(model["embed_dim"]),
            num_heads=int(model["num_heads"]),
            num_layers=int(model["num_layers"]),
            model_dim=int(model["model_dim"]),
            seq_len=int(model["seq_len"]),
            softcap=float(model["softcap"]),
            log_counts_eps=float(model["log_counts_eps"]),
            activation=str(model["activation"]),
        )
        aux_columns = str(data["aux_cols"]).split(",")
        gene_files = [folder / "vocabs" / str(name) for name in data["esm2_mappings"]]
        special_tokens = tuple(data["special_tokens"])
        pads_zeros = bool(data["pad_zeros"]) and data["gene_pad_token"] == PAD
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'} is not a TranscriptFormer configuration: {error!r}. Expected the entries "
            "model.model_config and model.data_config of a published checkpoint."
        ) from error
    if len(aux_columns) != 1 or not pads_zeros:
        raise UserError(
            f"{folder / 'config.json'}: aux_cols is {data['aux_cols']!r}, pad_zeros {data['pad_zeros']} with "
            f"{data['gene_pad_token']!r}; expected one auxiliary column and zeros padded with {PAD}, as in the "
            "published models."
        )
    if shape.num_heads < 1 or shape.embed_dim % shape.num_heads:
        raise UserError(
            f"{folder / 'config.json'}: embed_dim {shape.embed_dim} is not a multiple of num_heads {shape.num_heads}."
        )

    genes = unique_in_order(name for path in gene_files for name in read_gene_names(path))
    gene_rows = {token: row for row, token in enumerate([*special_tokens, *genes])}
    aux_vocab = {str(k): int(v) for k, v in _read_json(folder / "vocabs" / f"{aux_columns[0]}_vocab.json").items()}
    for token, vocabulary in ((START, gene_rows), (PAD, gene_rows), (UNKNOWN, aux_vocab)):
        if token not in vocabulary:
            raise UserError(f"the vocabulary of {folder} has no {token}; it is not TranscriptFormer's.")
    if not all(0 <= row < len(aux_vocab) for row in aux_vocab.values()):
        raise UserError(f"{folder}: the tokens of {aux_columns[0]}_vocab.json must be 0 to {len(aux_vocab) - 1}.")
    pretrained_genes: dict[str, int] = {}
    if pretrained:
        # Upstream keeps the old row numbers of START and PAD after exchanging the matrix, so another order
        # of special tokens would silently take other rows.
        if special_tokens != SPECIAL_TOKENS[: len(special_tokens)]:
            raise UserError(
                f"{folder}: special tokens {special_tokens} are not in upstream's order {SPECIAL_TOKENS}; pretrained "
                "embeddings cannot be used with it."
            )
        listed = unique_in_order(name for path in pretrained for name in read_gene_names(path))
        pretrained_genes = {gene: position for position, gene in enumerate(listed)}

    _require_tensors_only(folder / "model_weights.pt")
    digest = hashlib.sha256(json.dumps([config["model"], aux_vocab, genes], sort_keys=True).encode())
    for path in (folder / "model_weights.pt", *pretrained):
        digest.update(file_digest(path, cache))
    return Checkpoint(
        folder=folder,
        shape=shape,
        aux_column=aux_columns[0],
        aux_vocab=aux_vocab,
        gene_rows=gene_rows,
        pretrained=tuple(pretrained),
        pretrained_genes=pretrained_genes,
        fingerprint=digest.hexdigest(),
    )


def read_gene_names(path: Path) -> list[str]:
    """Read the gene ids of an embedding file, in its order.

    Raises
    ------
    UserError
        When the file is missing, a pickle, or not such an HDF5 file.
    """
    if path.suffix == ".pkl":
        raise UserError(f"{path} is a pickle, which is never loaded; expected upstream's .h5 form of the file.")
    if not path.exists():
        raise UserError(f"{path} does not exist; expected the embeddings of the genes, as HDF5.")
    try:
        with h5py.File(path, "r") as file:
            return [key.decode() for key in file["keys"][:]]
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is not a gene embedding file: {error}. Expected HDF5 with `keys` and `arrays`.") from (
            error
        )


def file_digest(path: Path, cache: Path | None) -> bytes:
    """Return the SHA-256 of a file; `cache` remembers it by path, size, time of change and inode."""
    if cache is None:
        return _hash_file(path)
    state = path.stat()
    key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
    remembered = cache / "digests" / hashlib.sha256(key.encode()).hexdigest()
    if remembered.exists() and len(digest := remembered.read_bytes()) == hashlib.sha256().digest_size:
        return digest
    digest = _hash_file(path)
    # A cache that cannot be written costs time alone.
    with suppress(OSError):
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_bytes(digest)
    return digest


def _require_tensors_only(path: Path) -> None:
    """Refuse weights that are cut short, or whose pickled index names anything but tensors; runs none of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            (index,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            operations = list(pickletools.genops(archive.read(index)))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise UserError(
            f"{path} is no whole PyTorch file of weights ({error}); it may be cut short. Expected model_weights.pt as "
            "`transcriptformer download` makes it: download it again."
        ) from error
    names = {str(argument) for operation, argument, _ in operations if operation.name in ("GLOBAL", "INST")}
    strange = sorted(name for name in names if not TENSOR_NAMES.fullmatch(name))
    strange += sorted({operation.name for operation, _, _ in operations if operation.name == "STACK_GLOBAL"})
    if strange:
        raise UserError(
            f"{path} is a pickle that names {', '.join(strange)}; only tensors may be in it, and it was not loaded. "
            "Get model_weights.pt from its publisher again."
        )


def unique_in_order(names: Any) -> list[str]:
    """Drop later occurrences, as upstream does."""
    return list(dict.fromkeys(names))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}; expected a JSON object.")
    return content


def _hash_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
