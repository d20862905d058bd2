"""Decides how cells are embedded: checkpoint, precision, device and gene order, or those of an existing array."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiledbsoma

from census_tf_dagster.census.release import open_release
from census_tf_dagster.config import variables
from census_tf_dagster.config.settings import DEFAULT_COMPUTE_PRECISION
from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import NUMERIC_VERSION, ArrayIdentity, Identity
from census_tf_dagster.inference.checkpoint import Checkpoint, read_checkpoint
from census_tf_dagster.inference.devices import count_gpus
from census_tf_dagster.inference.fetch import fetch
from census_tf_dagster.inference.tokens import genes_in_order
from census_tf_dagster.io.compiled import keep_below
from census_tf_dagster.io.names import require_location
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import IDENTITY_KEY

Order = Literal["file", "vocabulary"]
Precision = Literal["fp32", "fp16", "bf16"]
Device = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True)
class Access:
    """The storage that reads S3, and the local folder for fetched and prepared checkpoints."""

    storage: Storage
    cache: Path

    @classmethod
    def of_environment(cls, cache: Path | None = None) -> "Access":
        """Return those of the variables CENSUS_TF_STORE_S3_REGION, CENSUS_TF_STORE_S3_ENDPOINT and CENSUS_TF_CACHE."""
        region = variables.region(os.environ, "CENSUS_TF_STORE_S3_REGION", "")
        endpoint = variables.endpoint(os.environ, "CENSUS_TF_STORE_S3_ENDPOINT")
        folder = cache or Path(variables.folder(os.environ, "CENSUS_TF_CACHE", "~/.cache/census-tf-dagster"))
        folder = folder.expanduser().absolute()
        keep_below(folder)
        return cls(Storage(S3Settings(region, endpoint)), folder)


@dataclass(frozen=True)
class OwnIdentity(ArrayIdentity):
    """Everything that decides the embeddings of own cells.

    Attributes
    ----------
    checkpoint_fingerprint, compute_precision, storage_precision, fractional_counts, numeric_version, embedding_dim
        As in `Identity`.
    gene_order
        ``file``, ``vocabulary``, or ``census``: that of the array in `like`.
    gene_fingerprint
        SHA-256 over the genes that get a token, in order.
    matrix
        The matrix that was read.
    gene_column
        The column of var with the gene ids, or ``index``.
    assay
        Where the assay tokens came from.
    like
        Address of the array beside which the embeddings can stand; empty if none was given.
    cells
        What tells one file from another (`CellSource.fingerprint`).
    """

    checkpoint_fingerprint: str
    gene_order: str
    gene_fingerprint: str
    compute_precision: str
    storage_precision: str
    embedding_dim: int
    fractional_counts: str
    matrix: str
    gene_column: str
    assay: str
    like: str
    cells: str
    numeric_version: int = NUMERIC_VERSION


@dataclass(frozen=True)
class OwnModel:
    """An opened checkpoint, and how it is used.

    Attributes
    ----------
    checkpoint
        The checkpoint.
    precision, storage_precision, fractional_counts
        As in a set's settings.
    device
        ``cuda`` or ``cpu``.
    order
        ``file``, ``vocabulary`` or ``census``.
    census_genes
        The genes of the Census that `like` was made from, in order; None unless `order` is ``census``.
    like
        Address of the array; empty if none was given.
    """

    checkpoint: Checkpoint
    precision: str
    storage_precision: str
    fractional_counts: str
    device: str
    order: str
    census_genes: tuple[str, ...] | None
    like: str

    def known_genes(self, genes: Sequence[str]) -> tuple[str, ...]:
        """Return the genes that get a token, in the order in which the model sees them."""
        if self.census_genes is not None:
            there = set(genes)
            return tuple(gene for gene in self.census_genes if gene in there and self.checkpoint.knows(gene))
        return genes_in_order(genes, self.checkpoint, "vocabulary" if self.order == "vocabulary" else "census")

    def identity(self, known: Sequence[str], matrix: str, gene_column: str, assay: str, cells: str) -> OwnIdentity:
        """Return the identity of embeddings that this makes."""
        return OwnIdentity(
            checkpoint_fingerprint=self.checkpoint.fingerprint,
            gene_order=self.order,
            gene_fingerprint=hashlib.sha256("\n".join(known).encode()).hexdigest(),
            compute_precision=self.precision,
            storage_precision=self.storage_precision,
            embedding_dim=self.checkpoint.shape.embed_dim,
            fractional_counts=self.fractional_counts,
            matrix=matrix,
            gene_column=gene_column,
            assay=assay,
            like=self.like,
            cells=cells,
        )


def open_model(
    checkpoint: str,
    pretrained: Sequence[str],
    access: Access,
    device: Device,
    precision: Precision | None,
    order: Order | None,
    like: str | None,
) -> OwnModel:
    """Open a checkpoint.

    Raises
    ------
    UserError
        When something is missing, there is no such device, or the checkpoint is not that of `like`.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"device is {device!r}; expected auto, cuda or cpu.")
    if device == "cuda" and not count_gpus():
        raise UserError("device is 'cuda', but this machine has no GPU; expected one: give `device='cpu'`, or `auto`.")
    if device == "auto":
        device = "cuda" if count_gpus() else "cpu"
    found = read_checkpoint(
        fetch(require_location(checkpoint, "checkpoint"), access.storage, access.cache),
        [fetch(require_location(path, "pretrained_embeddings"), access.storage, access.cache) for path in pretrained],
        access.cache,
    )
    if like is None:
        default = DEFAULT_COMPUTE_PRECISION if device == "cuda" else "fp32"
        return OwnModel(found, precision or default, "float32", "embed", device, order or "file", None, "")
    address = require_location(like, "like")
    identity = _identity_of_array(address, access.storage)
    _require_same(identity, found, address, precision, order)
    return OwnModel(
        checkpoint=found,
        precision=identity.compute_precision,
        storage_precision=identity.storage_precision,
        fractional_counts=identity.fractional_counts,
        device=device,
        order=identity.gene_order,
        census_genes=_census_genes(identity) if identity.gene_order == "census" else None,
        like=address,
    )


