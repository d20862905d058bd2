"""Opens the index of a release's embeddings, and finds nearest cells in it.

The index is an ``IVF_FLAT`` index of TileDB-Vector-Search over projected embeddings, with joinids as external ids. Its
description, `index.json`, is written last, so an index without one is not finished.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tiledb
import xxhash

from census_tf_dagster.config import variables
from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import Identity
from census_tf_dagster.io.names import normalise
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.search.projection import Projection
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.layout import ReleaseFolder

FORMAT = 1
"""Version of the files of an index."""
PIECE = 2**24
BUDGET_BYTES = 2**30
"""Most bytes of projected embeddings that a search holds."""
QUERIES_AT_ONCE = 10_000
"""Most cells that are searched together. A partition that several of them probe is read once."""


@dataclass(frozen=True)
class IndexDescription:
    """What `index.json` states.

    Attributes
    ----------
    format
        Version of the files.
    build
        Name of the folder with the files, beside the description.
    identity, plan
        Identity of the array, and its plan.
    cells, dimensions, partitions
        Number of cells, of values of a projected embedding, and of k-means clusters.
    variance_kept
        Share of the variance that the projection keeps.
    probes
        Number of partitions that a search reads for each cell, unless it is told otherwise.
    typical_distances
        Quantiles 0, 0.01 ... 1 of the mean distance of a cell of the release to its 10 nearest others.
    files
        Size in bytes and XXH3-128 checksum of each file of the index, by path within the build.
    packages
        Versions that built it.
    """

    format: int
    build: str
    identity: str
    plan: str
    cells: int
    dimensions: int
    partitions: int
    variance_kept: float
    probes: int
    typical_distances: list[float]
    files: dict[str, tuple[int, str]]
    packages: dict[str, str]

    def as_bytes(self) -> bytes:
        """Return the content of `index.json`."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def read(cls, storage: Storage, folder: str) -> "IndexDescription | None":
        """Read the description of the index in a folder; None if there is no finished index.

        Raises
        ------
        UserError
            When it is damaged or of another format.
        """
        uri = description_uri(folder)
        if not storage.exists(uri):
            return None
        try:
            found: Mapping[str, Any] = json.loads(storage.read(uri))
            if found["format"] != FORMAT:
                raise ValueError(f"it has format {found['format']}, expected {FORMAT}")
            files = {str(name): (int(size), str(checksum)) for name, (size, checksum) in found["files"].items()}
            return cls(**{**found, "files": files})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{uri} is no description of an index ({error}): materialize embeddings_index again."
            ) from error


def description_uri(folder: str) -> str:
    """Return the address of the description of the index in a folder."""
    return f"{folder}/index.json"


def vectors_uri(build: str) -> str:
    """Return the address of TileDB-Vector-Search's group in the folder of a build."""
    return f"{build}/ivf"


@dataclass(frozen=True)
class Neighbours:
    """The nearest cells of each query, nearest first.

    Attributes
    ----------
    joinids
        Of the nearest cells, int64 ``(n, k)``; -1 where the index has no more cells.
    distances
        Euclidean distances to them between projected embeddings, float32 ``(n, k)``; infinite where there is no cell.
    """

    joinids: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]


