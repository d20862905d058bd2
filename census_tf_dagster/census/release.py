"""One organism of one Census release: its gene axis, its obs axis, and what identifies them."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cellxgene_census
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma

from census_tf_dagster.errors import UserError
from census_tf_dagster.storage import Storage

OBS_COLUMNS = {"soma_joinid", "nnz", "is_primary_data"}
MEASUREMENT = "RNA"
LAYER = "raw"
PRESENCE = "feature_dataset_presence_matrix"


@dataclass(frozen=True)
class Genes:
    """The gene axis of one organism, in `var` order.

    Attributes
    ----------
    ids
        Gene ids without version suffix, in the order of `var`'s soma_joinid.
    cells_expressing
        Number of cells that express each gene, int64 ``(n_genes,)``.
    fingerprint
        SHA-256 over the ids in order: embeddings depend on the order (tokens follow it).
    """

    ids: tuple[str, ...]
    cells_expressing: npt.NDArray[np.int64]
    fingerprint: str


@dataclass(frozen=True)
class OrganismRelease:
    """An opened organism of a Census release. Made by `open_release`.

    Attributes
    ----------
    uri
        Where the Census is.
    build_date
        `census_build_date` of its summary.
    organism
        Key under `census_data`.
    storage
        How it is read.
    """

    uri: str
    build_date: str
    organism: str
    experiment: tiledbsoma.Experiment
    info: tiledbsoma.Collection[Any]
    storage: Storage

    @property
    def obs(self) -> tiledbsoma.DataFrame:
        """The cells' metadata."""
        return self.experiment.obs

    @property
    def counts(self) -> tiledbsoma.SparseNDArray:
        """Raw counts, cells x genes."""
        try:
            layer = self.experiment.ms[MEASUREMENT].X[LAYER]
        except (KeyError, tiledbsoma.DoesNotExistError) as error:
            raise UserError(f"{self.organism} in {self.uri} has no X/{LAYER}: {error}") from error
        if not isinstance(layer, tiledbsoma.SparseNDArray):
            raise UserError(f"X/{LAYER} of {self.organism} in {self.uri} is dense; a Census stores it sparse.")
        return layer

    def obs_rows(self) -> int:
        """Return the largest obs joinid + 1: what consumers want as the array's first dimension."""
        _, last = self.obs.non_empty_domain()[0]
        return int(last) + 1

    def storage_version(self) -> int:
        """Return the TileDB storage version of obs: consumers want an embedding in the same one."""
        return self.storage.storage_version(self.obs.uri)

    def dataset_titles(self) -> dict[str, str]:
        """Return the titles of the release's datasets by their ids; empty when it does not tell."""
        try:
            uri = f"{self.uri}/census_info/datasets"
            with tiledbsoma.DataFrame.open(uri, context=self.storage.soma_context) as frame:
                rows = frame.read(column_names=["dataset_id", "dataset_title"]).concat().to_pylist()
        except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError):
            return {}
        return {str(row["dataset_id"]): str(row["dataset_title"]) for row in rows}

    def genes(self) -> Genes:
        """Read the gene axis.

        Raises
        ------
        UserError
            When two genes share an id once version suffixes are removed (upstream refuses those too).
        """
        var = (
            self.experiment.ms[MEASUREMENT]
            .var.read(column_names=["soma_joinid", "feature_id", "nnz"])
            .concat()
            .sort_by("soma_joinid")
        )
        joinids = var["soma_joinid"].to_numpy()
        if not np.array_equal(joinids, np.arange(len(joinids))):
            raise UserError(
                f"{self.uri} {self.organism}: var joinids are not 0..{len(joinids) - 1}; this is no Census."
            )
        ids = tuple(str(gene).split(".")[0] for gene in var["feature_id"].to_pylist())
        if len(set(ids)) < len(ids):
            seen: set[str] = set()
            twice = sorted({gene for gene in ids if gene in seen or seen.add(gene)})  # type: ignore[func-returns-value]
            raise UserError(
                f"{self.uri} {self.organism}: {len(twice)} gene ids occur more than once after removing "
                f"version suffixes, e.g. {twice[:3]}; each must be unique. Use a Census without duplicates."
            )
        if self.counts.shape[1] != len(ids):
            raise UserError(
                f"X/{LAYER} of {self.organism} in {self.uri} has {self.counts.shape[1]} columns, var has {len(ids)} "
                "genes; they must agree. The Census is damaged."
            )
        return Genes(
            ids=ids,
            cells_expressing=var["nnz"].to_numpy().astype(np.int64),
            fingerprint=hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        )

    def dataset_versions(self) -> dict[str, tuple[int, str]]:
        """Return joinid and version of each dataset that has exactly one; empty where the Census does not say."""
        if "datasets" not in self.info:
            return {}
        table = self.info["datasets"]
        columns = ["soma_joinid", "dataset_id", "dataset_version_id"]
        if not set(columns) <= set(table.keys()):
            return {}
        rows = table.read(column_names=columns).concat().to_pylist()
        often = Counter(row["dataset_id"] for row in rows)
        return {
            row["dataset_id"]: (int(row["soma_joinid"]), row["dataset_version_id"])
            for row in rows
            if row["dataset_id"] and row["dataset_version_id"] and often[row["dataset_id"]] == 1
        }

    def presence(self, datasets: int) -> npt.NDArray[np.bool_] | None:
        """Return which genes each dataset has, bool ``(datasets, genes)`` by joinids; None: the Census does not say."""
        if PRESENCE not in (measurement := self.experiment.ms[MEASUREMENT]):
            return None
        matrix = measurement[PRESENCE]
        if not isinstance(matrix, tiledbsoma.SparseNDArray):
            return None
        found = np.zeros((max(datasets, matrix.shape[0]), matrix.shape[1]), np.bool_)
        for table in matrix.read().tables():
            found[table["soma_dim_0"].to_numpy(), table["soma_dim_1"].to_numpy()] = table["soma_data"].to_numpy()
        return found

    def iter_obs(self, value_filter: str | None, columns: Iterable[str] = ()) -> Iterator[pa.Table]:
        """Yield tables of soma_joinid, nnz, is_primary_data and `columns` of the matching cells, in any order.

        Raises
        ------
        UserError
            When `value_filter` cannot be parsed or names a column that does not exist.
        """
        try:
            yield from self.obs.read(value_filter=value_filter, column_names=sorted(OBS_COLUMNS | set(columns)))
        except (SyntaxError, ValueError, KeyError, tiledbsoma.SOMAError) as error:
            if value_filter is None or "IO Error" in str(error) or "S3" in str(error):
                raise
            known = ", ".join(name for name in self.obs.keys() if not name.startswith("soma_"))  # noqa: SIM118
            said = str(error).partition("\n")[0][:200]
            shown = value_filter if len(value_filter) <= 80 else f"{value_filter[:80]}..."
            raise UserError(
                f"value_filter {shown!r} was not understood ({said}). Expected a SOMA filter such as "
                f"\"tissue_general == 'lung' and is_primary_data == True\" over the obs columns: {known}."
            ) from error


