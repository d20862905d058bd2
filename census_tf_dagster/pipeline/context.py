"""Opens a set and a release: settings, Census, checkpoint, store, and the identity that follows from them.

All other modules of this package start from the `ReleaseContext` that `open_context` yields. Copying needs less: the
`PlannedContext` that `open_planned` yields. Embedding and verifying need only an `EmbeddingContext`, which the files of
a set of files have too.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.release import Genes, OrganismRelease, open_release
from census_tf_dagster.config.settings import CommonSettings, SetSettings
from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import ArrayIdentity, Identity
from census_tf_dagster.inference.checkpoint import Checkpoint, read_checkpoint
from census_tf_dagster.inference.fetch import fetch
from census_tf_dagster.inference.tokens import genes_in_order
from census_tf_dagster.io.compiled import keep_below
from census_tf_dagster.io.storage import Storage, naming_lack_of_memory
from census_tf_dagster.pipeline.planned_identity import find_planned_identity, identity_of
from census_tf_dagster.store.layout import ReleaseFolder

if TYPE_CHECKING:
    from census_tf_dagster.census.cells import Cells


class StoredContext(Protocol):
    """One partition of a set in the store: a release, or a file."""

    @property
    def settings(self) -> CommonSettings:
        """The settings of the set."""

    @property
    def release_name(self) -> str:
        """The name of the release or file."""

    @property
    def identity(self) -> ArrayIdentity:
        """The identity of the array."""

    @property
    def store(self) -> Storage:
        """The storage that writes the store."""

    @property
    def folder(self) -> ReleaseFolder:
        """The paths in the store."""


class EmbeddingContext(StoredContext, Protocol):
    """What embedding cells and verifying their array need."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint."""

    @property
    def cache(self) -> Path:
        """Local folder for the prepared checkpoint."""

    @property
    def gene_ids(self) -> tuple[str, ...]:
        """The genes of the counts, in the order of the columns."""

    @property
    def known_genes(self) -> tuple[str, ...]:
        """The genes that get a token, in the order in which the model sees them."""

    def read_cells(self, joinids: npt.NDArray[np.int64]) -> "Cells":
        """Read the counts of cells, as `census.cells.read_cells` does."""

    def rows(self) -> int:
        """Return the number of rows that the array has."""

    def remedy(self, shards: str) -> str:
        """Return what to do so that shards are computed again."""


@dataclass(frozen=True)
class PlannedContext:
    """One set and release, without Census and checkpoint: all that is needed to copy cells and to look at the array."""

    settings: SetSettings
    release_name: str
    identity: Identity
    store: Storage
    folder: ReleaseFolder


@dataclass(frozen=True)
class ReleaseContext(PlannedContext):
    """One set and release, opened: everything that the functions of this package need. Nothing is written yet."""

    release: OrganismRelease
    genes: Genes
    checkpoint: Checkpoint
    cache: Path

    @property
    def gene_ids(self) -> tuple[str, ...]:
        """The genes of the Census, in the order of var."""
        return self.genes.ids

    @property
    def known_genes(self) -> tuple[str, ...]:
        """The genes that get a token, in the order in which the model sees them."""
        return genes_in_order(self.genes.ids, self.checkpoint, self.settings.gene_order)

    def read_cells(self, joinids: npt.NDArray[np.int64]) -> "Cells":
        """Read the counts of cells from the Census."""
        # It compiles functions, which a verification does not need.
        from census_tf_dagster.census.cells import read_cells

        whole = self.settings.fractional_counts == "set_aside"
        return read_cells(self.release, joinids, self.checkpoint.aux_column, whole_counts=whole)

    def rows(self) -> int:
        """Return the number of rows of the Census's obs domain."""
        return self.release.obs_rows()

    def remedy(self, shards: str) -> str:
        """Return the command with which shards are computed again."""
        command = f"census-tf-dagster launch {self.settings.name} {self.release_name} --shards {shards}"
        return f"run their shards again: {command}"


@dataclass(frozen=True)
class Places:
    """Where a release of a set lies.

    Attributes
    ----------
    release
        Name of the release.
    census_uri, census
        Address of its Census, and the storage that reads it.
    store_uri, store
        Address of the store, and the storage that writes it. That storage also reads checkpoints on S3.
    cache
        Local folder for checkpoints from S3, prepared checkpoints, and compiled functions if necessary.
    """

    release: str
    census_uri: str
    census: Storage
    store_uri: str
    store: Storage
    cache: Path


