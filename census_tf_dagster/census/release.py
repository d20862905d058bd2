"""Opens one organism of one Census release: its obs axis, its gene axis, its counts, and what identifies them.

Reading counts of chosen cells belongs in `cells`; the list of releases belongs in `directory`.
"""

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
from census_tf_dagster.io.storage import Storage

OBS_COLUMNS = {"soma_joinid", "is_primary_data"}
NNZ = "nnz"
"""In obs: number of genes that a cell expresses. In var: number of cells that express a gene. It exists since schema
1.1; the releases of 2023-05-15 and 2023-07-25 have it in neither table."""
MEASUREMENT = "RNA"
LAYER = "raw"
PRESENCE = "feature_dataset_presence_matrix"


@dataclass(frozen=True)
class Genes:
    """The gene axis of one organism, in `var` order.

    Attributes
    ----------
    ids
        Gene ids without version suffix, in the order of `var`'s soma_joinid. An id may occur more than once; see
        `repeated`.
    cells_expressing
        Number of cells that express each gene, int64 ``(n_genes,)``; None if the release does not state it.
    fingerprint
        SHA-256 over the ids in order. Tokens follow this order, so embeddings depend on it.
    """

    ids: tuple[str, ...]
    cells_expressing: npt.NDArray[np.int64] | None
    fingerprint: str

    def repeated(self) -> list[str]:
        """Return the ids that occur more than once, sorted."""
        return sorted(gene for gene, often in Counter(self.ids).items() if often > 1)


@dataclass(frozen=True)
class OrganismRelease:
    """An organism of an open Census release. `open_release` makes it.

    Attributes
    ----------
    uri
        Address of the Census.
    build_date
        `census_build_date` of its summary.
    organism
        Key under `census_data`.
    experiment, info
        The organism's experiment, and `census_info`.
    storage
        The storage that reads the Census.
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
        """Raw counts, cells x genes.

        Raises
        ------
        UserError
            When the layer is missing or dense.
        """
        try:
            layer = self.experiment.ms[MEASUREMENT].X[LAYER]
        except (KeyError, tiledbsoma.DoesNotExistError) as error:
            raise UserError(
                f"{self.organism} in {self.uri} has no X/{LAYER} ({error}). Expected raw counts in measurement "
                f"{MEASUREMENT}: use a Census that has them."
            ) from error
        if not isinstance(layer, tiledbsoma.SparseNDArray):
            raise UserError(
                f"X/{LAYER} of {self.organism} in {self.uri} is dense; expected a sparse array: use a Census that "
                "stores it sparse."
            )
        return layer

    def obs_rows(self) -> int:
        """Return the largest obs joinid + 1, which consumers expect as the array's first dimension."""
        _, last = self.obs.non_empty_domain()[0]
        return int(last) + 1

    @property
    def has_nnz(self) -> bool:
        """Whether obs states how many genes each cell expresses."""
        return NNZ in self.obs.keys()  # noqa: SIM118

    def cells(self) -> int:
        """Return the number of obs rows. Joinids may have gaps, so it may be less than `obs_rows`."""
        return int(self.obs.count)

    def storage_version(self) -> int:
        """Return the TileDB storage version of obs. Consumers expect the embedding in the same version."""
        return self.storage.storage_version(self.obs.uri)

    def dataset_titles(self) -> dict[str, str]:
        """Return the titles of the release's datasets by dataset id; empty if the release does not state them."""
        try:
            uri = f"{self.uri}/census_info/datasets"
            with tiledbsoma.DataFrame.open(uri, context=self.storage.soma_context_of_the_future) as frame:
                rows = frame.read(column_names=["dataset_id", "dataset_title"]).concat().to_pylist()
        except (tiledbsoma.DoesNotExistError, tiledbsoma.SOMAError):
            return {}
        return {str(row["dataset_id"]): str(row["dataset_title"]) for row in rows}

    def genes(self) -> Genes:
        """Read the gene axis.

        Raises
        ------
        UserError
            When var and X/raw do not match.
        """
        frame = self.experiment.ms[MEASUREMENT].var
        has_nnz = NNZ in frame.keys()  # noqa: SIM118
        columns = ["soma_joinid", "feature_id", *([NNZ] if has_nnz else [])]
        var = frame.read(column_names=columns).concat().sort_by("soma_joinid")
        joinids = var["soma_joinid"].to_numpy()
        if not np.array_equal(joinids, np.arange(len(joinids))):
            raise UserError(
                f"the soma_joinids of {self.organism}'s var in {self.uri} are not consecutive; expected 0 to "
                f"{len(joinids) - 1}, as a Census has them: use an undamaged Census."
            )
        ids = tuple(str(gene).split(".")[0] for gene in var["feature_id"].to_pylist())
        if not self._columns_fit(len(ids)):
            raise UserError(
                f"X/{LAYER} of {self.organism} in {self.uri} has {self.counts.shape[1]} columns, var has {len(ids)} "
                "genes. Expected equal numbers, so the Census is damaged: use an undamaged copy."
            )
        return Genes(
            ids=ids,
            cells_expressing=var[NNZ].to_numpy().astype(np.int64) if has_nnz else None,
            fingerprint=hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        )

    def _columns_fit(self, genes: int) -> bool:
        """Tell whether X/raw has one column per gene. Before SOMA 1.15, arrays were as wide as their type allows."""
        counts = self.counts
        if counts.tiledbsoma_has_upgraded_shape:
            return bool(counts.shape[1] == genes)
        _, (_, last) = counts.non_empty_domain()
        return bool(last < genes <= counts.shape[1])

    def dataset_versions(self) -> dict[str, tuple[int, str]]:
        """Return joinid and version of each dataset that is listed exactly once; empty if the Census has no list."""
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

    def presence(self, datasets: int, genes: int) -> npt.NDArray[np.bool_] | None:
        """Return which genes each dataset has, bool ``(datasets, genes)`` by joinid; None without such a matrix."""
        if PRESENCE not in (measurement := self.experiment.ms[MEASUREMENT]):
            return None
        matrix = measurement[PRESENCE]
        if not isinstance(matrix, tiledbsoma.SparseNDArray):
            return None
        found = np.zeros((datasets, genes), np.bool_)
        for table in matrix.read().tables():
            rows, columns, values = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
            # The matrix may hold other datasets, and its shape may be far larger than its content.
            inside = (rows < datasets) & (columns < genes)
            found[rows[inside], columns[inside]] = values[inside]
        return found

    def iter_obs(self, value_filter: str | None, columns: Iterable[str] = ()) -> Iterator[pa.Table]:
        """Yield tables of the matching cells, in any order.

        The tables have soma_joinid, is_primary_data, nnz (if obs has it) and `columns`.

        Raises
        ------
        UserError
            When `value_filter` cannot be parsed or names a column that does not exist.
        """
        try:
            names = OBS_COLUMNS | set(columns) | ({NNZ} if self.has_nnz else set())
            yield from self.obs.read(value_filter=value_filter, column_names=sorted(names))
        except (SyntaxError, ValueError, KeyError, tiledbsoma.SOMAError) as error:
            if value_filter is None or "IO Error" in str(error) or "S3" in str(error):
                raise
            hidden = ("soma_joinid", "_ontology_term_id")
            known = ", ".join(name for name in self.obs.keys() if not name.endswith(hidden))  # noqa: SIM118
            said = str(error).partition("\n")[0]
            raise UserError(
                f"value_filter {shortened(value_filter)} was not understood ({said[:160]}). Expected a SOMA filter "
                f"such as \"tissue_general == 'lung' and is_primary_data == True\": correct it in the set's YAML. The "
                f"obs columns are: {known}."
            ) from error


