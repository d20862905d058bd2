"""Embeds the cells of an AnnData, an h5ad or zarr file, or a SOMA experiment."""

import json
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse

import census_tf_dagster
from census_tf_dagster.census.cells import Cells, check_counts
from census_tf_dagster.census.plan import Megabatch
from census_tf_dagster.durations import duration
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.tokens import Tokenizer
from census_tf_dagster.own_cells.counts import require_counts
from census_tf_dagster.own_cells.genes import Duplicates, find_genes
from census_tf_dagster.own_cells.model import Access, Device, Order, OwnIdentity, OwnModel, Precision, open_model
from census_tf_dagster.own_cells.outputs import KEY, UNS, read_description, require_space, write_output
from census_tf_dagster.own_cells.partial_result import Done, PartialResult, checksum, open_partial, partial_folder
from census_tf_dagster.own_cells.source import CellSource, Matrix, open_cells
from census_tf_dagster.pipeline.stages import Embedding, Outcome, Times, run_stages
from census_tf_dagster.store.array import round_to_bfloat16

LARGEST_MEGABATCH = 4096
SMALLEST_MEGABATCH = 64
STEPS = 20
"""Megabatches into which a small file is divided, so that its progress shows."""
UNKNOWN_ASSAY = "unknown"
FEW_KNOWN = 0.1
"""Share of known genes below which a user is told."""
NAMED = 3
"""Cells that a note names."""

Embeddings = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """How cells are embedded. `embed` explains each field."""

    checkpoint: str
    layer: str | None = None
    gene_column: str | None = None
    duplicate_genes: Duplicates = "refuse"
    assay_column: str | None = None
    assay: str | None = None
    like: str | None = None
    gene_order: Order | None = None
    precision: Precision | None = None
    device: Device = "auto"
    batch_size: int | None = None
    pretrained_embeddings: Sequence[str] = ()


@dataclass
class Progress:
    """How far the work is.

    Attributes
    ----------
    cells, embedded, before
        All cells, those that this process embedded, and those that were there before.
    set_aside
        The reason for each cell without an embedding, by its position.
    fractional, widened
        Numbers of cells with counts that are not whole numbers, and of cells that were computed in a wider precision.
    seconds
        Time since the model was loaded.
    about
        The cells and their genes, in a line.
    notes
        What a user should know about the cells.
    """

    about: str
    cells: int
    before: int = 0
    embedded: int = 0
    set_aside: dict[int, str] = field(default_factory=dict)
    fractional: int = 0
    widened: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        done = self.before + self.embedded
        said = f"{done:,} of {self.cells:,} cells"
        if not self.embedded or not self.seconds:
            return said
        rate = self.embedded / self.seconds
        left = f", {duration((self.cells - done) / rate)} left" if done < self.cells else ""
        return f"{said}, {rate:,.1f} cells/s{left}"


