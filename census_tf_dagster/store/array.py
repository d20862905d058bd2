"""The embeddings array: a TileDB-SOMA `SparseNDArray`, float32, cells x features.

`soma_dim_0` is the Census obs joinid. Every embedded cell stores all its values. One write is one fragment,
atomic. The array itself is the checkpoint: what is committed stands in its fragments.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledb
import tiledbsoma

from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import Identity
from census_tf_dagster.publication import INFO_KEY
from census_tf_dagster.s3 import StoreError
from census_tf_dagster.storage import Storage

IDENTITY_KEY = "census_tf_identity"
"""Array metadata key of the identity's JSON."""
RECORD_KEY = "census_tf_record"
"""Array metadata key of the record's JSON: written once the array is proved."""

# Sorted coordinates are almost free with double-delta; zstd 1 takes a seventh of the time of the consumers'
# levels 9 and 19 for a few percent of size (docs/performance.md).
_ZSTD: Any = {"_type": "ZstdFilter", "level": 1}
_TILE_ROWS = 2048


def _creation_options(n_features: int) -> tiledbsoma.TileDBCreateOptions:
    # With one tile over all features, cells sorted by joinid and feature stand in global order.
    coordinates: Any = ["DoubleDeltaFilter", _ZSTD]
    return tiledbsoma.TileDBCreateOptions(
        capacity=2**17,
        allows_duplicates=False,
        tile_order="row-major",
        cell_order="row-major",
        dims={
            "soma_dim_0": {"tile": _TILE_ROWS, "filters": coordinates},
            "soma_dim_1": {"tile": n_features, "filters": coordinates},
        },
        attrs={"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD]}},
    )


@dataclass(frozen=True)
class Fragment:
    """One committed write.

    Attributes
    ----------
    name
        Unique name within the array.
    first, last
        Smallest and largest joinid in it.
    values
        Number of stored values (cells x features).
    """

    name: str
    first: int
    last: int
    values: int


@dataclass(frozen=True)
class EmbeddingsArray:
    """An array whose identity was compared. Made by `create` or `open`."""

    uri: str
    storage: Storage
    shape: tuple[int, int]
    n_features: int
    """Values of each embedding: the second dimension, as the identity says."""

    @property
    def rows(self) -> int:
        """The first dimension: joinids are below it."""
        return self.shape[0]

    @classmethod
    def create(cls, uri: str, storage: Storage, identity: Identity, rows: int) -> "EmbeddingsArray":
        """Create the array, or open it when it is there already.

        A folder without any file counts as absent: a creation that was cut short leaves it.

        Parameters
        ----------
        uri, storage
            Where.
        identity
            What it will hold; an array of another identity is refused.
        rows
            The Census's largest obs joinid + 1, the first dimension that consumers expect.

        Raises
        ------
        UserError
            When something else stands there.
        """
        # Asked first: TileDB would create an array inside a group that stands there.
        if not storage.holds_files(uri):
            try:
                # TileDB creates nothing where its own folders stand.
                storage.remove_empty_folders(uri)
                tiledbsoma.SparseNDArray.create(
                    uri,
                    type=pa.float32(),
                    shape=(rows, identity.embedding_dim),
                    platform_config=_creation_options(identity.embedding_dim),
                    context=storage.soma_context,
                ).close()
            except tiledbsoma.AlreadyExistsError:
                pass
            except (tiledbsoma.SOMAError, OSError, RuntimeError) as error:
                raise UserError(f"the store cannot be written at {uri}: {error}") from error
        found, stored = cls.look(uri, storage)
        if found.rows != rows:
            raise UserError(f"the array at {uri} has {found.rows} rows; the Census has joinids up to {rows - 1}.")
        # Whoever created it may have died before this line.
        if stored is None and found.n_features == identity.embedding_dim and not found.fragments():
            with tiledbsoma.SparseNDArray.open(uri, "w", context=storage.soma_context) as array:
                array.metadata[IDENTITY_KEY] = identity.to_json()
        return cls.open(uri, storage, identity)

    @classmethod
    def open(cls, uri: str, storage: Storage, identity: Identity) -> "EmbeddingsArray":
        """Open an existing array after comparing identities.

        Raises
        ------
        UserError
            When there is no array of ours, or one of another identity.
        """
        found, stored = cls.look(uri, storage)
        if stored is None:
            raise UserError(f"the array at {uri} was not made by this project: it has no {IDENTITY_KEY}.")
        identity.require_equal(stored, f"the array at {uri}")
        return replace(found, n_features=identity.embedding_dim)

    @classmethod
    def look(cls, uri: str, storage: Storage) -> tuple["EmbeddingsArray", str | None]:
        """Open whatever array is there, for reading; return it with its identity's JSON, if it has one."""
        try:
            with tiledbsoma.SparseNDArray.open(uri, context=storage.soma_context) as array:
                rows, n_features = map(int, array.shape)
                return cls(uri, storage, (rows, n_features), n_features), array.metadata.get(IDENTITY_KEY)
        except tiledbsoma.DoesNotExistError as error:
            if storage.holds_files(uri):
                raise UserError(f"{uri} holds something that is no SparseNDArray; move it away.") from error
            raise UserError(f"there is no array at {uri}: materialize obs_id_plan of this release first.") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{uri} holds something that is no SparseNDArray; move it away ({error}).") from error

    @contextmanager
    def writing(self) -> Iterator[Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], None]]:
        """Open the array once for many writes: what opening costs grows with the fragments, three requests each on S3.

        Yields
        ------
        Callable
            Commits some cells as one fragment, at once: joinids, strictly ascending, int64 ``(n,)``, and their
            embeddings, float32 ``(n, n_features)``, finite. All fragments of one opening carry its time, and of two
            values for a cell the later opening wins, so give no cell twice. Raises `StoreError` when the store stays
            unreachable or has no room; nothing of these cells is there then.
        """
        with ExitStack() as stack:
            opened: list[tiledbsoma.SparseNDArray] = []

            def write(joinids: npt.NDArray[np.int64], embeddings: npt.NDArray[np.float32]) -> None:
                table = self._table(joinids, embeddings)
                with self._committing(f"{len(joinids)} cells"):
                    if not opened:
                        array = tiledbsoma.SparseNDArray.open(self.uri, "w", context=self.storage.soma_context)
                        opened.append(stack.enter_context(array))
                    # Not sorted again: it is in global order.
                    opened[0].write(table, platform_config=tiledbsoma.TileDBWriteOptions(sort_coords=False))

            yield write

    def write(self, joinids: npt.NDArray[np.int64], embeddings: npt.NDArray[np.float32]) -> None:
        """Commit some cells as one fragment, as `writing` says."""
        with self.writing() as write:
            write(joinids, embeddings)

    def _table(self, joinids: npt.NDArray[np.int64], embeddings: npt.NDArray[np.float32]) -> pa.Table:
        n = len(joinids)
        if embeddings.shape != (n, self.n_features):
            raise ValueError(f"embeddings are {embeddings.shape}; expected ({n}, {self.n_features})")
        # TileDB does not look again (`storage.UNCHECKED_WRITES`).
        if not n or joinids[0] < 0 or joinids[-1] >= self.rows or (np.diff(joinids) <= 0).any():
            raise ValueError(f"joinids must be strictly ascending in 0 to {self.rows - 1}")
        return pa.table(
            {
                "soma_dim_0": np.repeat(joinids, self.n_features),
                "soma_dim_1": np.tile(np.arange(self.n_features, dtype=np.int64), n),
                "soma_data": embeddings.reshape(-1),
            }
        )

    @contextmanager
    def _writing(self, what: str) -> Iterator[tiledbsoma.SparseNDArray]:
        with (
            self._committing(what),
            tiledbsoma.SparseNDArray.open(self.uri, "w", context=self.storage.soma_context) as array,
        ):
            yield array

    @contextmanager
    def _committing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (tiledbsoma.SOMAError, tiledb.TileDBError, RuntimeError) as error:
            raise StoreError(
                f"{what} could not be written to {self.uri}: {error}. What is committed stays: run this again when the "
                "store can be written."
            ) from error

    def fragments(self) -> list[Fragment]:
        """List what is committed, from metadata alone; in order of the first joinid."""
        infos = tiledb.FragmentInfoList(self.uri, ctx=self.storage.tiledb_ctx)
        found = [
            Fragment(
                name=info.uri.rstrip("/").rsplit("/", 1)[-1],
                first=int(info.nonempty_domain[0][0]),
                last=int(info.nonempty_domain[0][1]),
                values=int(info.cell_num),
            )
            for info in infos
        ]
        return sorted(found, key=lambda fragment: (fragment.first, fragment.name))

    def joinids_between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Read which cells are present in a range of joinids, by their first feature; ascending."""
        with tiledbsoma.SparseNDArray.open(self.uri, context=self.storage.soma_context) as array:
            tables = array.read(coords=(slice(first, last), slice(0, 0))).tables()
            return np.sort(tables.concat()["soma_dim_0"].to_numpy())

    @contextmanager
    def reading(self) -> Iterator[Callable[[slice | pa.Array], Iterator[pa.Table]]]:
        """Open the array once, however often it is asked: what opening costs grows with the fragments.

        Yields
        ------
        Callable
            Gives all stored values with joinids in a range, both ends inclusive, or of a list, as tables of soma_dim_0,
            soma_dim_1 and soma_data.
        """
        with tiledbsoma.SparseNDArray.open(self.uri, context=self.storage.soma_context) as array:
            yield lambda joinids: array.read(coords=(joinids, slice(None))).tables()

    def gather_metadata(self) -> None:
        """Gather what fragments say of themselves in one file.

        A reader on S3 opens the array with about 15 requests and one for each such file then, not with three a fragment
        (docs/scale.md). Nothing is removed, so no reader is harmed; it may be repeated.
        """
        config = tiledb.Config({"sm.consolidation.mode": "fragment_meta"})
        try:
            tiledb.consolidate(self.uri, config=config, ctx=self.storage.tiledb_ctx)
        except tiledb.TileDBError as error:
            raise StoreError(f"metadata could not be written to {self.uri}: {error}.") from error

    def read_info(self) -> str | None:
        """Return the stored `CxG_embedding_info`, JSON; None when there is none."""
        with tiledbsoma.SparseNDArray.open(self.uri, context=self.storage.soma_context) as array:
            info: str | None = array.metadata.get(INFO_KEY)
        return info

    def write_info(self, info: dict[str, Any] | None) -> None:
        """Store what consumers read of a published embedding; None: remove it."""
        with self._writing("CxG_embedding_info") as array:
            if info is not None:
                array.metadata[INFO_KEY] = json.dumps(info)
            elif INFO_KEY in array.metadata:
                del array.metadata[INFO_KEY]

    def read_record(self) -> dict[str, Any]:
        """Return what `write_record` stored; empty when the array was never proved."""
        with tiledbsoma.SparseNDArray.open(self.uri, context=self.storage.soma_context) as array:
            record: dict[str, Any] = json.loads(array.metadata.get(RECORD_KEY, "{}"))
        return record

    def write_record(self, record: dict[str, object]) -> None:
        """Store how the array was made beside its identity."""
        with self._writing("the record") as array:
            array.metadata[RECORD_KEY] = json.dumps(record, sort_keys=True)


def round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round to 7 mantissa bits, half to even, what Census embeddings store; finite values only."""
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)