def shortened(text: str, characters: int = 160) -> str:
    """Return a text in quotes for a message, cut after `characters`."""
    return repr(text) if len(text) <= characters else f"{text[:characters]!r}..."


@contextmanager
def open_release(uri: str, organism: str, storage: Storage) -> Iterator[OrganismRelease]:
    """Open one organism of the Census at `uri`.

    Raises
    ------
    UserError
        When there is no Census, the organism is missing, or a column that embedding needs is missing.
    """
    try:
        census = cellxgene_census.open_soma(uri=uri, context=storage.soma_context_of_the_future)
    except (tiledbsoma.DoesNotExistError, TypeError) as error:
        # An unreachable server raises another error. The user cannot mend that, and Dagster may retry it.
        raise UserError(
            f"there is no Census at {uri} ({error}). Expected a SOMA collection: check the release's name and address."
        ) from error
    with census:
        try:
            organisms = sorted(census["census_data"].keys())
            summary = census["census_info"]["summary"].read().concat().to_pylist()
        except KeyError as error:
            raise UserError(
                f"{uri} is not a Census ({error.args[0]}); expected census_data and census_info in it: check the "
                "address."
            ) from error
        if organism not in organisms:
            raise UserError(
                f"organism {organism!r} is not in the Census at {uri}; expected one of: {', '.join(organisms)}. "
                "Correct the set's `organism`."
            )
        build_date = {row["label"]: row["value"] for row in summary}.get("census_build_date")
        if build_date is None:
            raise UserError(
                f"the summary of the Census at {uri} has no census_build_date; expected one, because it identifies the "
                "array: use a Census that has it."
            )
        experiment = census["census_data"][organism]
        missing = OBS_COLUMNS - set(experiment.obs.keys())
        if missing:
            raise UserError(
                f"obs of {organism} in {uri} lacks the columns {', '.join(sorted(missing))}; expected them in every "
                "Census: use an undamaged copy."
            )
        yield OrganismRelease(uri, build_date, organism, experiment, census["census_info"], storage)
