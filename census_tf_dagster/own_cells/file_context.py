"""Opens and plans a file of a set of files. The modules that embed a shard and verify an array do the rest.

The array of a file has one shard. Its joinids are the positions of the cells in the file, from 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.census.plan import Plan, plan_totals, with_checksums, write_plan
from census_tf_dagster.config.settings import FileSetSettings
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import Checkpoint
from census_tf_dagster.io.compiled import keep_below
from census_tf_dagster.io.storage import Storage, naming_lack_of_memory
from census_tf_dagster.own_cells.embed import Options, OwnCells, open_options, open_own_cells
from census_tf_dagster.own_cells.model import Access, OwnIdentity, OwnModel
from census_tf_dagster.pipeline.canary import Sample
from census_tf_dagster.pipeline.context import require_fingerprint
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.obs_ids import write_planned
from census_tf_dagster.store.removal import require_no_removal

SAMPLED_CELLS = 200
"""The first cells, from which the number of tokens is estimated. Checking the counts reads them as well."""

SAMPLE_BLOCKS = 8
"""A canary reads so many blocks of cells, because each one takes a pass over a file that is sorted by gene."""


@dataclass(frozen=True)
class FileContext:
    """One file of a set, opened: an `EmbeddingContext`. Nothing is written yet."""

    settings: FileSetSettings
    release_name: str
    identity: OwnIdentity
    store: Storage
    folder: ReleaseFolder
    own: OwnCells
    cache: Path

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint."""
        return self.own.embedding.checkpoint

    @property
    def gene_ids(self) -> tuple[str, ...]:
        """The genes of the file, in the order of var."""
        return self.own.genes

    @property
    def known_genes(self) -> tuple[str, ...]:
        """The genes that get a token, in the order in which the model sees them."""
        return self.own.embedding.tokenizer.known_genes

    def read_cells(self, joinids: npt.NDArray[np.int64]) -> Cells:
        """Read the counts of the cells at these positions."""
        return self.own.read(joinids)

    def rows(self) -> int:
        """Return the number of cells."""
        return self.own.source.n_cells

    def remedy(self, shards: str) -> str:  # noqa: ARG002
        """Return what to do so that damaged cells are computed again."""
        return f"materialize {self.settings.name}/embeddings_array of {self.release_name} again"


@contextmanager
def open_file(
    settings: FileSetSettings, name: str, store_uri: str, store: Storage, cache: Path, *, whole: bool
) -> Iterator[FileContext]:
    """Open a file of a set and its checkpoint, and check that its cells can be embedded.

    Parameters
    ----------
    settings
        The set.
    name
        Name of the file, directly below the set's `files`.
    store_uri, store
        Address of the store, and the storage that writes it. It also reads files and checkpoints on S3.
    cache
        Local folder for copies from S3 and for the prepared checkpoint.
    whole
        Whether all counts will be read. Otherwise an h5ad file on S3 is not copied.

    Raises
    ------
    UserError
        When something is missing or cannot be right; then nothing has been written.
    """
    keep_below(cache)
    access = Access(store, cache)
    options = Options(
        checkpoint=settings.checkpoint,
        layer=settings.layer,
        gene_column=settings.gene_column,
        duplicate_genes=settings.duplicate_genes,
        assay_column=settings.assay_column,
        assay=settings.assay,
        like=settings.like,
        gene_order=settings.gene_order,
        # With `like`, the precision of the array is read, and then compared.
        precision=settings.compute_precision if settings.like is None else None,
        device=settings.device,
        batch_size=settings.batch_size,
        pretrained_embeddings=settings.pretrained_embeddings,
    )
    with naming_lack_of_memory():
        model = _as_set(open_options(options, access), settings)
        with open_own_cells(f"{settings.files}/{name}", options, access, model, whole=whole) as own:
            folder = ReleaseFolder.of(store_uri, settings.name, name, own.identity)
            yield FileContext(settings, name, own.identity, store, folder, own, cache)


def _as_set(model: OwnModel, settings: FileSetSettings) -> OwnModel:
    """Return the model with the set's way of storing; refuse it if the array in `like` was made in another way."""
    require_fingerprint(settings, model.checkpoint)
    if settings.like is None:
        return replace(
            model, storage_precision=settings.storage_precision, fractional_counts=settings.fractional_counts
        )
    of_array = {
        "compute_precision": model.precision,
        "storage_precision": model.storage_precision,
        "fractional_counts": model.fractional_counts,
    }
    differing = [name for name, value in of_array.items() if getattr(settings, name) != value]
    if differing:
        own = ", ".join(f"{name}: {getattr(settings, name)}" for name in differing)
        right = ", ".join(f"{name}: {of_array[name]}" for name in differing)
        raise UserError(
            f"the set {settings.name} has {own}; the array {settings.like} was made with {right}. Write the array's "
            "values in the set's YAML, so that both can be compared."
        )
    return model


def plan_file(context: FileContext) -> Plan:
    """Plan a file: create its empty array, and write which cells each megabatch has.

    Equal files and settings give an equal plan. The number of tokens is estimated from the first cells.

    Raises
    ------
    UserError
        When an unfinished removal, or something else than this set's array, is in the folder.
    """
    own, store, folder = context.own, context.store, context.folder
    require_no_removal(store, folder)
    store.make_place(folder.root)
    EmbeddingsArray.create(folder.array, store, context.identity, context.rows())
    joinids = np.arange(context.rows(), dtype=np.int64)
    listed = write_planned(store, folder, joinids, None)
    per_cell = _tokens_of_a_cell(context)
    batches = with_checksums(
        [replace(batch, tokens=round(per_cell * batch.cells)) for batch in own.megabatches], joinids
    )
    totals = replace(plan_totals(batches, 1, len(joinids)), obs_ids=listed)
    # This comes last, so that a current plan is complete.
    return write_plan(store, folder.plan, joinids, batches, totals)


def file_sample(context: FileContext, cells: int) -> Sample:
    """Choose about as many cells of a file for a canary, in a few blocks that are spread over it."""
    blocks = np.array_split(np.arange(context.rows()), SAMPLE_BLOCKS)
    chosen = np.concatenate([block[: -(-cells // SAMPLE_BLOCKS)] for block in blocks])
    return Sample(chosen, context.rows(), round(_tokens_of_a_cell(context) * context.rows()))


def _tokens_of_a_cell(context: FileContext) -> float:
    """Return the mean number of tokens of the first cells: their genes, START and the assay."""
    rows = context.own.matrix.rows(0, min(SAMPLED_CELLS, context.rows()))
    known = context.own.embedding.tokenizer.row_of_column >= 0
    genes = np.add.reduceat(np.append(known[rows.indices] & (rows.data != 0), 0), rows.indptr[:-1])
    genes[np.diff(rows.indptr) == 0] = 0
    return float(np.minimum(genes, context.checkpoint.shape.seq_len - 1).mean()) + 2