@contextmanager
def open_context(settings: SetSettings, places: Places) -> Iterator[ReleaseContext]:
    """Open Census and checkpoint of a set, check them, and compute the identity.

    Raises
    ------
    UserError
        When something is missing or does not match; then nothing has been written.
    """
    with _opened(settings, places) as opened:
        yield _whole(settings, places, opened)


@contextmanager
def open_planned(settings: SetSettings, places: Places) -> Iterator[PlannedContext]:
    """Open a release of a set that is planned, without its checkpoint.

    The identity is the one that the planner stored. If no plan of these settings states it, this opens everything, as
    `open_context` does.

    Raises
    ------
    UserError
        When the Census is missing, or as in `open_context`.
    """
    with _opened(settings, places) as opened:
        identity = find_planned_identity(
            settings, places.release, places.census_uri, opened.build_date, places.store_uri, places.store
        )
        if identity is None:
            yield _whole(settings, places, opened)
            return
        folder = ReleaseFolder.of(places.store_uri, settings.name, places.release, identity)
        yield PlannedContext(settings, places.release, identity, places.store, folder)


@contextmanager
def _opened(settings: SetSettings, places: Places) -> Iterator[OrganismRelease]:
    keep_below(places.cache)
    with (
        naming_lack_of_memory(),
        open_release(places.census_uri, settings.organism, places.census) as opened,
    ):
        yield opened


def _whole(settings: SetSettings, places: Places, opened: OrganismRelease) -> ReleaseContext:
    store, cache = places.store, places.cache
    genes = opened.genes()
    checkpoint = read_checkpoint(
        fetch(settings.checkpoint, store, cache),
        [fetch(uri, store, cache) for uri in settings.pretrained_embeddings],
        cache,
    )
    require_fingerprint(settings, checkpoint)
    _require_unique(opened, genes, checkpoint)
    if checkpoint.aux_column not in opened.obs.keys():  # noqa: SIM118
        raise UserError(
            f"obs of {settings.organism} in {places.census_uri} lacks the column {checkpoint.aux_column!r}; expected "
            f"it, because the checkpoint {settings.checkpoint} conditions on it: use a Census that has it, or another "
            "checkpoint."
        )
    identity = identity_of(
        settings,
        places.census_uri,
        opened.build_date,
        gene_fingerprint=_gene_fingerprint(settings, genes, checkpoint),
        checkpoint_fingerprint=checkpoint.fingerprint,
        embedding_dim=checkpoint.shape.embed_dim,
    )
    folder = ReleaseFolder.of(places.store_uri, settings.name, places.release, identity)
    return ReleaseContext(settings, places.release, identity, store, folder, opened, genes, checkpoint, cache)


def require_fingerprint(settings: CommonSettings, checkpoint: Checkpoint) -> None:
    """Raise an error if a checkpoint is not the one that a set expects.

    Raises
    ------
    UserError
        With both fingerprints.
    """
    if settings.checkpoint_fingerprint not in (None, checkpoint.fingerprint):
        raise UserError(
            f"the checkpoint {settings.checkpoint} has the fingerprint {checkpoint.fingerprint}; the set "
            f"{settings.name} expects {settings.checkpoint_fingerprint}. Get the checkpoint from its publisher "
            "again, or change `checkpoint_fingerprint` in the set's YAML."
        )


def _require_unique(release: OrganismRelease, genes: Genes, checkpoint: Checkpoint) -> None:
    """Raise an error if a gene would make two tokens. Genes that the checkpoint does not know make none."""
    twice = [gene for gene in genes.repeated() if checkpoint.knows(gene)]
    if twice:
        raise UserError(
            f"{release.uri} {release.organism}: {len(twice)} gene ids that the checkpoint knows occur more than once "
            f"after removing version suffixes, e.g. {twice[:3]}; expected each once: use a Census without duplicates."
        )


def _gene_fingerprint(settings: SetSettings, genes: Genes, checkpoint: Checkpoint) -> str:
    """Fingerprint the gene order; with `gene_order: vocabulary`, only of the genes that the model knows."""
    if settings.gene_order == "census":
        return genes.fingerprint
    seen = genes_in_order(genes.ids, checkpoint, settings.gene_order)
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()