def embed(
    cells: anndata.AnnData | str | Path,
    checkpoint: str | Path,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    duplicate_genes: Duplicates = "refuse",
    assay_column: str | None = None,
    assay: str | None = None,
    like: str | None = None,
    gene_order: Order | None = None,
    precision: Precision | None = None,
    device: Device = "auto",
    batch_size: int | None = None,
    pretrained_embeddings: Sequence[str | Path] = (),
    write: bool = False,
    report: Callable[[Progress], None] | None = None,
) -> Embeddings:
    """Embed cells with TranscriptFormer.

    Parameters
    ----------
    cells
        Cells with raw counts: an AnnData (in memory, backed or a view), or the path or S3 address of an h5ad or zarr
        file or of a SOMA experiment.
    checkpoint
        Folder or S3 prefix of the checkpoint, as ``transcriptformer download`` creates it.
    layer
        The matrix with the counts: ``X``, ``raw``, or the name of a layer. Default: ``raw`` if there is one, as in
        upstream, otherwise ``X``. In a SOMA experiment: a layer of the measurement's X.
    gene_column
        Column of var with Ensembl ids, or ``index``. Default: the one of ensembl_id, feature_id, gene_ids, gene_id and
        the index of which the checkpoint knows most ids. Version suffixes are removed.
    duplicate_genes
        ``refuse`` a gene that occurs twice, as upstream does, or use the ``first`` column.
    assay_column, assay
        Column of obs with the assay, or one assay for all cells. Default: the checkpoint's column (``assay``), if obs
        has it. Cells with an unknown assay get no assay token.
    like
        Address of an array of embeddings of a release. Precision, rounding and gene order are those of the array, and
        the checkpoint must be the same, so that both can be compared.
    gene_order
        ``file`` (default): the order of var, as upstream uses it. ``vocabulary``: the order of the checkpoint.
    precision
        ``fp32``, ``fp16`` or ``bf16``. Default: fp16 on a GPU, fp32 on a CPU.
    device
        ``cuda``: all GPUs of this machine. ``cpu``. ``auto``: GPUs if there are any.
    batch_size
        Most cells in a row of the model; None: as many as the free memory holds.
    pretrained_embeddings
        Gene embedding files (.h5) for a species outside the checkpoint's vocabulary.
    write
        Also write ``obsm["X_transcriptformer"]`` and ``uns["transcriptformer"]`` (JSON) of an AnnData.
    report
        Called after each megabatch.

    Returns
    -------
    ndarray
        float32 ``(n_cells, embed_dim)``, in the order of the cells; NaN for cells that cannot be embedded.

    Warns
    -----
    UserWarning
        About cells that cannot be embedded, counts that are not whole numbers, and unknown assays.

    Raises
    ------
    UserError
        When something is missing or cannot be right, before anything is computed.
    """
    if write and not isinstance(cells, anndata.AnnData):
        raise UserError(
            f"write=True needs an AnnData; cells is a {type(cells).__name__}. Use `census-tf-dagster embed` for files."
        )
    options = Options(
        checkpoint=str(checkpoint),
        layer=layer,
        gene_column=gene_column,
        duplicate_genes=duplicate_genes,
        assay_column=assay_column,
        assay=assay,
        like=like,
        gene_order=gene_order,
        precision=precision,
        device=device,
        batch_size=batch_size,
        pretrained_embeddings=[str(path) for path in pretrained_embeddings],
    )
    access = Access.of_environment()
    with open_own_cells(cells, options, access, open_options(options, access), whole=True) as own:
        embeddings = np.full((own.source.n_cells, own.dim), np.nan, np.float32)
        with closing(own.run(own.megabatches)) as outcomes:
            for outcome in outcomes:
                embeddings[outcome.joinids] = outcome.embeddings
                if report is not None:
                    report(own.progress)
        description = own.description()
    for note in own.progress.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    if isinstance(cells, anndata.AnnData) and write:
        cells.obsm[KEY] = embeddings
        cells.uns[UNS] = json.dumps(description)
    return embeddings


def open_options(options: Options, access: Access) -> OwnModel:
    """Open the checkpoint that options name."""
    return open_model(
        options.checkpoint,
        options.pretrained_embeddings,
        access,
        options.device,
        options.precision,
        options.gene_order,
        options.like,
    )