@contextmanager
def open_release(uri: str, organism: str, storage: Storage) -> Iterator[OrganismRelease]:
    """Open one organism of the Census at `uri`.

    Raises
    ------
    UserError
        When there is no Census, the organism is missing, or a column that embedding needs is.
    """
    try:
        census = cellxgene_census.open_soma(uri=uri, context=storage.soma_context)
    except (tiledbsoma.DoesNotExistError, TypeError) as error:
        # An unreachable server raises another error, which is no user's to mend: Dagster may retry it.
        raise UserError(f"there is no Census at {uri}: {error}") from error
    with census:
        try:
            organisms = sorted(census["census_data"].keys())
            summary = census["census_info"]["summary"].read().concat().to_pylist()
        except KeyError as error:
            raise UserError(
                f"{uri} is no Census; expected census_data and census_info in it ({error.args[0]})."
            ) from error
        if organism not in organisms:
            raise UserError(f"organism {organism!r} is not in the Census at {uri}. It has: {', '.join(organisms)}.")
        build_date = {row["label"]: row["value"] for row in summary}.get("census_build_date")
        if build_date is None:
            raise UserError(f"the summary of the Census at {uri} has no census_build_date.")
        experiment = census["census_data"][organism]
        missing = OBS_COLUMNS - set(experiment.obs.keys())
        if missing:
            raise UserError(f"obs of {organism} in {uri} lacks the columns {', '.join(sorted(missing))}.")
        yield OrganismRelease(uri, build_date, organism, experiment, census["census_info"], storage)