class SearchIndex:
    """A finished index, opened.

    Attributes
    ----------
    description
        What `index.json` states.
    projection
        How embeddings are projected.
    uri
        TileDB-Vector-Search's group.
    """

    def __init__(self, folder: str, storage: Storage, description: IndexDescription) -> None:
        self.description = description
        self._build = f"{folder}/{description.build}"
        self.uri = vectors_uri(self._build)
        self._storage = storage
        self.projection = Projection.from_bytes(storage.read(f"{self._build}/projection.npz"))

    @classmethod
    def open(cls, folder: str, storage: Storage, identity: str) -> "SearchIndex":
        """Open the index of an array.

        Parameters
        ----------
        folder
            `ReleaseFolder.index`.
        identity
            Digest of the array's identity.

        Raises
        ------
        UserError
            When there is no finished index, or it belongs to another array.
        """
        description = IndexDescription.read(storage, folder)
        if description is None:
            raise UserError(f"there is no finished index at {folder}; expected one: materialize embeddings_index.")
        if description.identity != identity:
            raise UserError(
                f"the index at {folder} belongs to the array {description.identity[:12]}, not to {identity[:12]}: "
                "materialize embeddings_index again."
            )
        try:
            return cls(folder, storage, description)
        except ValueError as error:
            raise UserError(
                f"the index at {folder} is damaged ({error}): materialize embeddings_index again."
            ) from error

    def nearest(self, embeddings: npt.NDArray[np.float32], k: int = 10, probes: int | None = None) -> Neighbours:
        """Find the nearest cells of the release.

        Parameters
        ----------
        embeddings
            Embeddings of the same model and gene order as the release's, float32 ``(n, n_features)``, finite.
        k
            Number of cells to find for each.
        probes
            Number of partitions to read for each. Default: what the index was calibrated for.

        Raises
        ------
        UserError
            When the number of features differs, values are not finite, or the index cannot be read.
        """
        projected = self.projection(embeddings)
        if not np.isfinite(projected).all():
            raise UserError(
                f"{int((~np.isfinite(projected).all(axis=1)).sum())} of {len(embeddings)} embeddings are not finite; "
                "expected finite ones: leave out the cells that cannot be embedded."
            )
        return search(
            self.uri, self._storage, projected, k, probes or self.description.probes, self.description.partitions
        )

    def joinids(self) -> npt.NDArray[np.int64]:
        """Return the joinids of all cells in the index, ascending, int64 ``(n,)``."""
        with tiledb.open(f"{self.uri}/shuffled_vector_ids", ctx=self._storage.tiledb_ctx) as array:
            found = array.query(attrs=["values"])[0 : self.description.cells]["values"]
        return np.sort(found.astype(np.int64))

    def faults(self) -> list[str]:
        """Compare each file of the index with its size and checksum; return what is wrong."""
        there = self._storage.file_sizes(self._build)
        stated = self.description.files
        faults = [f"{name} is missing" for name in sorted(stated.keys() - there.keys())]
        for name in sorted(stated.keys() & there.keys()):
            size, checksum = stated[name]
            if there[name] != size:
                faults.append(f"{name} has {there[name]} bytes, expected {size}")
            elif file_checksum(self._storage, f"{self._build}/{name}") != checksum:
                faults.append(f"{name} holds other bytes than were written")
        return faults


def open_index(array: str) -> SearchIndex:
    """Open the index of a finished array.

    Parameters
    ----------
    array
        Address of the array, as `census-tf-dagster inspect` prints it. For one on S3, the environment has
        `CENSUS_TF_STORE_S3_REGION` and, if it is not AWS, `CENSUS_TF_STORE_S3_ENDPOINT`.

    Raises
    ------
    UserError
        When there is no such array, or it has no finished index.
    """
    region = variables.region(os.environ, "CENSUS_TF_STORE_S3_REGION", "")
    endpoint = variables.endpoint(os.environ, "CENSUS_TF_STORE_S3_ENDPOINT")
    storage = Storage(S3Settings(region, endpoint))
    address = normalise(array)
    _, stated = EmbeddingsArray.look(address, storage)
    try:
        identity = Identity(**json.loads(stated or ""))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{address} is no array of a release ({error}); expected the address that `census-tf-dagster inspect` "
            "prints for a finished release."
        ) from error
    folder = ReleaseFolder(address.rpartition("/")[0])
    return SearchIndex.open(folder.index, storage, identity.digest)


def search(
    uri: str, storage: Storage, projected: npt.NDArray[np.float32], k: int, probes: int, partitions: int
) -> Neighbours:
    """Search the group at `uri` for projected embeddings; see `SearchIndex.nearest`."""
    # It takes a second to import.
    from tiledb.vector_search.ivf_flat_index import IVFFlatIndex

    joinids = np.full((len(projected), k), -1, np.int64)
    distances = np.full((len(projected), k), np.inf, np.float32)
    try:
        index = IVFFlatIndex(
            uri=uri, config=storage.tiledb_ctx.config().dict(), memory_budget=BUDGET_BYTES // (4 * projected.shape[1])
        )
        for start in range(0, len(projected), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            squared, found = index.query(projected[part], k=k, nprobe=min(probes, partitions))
            real = found != np.iinfo(np.uint64).max
            joinids[part][real] = found[real].astype(np.int64)
            distances[part][real] = np.sqrt(np.maximum(squared[real], 0))
    except (tiledb.TileDBError, RuntimeError) as error:
        raise UserError(f"the index at {uri} cannot be read ({error}): materialize embeddings_index again.") from error
    return Neighbours(joinids, distances)


def file_checksum(storage: Storage, uri: str) -> str:
    """Return the XXH3-128 checksum of a file."""
    digest = xxhash.xxh3_128()
    with storage.open(uri) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