def _identity_of_array(address: str, storage: Storage) -> Identity:
    try:
        with tiledbsoma.open(address, context=storage.soma_context) as array:
            return Identity(**json.loads(array.metadata[IDENTITY_KEY]))
    except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{address} is no array of embeddings that this project made ({str(error)[:160]}); expected the address "
            "that `census-tf-dagster inspect` prints for a finished release. Correct `like`."
        ) from error


def _require_same(
    identity: Identity, checkpoint: Checkpoint, address: str, precision: Precision | None, order: Order | None
) -> None:
    if identity.checkpoint_fingerprint != checkpoint.fingerprint:
        raise UserError(
            f"the array {address} was made with the checkpoint {identity.checkpoint_fingerprint}; "
            f"{checkpoint.folder} has the fingerprint {checkpoint.fingerprint}. Give the array's own checkpoint: "
            "embeddings of different checkpoints cannot be compared."
        )
    if identity.numeric_version != NUMERIC_VERSION:
        raise UserError(
            f"the array {address} was made by numeric version {identity.numeric_version} of this package; this is "
            f"version {NUMERIC_VERSION}. Install the package's version that the array's record names."
        )
    asked = {"compute_precision": precision, "gene_order": order}
    for name, value in asked.items():
        if value not in (None, getattr(identity, name)):
            raise UserError(
                f"{name} is {value!r}, and that of {address} is {getattr(identity, name)!r}; leave it out with `like`, "
                "which takes it from the array."
            )


def _census_genes(identity: Identity) -> tuple[str, ...]:
    """Read the genes of the Census of an array, whose order decides its embeddings."""
    uri = identity.census_uri
    storage = Storage(
        S3Settings(
            variables.region(os.environ, "CENSUS_TF_CENSUS_S3_REGION", "us-west-2"),
            variables.endpoint(os.environ, "CENSUS_TF_CENSUS_S3_ENDPOINT"),
            not variables.switch(os.environ, "CENSUS_TF_CENSUS_S3_SIGNED"),
        )
    )
    with open_release(uri, identity.organism, storage) as release:
        genes = release.genes()
    if genes.fingerprint != identity.gene_fingerprint:
        raise UserError(
            f"the genes of the Census at {uri} are not those of the array: their fingerprint is {genes.fingerprint}, "
            f"expected {identity.gene_fingerprint}. Restore that Census."
        )
    return genes.ids