def embed_file(
    cells: str,
    output: Path,
    options: Options,
    access: Access,
    model: OwnModel,
    report: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Embed a file into an output, going on where an earlier process ended.

    Parameters
    ----------
    cells
        As in `embed`, but no AnnData.
    output
        The file to write: ``.h5ad``, ``.parquet`` or ``.npy``. If it exists with the same identity, nothing is done.
    options, access, model
        How, with what.
    report
        Called after each megabatch.

    Raises
    ------
    UserError
        When something is missing or cannot be right, or the output is something else.
    """
    with open_own_cells(cells, options, access, model, whole=True) as own:
        identity = asdict(own.identity)
        if output.exists() or output.is_symlink():
            _require_own(output, identity)
            own.progress.before = own.source.n_cells
            return own.progress
        ranges = [(batch.first, batch.last + 1) for batch in own.megabatches]
        if not partial_folder(output).exists():
            require_space(output, (own.source.n_cells, own.dim))
        with open_partial(output, identity, ranges, own.dim) as partial:
            own.take_over(partial)
            report(own.progress)
            missing = [batch for batch in own.megabatches if batch.index not in partial.done]
            try:
                if missing:
                    with closing(own.run(missing)) as outcomes:
                        for outcome in outcomes:
                            _keep(partial, outcome)
                            report(own.progress)
                own.source.require_unchanged()
                write_output(output, partial, own.source.obs(), own.description())
                partial.remove()
            except OSError as error:
                raise UserError(
                    f"{output} cannot be written ({error}); expected a writable folder with free space. What is "
                    f"embedded is in {partial.folder}: free space, and run the command again."
                ) from error
        return own.progress


def _require_own(output: Path, identity: dict[str, Any]) -> None:
    found = read_description(output)
    if found is None:
        raise UserError(f"{output} exists and is no output of this command; give another `--out`, or move it.")
    stored = found.get("identity", {})
    differing = [name for name in identity if stored.get(name) != identity[name]]
    if differing:
        raise UserError(
            f"{output} exists and was made with other settings, or of a file that has changed since "
            f"({', '.join(differing)}). Remove it, or give another `--out`."
        )


def _keep(partial: PartialResult, outcome: Outcome) -> None:
    batch = outcome.batch
    values = np.full((batch.cells, partial.shape[1]), np.nan, np.float32)
    values[outcome.joinids - batch.first] = outcome.embeddings
    done = Done(batch.index, checksum(values), outcome.set_aside, len(outcome.widened), outcome.fractional)
    partial.add(batch.first, values, done)


@dataclass
class OwnCells:
    """Opened cells and model. `genes` are the ids of the matrix's columns."""

    source: CellSource
    matrix: Matrix
    genes: tuple[str, ...]
    identity: OwnIdentity
    embedding: Embedding
    progress: Progress
    megabatches: list[Megabatch]
    _assays: Sequence[str]
    _whole_counts: bool

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.embedding.checkpoint.shape.embed_dim

    def run(self, todo: Sequence[Megabatch]) -> Generator[Outcome, None, None]:
        """Yield the result of each megabatch, in any order; add to `progress`.

        Raises
        ------
        UserError
            When a megabatch cannot be embedded at all.
        """
        progress = self.progress
        ids = [np.arange(batch.first, batch.last + 1) for batch in todo]
        with run_stages(self.embedding, todo, lambda key: self.read(ids[key]), Times()) as results:
            began = time.monotonic()
            for outcome in results:
                if outcome.failure:
                    raise UserError(
                        f"the cells {outcome.batch.first:,} to {outcome.batch.last:,} of {self.source.name} cannot be "
                        f"embedded: {outcome.failure}"
                    )
                progress.embedded += outcome.batch.cells
                progress.set_aside |= outcome.set_aside
                progress.fractional += outcome.fractional
                progress.widened += len(outcome.widened)
                progress.seconds = time.monotonic() - began
                if self.identity.storage_precision == "bfloat16":
                    yield replace(outcome, embeddings=round_to_bfloat16(outcome.embeddings))
                else:
                    yield outcome
        self._note()

    def read(self, positions: npt.NDArray[np.int64]) -> Cells:
        """Read the counts of the cells at ascending positions."""
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        parts = [self.matrix.rows(int(part[0]), int(part[-1]) + 1) for part in np.split(positions, breaks)]
        rows = parts[0] if len(parts) == 1 else scipy.sparse.vstack(parts, format="csr")
        with np.errstate(over="ignore"):
            counts = rows.data.astype(np.float32)
        assays = [self._assays[position] for position in positions]
        columns, indptr = rows.indices.astype(np.int32), rows.indptr.astype(np.int64)
        return check_counts(
            positions, indptr, columns, counts, assays, self.matrix.name, whole_counts=self._whole_counts
        )

    def take_over(self, partial: PartialResult) -> None:
        """Add to `progress` what an earlier process left."""
        for number, done in partial.done.items():
            self.progress.before += self.megabatches[number].cells
            self.progress.set_aside |= done.set_aside
            self.progress.fractional += done.fractional
            self.progress.widened += done.widened
        if len(partial.done) == len(self.megabatches):
            self._note()

    def description(self) -> dict[str, Any]:
        """Return the identity and facts about the cells, for the output."""
        return {
            "identity": asdict(self.identity),
            "package": census_tf_dagster.__version__,
            "cells": self.source.n_cells,
            "set_aside": {str(cell): why for cell, why in sorted(self.progress.set_aside.items())},
            "cells_widened": self.progress.widened,
            "cells_fractional": self.progress.fractional,
        }

    def _note(self) -> None:
        progress = self.progress
        if progress.fractional:
            progress.notes.append(
                f"{progress.fractional:,} of {progress.cells:,} cells have counts that are not whole numbers; they "
                "were embedded as they are, as TranscriptFormer's own command does."
            )
        if progress.set_aside:
            some = [f"{cell} ({why})" for cell, why in sorted(progress.set_aside.items())[:NAMED]]
            progress.notes.append(
                f"{len(progress.set_aside):,} of {progress.cells:,} cells cannot be embedded and are NaN, by position: "
                f"{', '.join(some)}{', ...' if len(progress.set_aside) > NAMED else ''}"
            )


@contextmanager
def open_own_cells(
    cells: anndata.AnnData | str | Path, options: Options, access: Access, model: OwnModel, *, whole: bool
) -> Iterator[OwnCells]:
    """Open cells and check that they can be embedded; `whole` is that of `open_cells`."""
    with open_cells(cells, access.storage, access.cache, whole=whole) as source:
        if not source.n_cells:
            raise UserError(f"{source.name} has no cells; expected at least one.")
        matrix = source.matrix(options.layer)
        column, genes = find_genes(matrix, source.name, model.checkpoint, options.gene_column, options.duplicate_genes)
        require_counts(source, matrix)
        known = model.known_genes(genes)
        about = (
            f"{matrix.name} of {source.name}: {source.n_cells:,} cells; the checkpoint knows {len(known):,} of "
            f"{len(genes):,} genes ({column})"
        )
        progress = Progress(about, source.n_cells)
        if len(known) < FEW_KNOWN * len(genes):
            progress.notes.append(
                f"the checkpoint knows only {len(known):,} of {len(genes):,} genes; if these are the right ids, it "
                "sees little of the cells."
            )
        assays, described = _assays(source, model, options, progress)
        size = min(max(source.n_cells // STEPS, SMALLEST_MEGABATCH), LARGEST_MEGABATCH)
        tokenizer = Tokenizer.over(genes, known, model.checkpoint)
        yield OwnCells(
            source=source,
            matrix=matrix,
            genes=genes,
            identity=model.identity(known, matrix.name, column, described, source.fingerprint(matrix)),
            embedding=Embedding(
                model.checkpoint, tokenizer, model.precision, model.device, options.batch_size, access.cache
            ),
            progress=progress,
            megabatches=[
                Megabatch(index, 0, first, min(first + size, source.n_cells) - 1, min(size, source.n_cells - first), 0)
                for index, first in enumerate(range(0, source.n_cells, size))
            ],
            _assays=assays,
            _whole_counts=model.fractional_counts == "set_aside",
        )


def _assays(source: CellSource, model: OwnModel, options: Options, progress: Progress) -> tuple[Sequence[str], str]:
    """Return the assay of each cell, and a description of where it came from."""
    vocabulary = model.checkpoint.aux_vocab
    if options.assay is not None:
        if options.assay_column is not None:
            raise UserError("`assay` and `assay_column` are both given; expected one of them.")
        if options.assay not in vocabulary:
            raise UserError(
                f"the checkpoint does not know the assay {options.assay!r}; expected one of: "
                f"{', '.join(sorted(vocabulary))}."
            )
        return [options.assay] * source.n_cells, f"all: {options.assay}"
    column = options.assay_column or model.checkpoint.aux_column
    obs = source.obs()
    if column not in obs:
        if options.assay_column is not None:
            raise UserError(
                f"obs of {source.name} has no column {column!r}; expected one of: {', '.join(map(str, obs.columns))}. "
                "Correct `assay_column`, or give one `assay` for all cells."
            )
        progress.notes.append(
            f"obs has no column {column!r}, so no cell gets an assay token; give `assay_column` or `assay` if you know "
            "the assays."
        )
        return [UNKNOWN_ASSAY] * source.n_cells, "none"
    assays = [value if isinstance(value, str) else UNKNOWN_ASSAY for value in obs[column]]
    counted = pd.Series(assays).value_counts()
    without = int(counted.get(UNKNOWN_ASSAY, 0))
    unknown = [str(label) for label in counted.index if label not in vocabulary]
    if without:
        progress.notes.append(f"{without:,} of {source.n_cells:,} cells have no assay and get no assay token")
    if unknown:
        progress.notes.append(
            f"{int(counted[unknown].sum()):,} of {source.n_cells:,} cells have an assay that the checkpoint does not "
            f"know and get no assay token: {', '.join(unknown[:NAMED])}{', ...' if len(unknown) > NAMED else ''}"
        )
    return assays, f"obs: {column}"
