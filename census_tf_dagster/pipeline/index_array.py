"""Builds the index of a verified array, and checks it.

The build reads the array once, block by block. Each finished block stays, so a build that was killed goes on with the
next one. Reading the index belongs in `search`.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import tiledb

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.config.thresholds import LEAST_RECALL
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.files import temporary_folder
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.pipeline.context import StoredContext
from census_tf_dagster.quality.sample import RUN, SEED, read_embeddings
from census_tf_dagster.search.arrays_file import from_bytes, to_bytes
from census_tf_dagster.search.cluster import cluster
from census_tf_dagster.search.index import (
    FORMAT,
    IndexDescription,
    SearchIndex,
    description_uri,
    file_checksum,
    search,
    vectors_uri,
)
from census_tf_dagster.search.projection import Projection
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.obs_ids import read_obs_ids
from census_tf_dagster.store.verification import release_state

DIMENSIONS = 256
"""Values of a projected embedding; all components if there are no more."""
BLOCK_CELLS = 65_536
CELLS_AT_ONCE = 4096
SAMPLE_CELLS = 65_536
"""Cells that the projection is fitted to."""
JUDGED_CELLS = 256
"""Cells whose exact nearest neighbours are found, to measure the recall."""
NEAREST = 10
MOST_PROBES = 256

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class IndexSummary:
    """A finished index.

    Attributes
    ----------
    description
        What `index.json` states.
    recall
        Share of the exact nearest neighbours that the index finds, 0 to 1.
    bytes
        Size of the index.
    uri
        TileDB-Vector-Search's group.
    """

    description: IndexDescription
    recall: float
    bytes: int
    uri: str


def build_index(context: StoredContext, say: Callable[[str], None] = lambda _: None) -> IndexSummary:
    """Build the index of a verified array, unless it is there and undamaged.

    Cells without counts are left out, because their embeddings depend on nothing but the assay.

    Parameters
    ----------
    context
        The opened set, with a release or file.
    say
        Called with a message after each part.

    Raises
    ------
    UserError
        When the array is not verified or no cell can be indexed.
    """
    array = _verified(context)
    joinids = _indexed_cells(context, array)
    build = _Build(context, array, joinids, say)
    description = build.finished()
    if description is None:
        description = build.run()
        context.store.write(description_uri(context.folder.index), description.as_bytes())
    build.remove_others()
    index = SearchIndex.open(context.folder.index, context.store, context.identity.digest)
    size = sum(size for size, _ in description.files.values())
    return IndexSummary(description, build.recall(description.probes), size, index.uri)


def index_faults(context: StoredContext) -> list[str]:
    """Compare the index with the array and with what was written; return what is wrong.

    Raises
    ------
    UserError
        When the array is not verified.
    """
    array = _verified(context)
    joinids = _indexed_cells(context, array)
    try:
        index = SearchIndex.open(context.folder.index, context.store, context.identity.digest)
    except UserError as error:
        return [str(error)]
    if index.description.build != _name(context, array, joinids):
        return ["it was built from another state of the array"]
    if faults := index.faults():
        return faults
    found = index.joinids()
    faults = []
    for cells, what in (
        (found[1:][np.diff(found) == 0], "are in it more than once"),
        (np.setdiff1d(joinids, found), "are not in it"),
        (np.setdiff1d(found, joinids), "are in it and should not be"),
    ):
        if len(cells):
            faults.append(f"{len(cells)} cells {what}, joinids {cells[:10].tolist()}")
    return faults


def measured_recall(context: StoredContext) -> float:
    """Return the share of the exact nearest neighbours of a sample that the finished index finds.

    Raises
    ------
    UserError
        When there is no index, or it cannot be read.
    """
    array = _verified(context)
    index = SearchIndex.open(context.folder.index, context.store, context.identity.digest)
    build = _Build(context, array, _indexed_cells(context, array), lambda _: None)
    return build.recall(index.description.probes)


def _verified(context: StoredContext) -> EmbeddingsArray:
    plan = read_plan(context.store, context.folder.plan)
    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    if (state := release_state(array, plan)) != "verified":
        raise UserError(f"the array is {state}; expected verified: materialize embeddings_array first.")
    return array


def _indexed_cells(context: StoredContext, array: EmbeddingsArray) -> Ids:
    listed = read_obs_ids(context.store, context.folder, array.read_record().get("obs_ids"))
    embedded = listed["set_aside"].is_null().to_numpy()
    empty = listed["zero_counts"].fill_null(False).to_numpy()
    joinids: Ids = listed["soma_joinid"].to_numpy()[embedded & ~empty]
    if not len(joinids):
        raise UserError("the array has no cell with counts and an embedding; expected some to search for.")
    return joinids


def _name(context: StoredContext, array: EmbeddingsArray, joinids: Ids) -> str:
    """Return the name of the build: it changes with everything that the index depends on."""
    record = array.read_record()
    facts = [FORMAT, DIMENSIONS, context.identity.digest, record["plan"], record["covered"]]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(joinids.astype("<i8").tobytes())
    return digest.hexdigest()[:12]


class _Build:
    """The folder of a build, and the steps that fill it."""

    def __init__(
        self, context: StoredContext, array: EmbeddingsArray, joinids: Ids, say: Callable[[str], None]
    ) -> None:
        self.name = _name(context, array, joinids)
        self._context, self._array, self._joinids, self._say = context, array, joinids, say
        self._store: Storage = context.store
        self._folder = f"{context.folder.index}/{self.name}"
        self._work = f"{self._folder}/work"
        self._projected = f"{self._work}/projected"
        self._ids = f"{self._work}/ids"
        self._blocks = -(-len(joinids) // BLOCK_CELLS)
        self._rng = np.random.default_rng(SEED)
        self._sample = _sampled(len(joinids), self._rng)
        count = min(JUDGED_CELLS, len(self._sample))
        self._judged = joinids[np.sort(self._rng.choice(self._sample, count, replace=False))]

    @property
    def _partitions(self) -> int:
        return max(1, round(math.sqrt(len(self._joinids))))

    @cached_property
    def _judged_embeddings(self) -> Vectors:
        return read_embeddings(self._array, self._judged)

    def run(self) -> IndexDescription:
        """Build the index; return its description, which the caller writes."""
        projection = self._projection()
        self._project(projection)
        self._write_truth()
        self._cluster()
        probes = self._calibrated()
        self._say(f"index: {probes} of {self._partitions} partitions are read for each cell")
        typical = self._typical_distances(projection, probes)
        if self._store.is_folder(self._work):
            self._store.remove_folder(self._work)
        return IndexDescription(
            format=FORMAT,
            build=self.name,
            identity=self._context.identity.digest,
            plan=str(self._array.read_record()["plan"]),
            cells=len(self._joinids),
            dimensions=projection.n_dimensions,
            partitions=self._partitions,
            variance_kept=projection.variance_kept,
            probes=probes,
            typical_distances=typical,
            files={
                name: (size, file_checksum(self._store, f"{self._folder}/{name}"))
                for name, size in self._store.file_sizes(self._folder).items()
            },
            packages={name: version(name) for name in ("census-tf-dagster", "tiledb-vector-search")},
        )

    def finished(self) -> IndexDescription | None:
        """Return the description of this build if it is finished. One that is damaged is removed."""
        try:
            index = SearchIndex.open(self._context.folder.index, self._store, self._context.identity.digest)
        except UserError:
            return None
        if index.description.build != self.name:
            return None
        if faults := index.faults():
            self._say(f"index: it is damaged ({faults[0]}), so it is built anew")
            self._store.remove_folder(self._folder)
            return None
        return index.description

    def remove_others(self) -> None:
        """Remove other builds of this index."""
        for entry in self._store.list(self._context.folder.index):
            if self._store.is_folder(entry) and entry.rstrip("/") != self._folder:
                self._store.remove_folder(entry)

    def _projection(self) -> Projection:
        uri = f"{self._folder}/projection.npz"
        if self._store.exists(uri):
            return Projection.from_bytes(self._store.read(uri))
        fitted = Projection.fit(read_embeddings(self._array, self._joinids[self._sample]), DIMENSIONS)
        self._store.write(uri, fitted.as_bytes())
        self._say(f"index: {fitted.n_dimensions} components keep {fitted.variance_kept:.2%} of the variance")
        return fitted

    def _project(self, projection: Projection) -> None:
        """Project all cells, and find the exact neighbours of the judged ones on the way."""
        n, dimensions = len(self._joinids), projection.n_dimensions
        if not self._store.is_folder(self._ids):
            for leftover in (self._projected, self._ids):
                if self._store.is_folder(leftover):
                    self._store.remove_folder(leftover)
            rows = tiledb.Dim("rows", (0, dimensions - 1), dimensions, dtype=np.int32)
            cells = tiledb.Dim("cols", (0, n - 1), min(n, CELLS_AT_ONCE), dtype=np.int32)
            _create(self._projected, (rows, cells), np.float32, self._store)
            ids = tiledb.Dim("rows", (0, n - 1), min(n, BLOCK_CELLS), dtype=np.int32)
            _create(self._ids, (ids,), np.uint64, self._store)
            with tiledb.open(self._ids, "w", ctx=self._store.tiledb_ctx) as array:
                array[:] = self._joinids.astype(np.uint64)
        for block in range(self._blocks):
            if self._store.exists(self._block(block)):
                continue
            self._project_block(block, projection)
            self._say(f"index: projected {min((block + 1) * BLOCK_CELLS, n)} of {n} cells")

    def _project_block(self, block: int, projection: Projection) -> None:
        ids = self._joinids[block * BLOCK_CELLS : (block + 1) * BLOCK_CELLS]
        projected = np.empty((len(ids), projection.n_dimensions), np.float32)
        exact = _Nearest(len(self._judged))
        centred = self._judged_embeddings - projection.mean
        for start in range(0, len(ids), CELLS_AT_ONCE):
            part = slice(start, start + CELLS_AT_ONCE)
            embeddings = read_embeddings(self._array, ids[part])
            projected[part] = projection(embeddings)
            exact.add(self._judged, centred, ids[part], embeddings - projection.mean)
        with tiledb.open(self._projected, "w", ctx=self._store.tiledb_ctx) as array:
            array[:, block * BLOCK_CELLS : block * BLOCK_CELLS + len(ids)] = projected.T
        self._store.write(self._block(block), to_bytes(joinids=exact.joinids, squared=exact.squared))

    def _block(self, block: int) -> str:
        return f"{self._work}/exact/{block:05d}.npz"

    def _write_truth(self) -> None:
        if self._store.exists(self._truth):
            return
        exact = _Nearest(len(self._judged))
        for block in range(self._blocks):
            joinids, squared = from_bytes(self._store.read(self._block(block)), ("joinids", "squared"))
            exact.merge(joinids.astype(np.int64), squared.astype(np.float32))
        self._store.write(self._truth, to_bytes(joinids=exact.joinids, squared=exact.squared))

    @property
    def _truth(self) -> str:
        return f"{self._folder}/exact.npz"

    def _cluster(self) -> None:
        """Let TileDB-Vector-Search cluster the projected cells. A part of an interrupted run is of no use."""
        uri, done = vectors_uri(self._folder), f"{self._work}/clustered"
        if self._store.exists(done):
            return
        if self._store.is_folder(uri):
            self._store.remove_folder(uri)
        positions = _sampled(len(self._joinids), np.random.default_rng(SEED), max(SAMPLE_CELLS, 32 * self._partitions))
        with tiledb.open(self._projected, ctx=self._store.tiledb_ctx) as array:
            reader = array.query(attrs=["values"], order="F")
            sample = np.concatenate([reader[:, int(run[0]) : int(run[-1]) + 1]["values"].T for run in _runs(positions)])
        with temporary_folder() as folder:
            file = f"{folder}/sample.npy"
            np.save(file, sample)
            cluster(uri, self._projected, self._ids, file, self._partitions, self._store.s3.tiledb_config())
        self._store.write(done, b"")
        self._say(f"index: clustered into {self._partitions} partitions")

    def _calibrated(self) -> int:
        """Return the least number of probes, a power of two, with the wanted recall, or after which it stops rising."""
        probes, before = 4, -1.0
        while True:
            now = self.recall(probes)
            if now >= LEAST_RECALL or now < before + 0.002 or probes >= min(self._partitions, MOST_PROBES):
                return min(probes, self._partitions)
            probes, before = probes * 2, now

    def _typical_distances(self, projection: Projection, probes: int) -> list[float]:
        projected = projection(self._judged_embeddings)
        found = search(vectors_uri(self._folder), self._store, projected, NEAREST + 1, probes, self._partitions)
        others = np.where(found.joinids == self._judged[:, None], np.inf, found.distances)
        means = [float(row[np.isfinite(row)][:NEAREST].mean()) for row in np.sort(others, axis=1) if row[0] < np.inf]
        return [float(value) for value in np.quantile(means or [0.0], np.linspace(0, 1, 101))]

    def recall(self, probes: int) -> float:
        """Return the share of exact nearest neighbours that the index finds.

        A found cell counts if it is no farther than the last exact neighbour: equal cells may replace each other.
        """
        projection = Projection.from_bytes(self._store.read(f"{self._folder}/projection.npz"))
        _, exact = from_bytes(self._store.read(self._truth), ("joinids", "squared"))
        wanted = np.isfinite(exact).sum()
        if not wanted:
            return 1.0
        judged = self._judged_embeddings
        found = search(
            vectors_uri(self._folder), self._store, projection(judged), NEAREST + 1, probes, self._partitions
        ).joinids
        candidates = np.unique(found[found >= 0])
        vectors = read_embeddings(self._array, candidates) - projection.mean
        hits = 0
        for own, cell, ids, squared in zip(judged - projection.mean, self._judged, found, exact, strict=True):
            ids = ids[(ids >= 0) & (ids != cell)][:NEAREST]
            farthest = squared[np.isfinite(squared)].max(initial=0)
            distances = ((vectors[np.searchsorted(candidates, ids)] - own) ** 2).sum(axis=1)
            hits += int((distances <= farthest * (1 + 1e-4) + 1e-6).sum())
        return hits / int(wanted)


class _Nearest:
    """The exact nearest neighbours of some cells among those that were added, without the cells themselves."""

    def __init__(self, cells: int) -> None:
        self.joinids = np.full((cells, NEAREST), -1, np.int64)
        self.squared = np.full((cells, NEAREST), np.inf, np.float32)

    def add(self, cells: Ids, centred: Vectors, joinids: Ids, others: Vectors) -> None:
        """Add cells. Both sides are centred, so that float32 suffices."""
        squared = (others**2).sum(axis=1) - 2 * centred @ others.T + (centred**2).sum(axis=1)[:, None]
        squared[joinids[None, :] == cells[:, None]] = np.inf
        self.merge(np.broadcast_to(joinids, squared.shape), np.maximum(squared, 0))

    def merge(self, joinids: Ids, squared: Vectors) -> None:
        """Add candidates of each cell, ``(cells, n)``."""
        ids, values = np.hstack([self.joinids, joinids]), np.hstack([self.squared, squared])
        order = np.argpartition(values, NEAREST - 1, axis=1)[:, :NEAREST]
        self.joinids, self.squared = np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)


def _sampled(n: int, rng: np.random.Generator, cells: int = SAMPLE_CELLS) -> Ids:
    """Return ascending positions of a sample of `n` cells, in runs of adjacent cells."""
    if n <= cells:
        return np.arange(n)
    starts = np.sort(rng.choice(n // RUN, cells // RUN, replace=False)) * RUN
    return (starts[:, None] + np.arange(RUN)).reshape(-1)


def _runs(positions: Ids) -> list[Ids]:
    return np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)


def _create(uri: str, dimensions: tuple[tiledb.Dim, ...], dtype: type, storage: Storage) -> None:
    filters = tiledb.FilterList([tiledb.ByteShuffleFilter(), tiledb.ZstdFilter(3)])
    schema = tiledb.ArraySchema(
        domain=tiledb.Domain(*dimensions),
        attrs=[tiledb.Attr("values", dtype=dtype, filters=filters)],
        cell_order="col-major",
        tile_order="col-major",
        ctx=storage.tiledb_ctx,
    )
    tiledb.Array.create(uri, schema, ctx=storage.tiledb_ctx)
