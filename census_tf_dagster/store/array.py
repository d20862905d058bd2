"""Creates, writes and reads the embeddings array: a TileDB-SOMA `SparseNDArray`, float32, cells x features.

`soma_dim_0` is the Census obs joinid. Every embedded cell stores all its values. One write is one fragment, and it is
atomic. No other file tracks progress: the fragments show which cells are committed.

TileDB orders writes by their timestamps, and hides writes that are later than the reader's clock. Workers' clocks may
be wrong, so this module uses no clock: the array is created at timestamp 1, and each opening for writing takes the next
number.

Checking values belongs in `readback` and `verification`.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledb
import tiledbsoma

from census_tf_dagster.config.publication import INFO_KEY
from census_tf_dagster.errors import StoreError, UserError
from census_tf_dagster.identity import ArrayIdentity
from census_tf_dagster.io.storage import Storage, is_lack_of_memory
from census_tf_dagster.store.fragments import (
    FRAGMENT_FILES,
    Fragment,
    last_timestamp,
    name_of,
)

IDENTITY_KEY = "census_tf_identity"
"""Array metadata key of the identity's JSON."""
RECORD_KEY = "census_tf_record"
"""Array metadata key of the record's JSON, which is written when the array is verified."""

# With double-delta, sorted coordinates take almost no space. Level 1 of zstd takes a seventh of the time of the
# consumers' levels 9 and 19, for a few percent more space (docs/performance.md).
_ZSTD: Any = {"_type": "ZstdFilter", "level": 1}
# With a checksum, every reader of a damaged chunk gets an error instead of other values. Processors compute SHA-256 in
# hardware (Intel since Ice Lake, AMD since Zen); TileDB's other checksum, MD5, takes twice the time.
_SHA256: Any = {"_type": "ChecksumSHA256Filter"}
_TILE_ROWS = 2048
_MOVE = "move it away."

_CREATED_AT = 1
"""TileDB timestamp of a new array. Later openings for writing get larger timestamps."""
_IDENTITY_AT = 2
"""TileDB timestamp of the identity, which is the first write after the creation."""


def _creation_options(n_features: int) -> tiledbsoma.TileDBCreateOptions:
    # With one tile over all features, values sorted by joinid and feature are in global order.
    coordinates: Any = ["DoubleDeltaFilter", _ZSTD, _SHA256]
    return tiledbsoma.TileDBCreateOptions(
        capacity=2**17,
        allows_duplicates=False,
        tile_order="row-major",
        cell_order="row-major",
        dims={
            "soma_dim_0": {"tile": _TILE_ROWS, "filters": coordinates},
            "soma_dim_1": {"tile": n_features, "filters": coordinates},
        },
        attrs={"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD, _SHA256]}},
    )


class DamagedFragmentsError(UserError):
    """Committed fragments are damaged, so TileDB cannot open the array.

    Attributes
    ----------
    array
        The array with these fragments.
    reasons
        The fault of each, by its name.
    """

    def __init__(self, array: "EmbeddingsArray", reasons: Mapping[str, str]) -> None:
        first, reason = next(iter(reasons.items()))
        super().__init__(
            f"{len(reasons)} fragments of the array at {array.uri} are damaged, e.g. {first}: {reason}. Expected "
            "complete fragments: run the shard that wrote them again. It removes them, and computes their cells again."
        )
        self.array = array
        self.reasons = dict(reasons)


class OtherArrayError(UserError):
    """There is an array, but it has another type or another number of dimensions."""


class DamagedArrayError(UserError):
    """Files of the array itself are damaged, so TileDB cannot open it.

    Attributes
    ----------
    array
        The array with these files.
    part
        Its folder that holds them.
    """

    def __init__(self, array: "EmbeddingsArray", part: Literal["__schema", "__meta", "__fragment_meta"], reason: str):
        again = "" if part == "__schema" else "run any of its shards again. If that reports the same, "
        super().__init__(
            f"the array at {array.uri} cannot be opened: files in {part} are damaged ({reason}). Expected all of them "
            f"whole: {again}restore them from a copy of the store, or remove the release with `remove` and launch it "
            "again."
        )
        self.array = array
        self.part = part


@dataclass(frozen=True)
class EmbeddingsArray:
    """An array that has the expected identity. `create` or `open` makes it."""

    uri: str
    storage: Storage
    shape: tuple[int, int]
    n_features: int
    """Number of values of an embedding, as in the identity: the second dimension."""

    @property
    def rows(self) -> int:
        """The first dimension. All joinids are smaller."""
        return self.shape[0]

    @classmethod
    def create(cls, uri: str, storage: Storage, identity: ArrayIdentity, rows: int) -> "EmbeddingsArray":
        """Create the array, or open it if it exists.

        A folder without files counts as absent, because an interrupted creation leaves one.

        Parameters
        ----------
        uri, storage
            Address of the array, and the storage that writes it.
        identity
            Identity of the array. An existing array of another identity is refused.
        rows
            The Census's largest obs joinid + 1, which consumers expect as the first dimension.

        Raises
        ------
        UserError
            When something else exists at `uri`.
        """
        # This check comes first, because TileDB would create an array inside an existing group.
        if not storage.holds_files(uri):
            try:
                # TileDB creates no array in a folder that has TileDB's own folders.
                storage.remove_empty_folders(uri)
                tiledbsoma.SparseNDArray.create(
                    uri,
                    type=pa.float32(),
                    shape=(rows, identity.embedding_dim),
                    platform_config=_creation_options(identity.embedding_dim),
                    context=storage.soma_context,
                    tiledb_timestamp=_CREATED_AT,
                ).close()
            except tiledbsoma.AlreadyExistsError:
                pass
            except (tiledbsoma.SOMAError, OSError, RuntimeError) as error:
                raise UserError(
                    f"the store cannot be written at {uri} ({error}). Expected a writable store: correct its address "
                    "or its permissions."
                ) from error
        found, stored = cls.look(uri, storage)
        if found.rows != rows:
            raise UserError(
                f"the array at {uri} has {found.rows} rows; expected {rows}, the Census's largest joinid + 1. Use "
                "another set name or store."
            )
        # The process that created the array may have ended before it wrote the identity.
        if stored is None and found.n_features == identity.embedding_dim and not found.fragments():
            with found._writing("the identity") as array:
                array.metadata[IDENTITY_KEY] = identity.to_json()
        return cls.open(uri, storage, identity)

    @classmethod
    def open(cls, uri: str, storage: Storage, identity: ArrayIdentity) -> "EmbeddingsArray":
        """Open an existing array after comparing identities.

        Raises
        ------
        UserError
            When there is no array of this project, or it has another identity.
        """
        found, stored = cls.look(uri, storage)
        if stored is None:
            raise UserError(
                f"the array at {uri} has no {IDENTITY_KEY}, so this project did not make it. Expected an array of this "
                "project: move the other one away, or use another set name or store."
            )
        identity.require_equal(stored, f"the array at {uri}")
        return replace(found, n_features=identity.embedding_dim)

    @classmethod
    def repair(cls, uri: str, storage: Storage, identity: ArrayIdentity) -> "EmbeddingsArray":
        """Open like `open`, but first remove what prevents opening and can be written anew, and unseen fragments."""
        removed: set[str] = set()
        while True:
            try:
                array = cls.open(uri, storage, identity)
                array.fragments()
                array.remove_fragments(array.damaged())
            except DamagedFragmentsError as error:
                error.array.remove_fragments(error.reasons)
            except DamagedArrayError as error:
                if not (files := error.array._renewable(error.part)):
                    raise
                for file in files:
                    storage.remove_file(file)
                removed.add(error.part)
            else:
                if "__fragment_meta" in removed:
                    array.gather_metadata()
                return array

    @classmethod
    def look(cls, uri: str, storage: Storage) -> tuple["EmbeddingsArray", str | None]:
        """Open an array of any identity for reading; return it with its identity's JSON, or None if it has none."""
        try:
            with tiledbsoma.SparseNDArray.open(uri, context=storage.soma_context) as array:
                rows, n_features = map(int, array.shape)
                return cls(uri, storage, (rows, n_features), n_features), array.metadata.get(IDENTITY_KEY)
        except tiledbsoma.DoesNotExistError as error:
            if storage.holds_files(f"{uri}/__fragments"):
                raise DamagedArrayError(cls(uri, storage, (0, 0), 0), "__schema", "they are missing") from error
            if storage.holds_files(uri):
                raise UserError(f"{uri} holds other files; expected a SparseNDArray: {_MOVE}") from error
            raise UserError(
                f"there is no array at {uri}; expected one: materialize obs_id_plan of this release first."
            ) from error
        except (TypeError, ValueError) as error:
            raise OtherArrayError(f"{uri} holds something else ({error}); expected a SparseNDArray: {_MOVE}") from error
        except (tiledbsoma.SOMAError, tiledb.TileDBError, RuntimeError) as error:
            if "is not a SOMA" in str(error):
                raise OtherArrayError(f"{uri} holds something else; expected a SparseNDArray: {_MOVE}") from error
            raise cls(uri, storage, (0, 0), 0)._damage_error(error) from error

    @contextmanager
    def writing(self) -> Iterator[Callable[[npt.NDArray[np.int64], npt.NDArray[np.float32]], None]]:
        """Open the array once for many writes, because opening costs three requests per fragment on S3.

        Yields
        ------
        Callable
            Commits cells at once, as one fragment: joinids, strictly ascending, int64 ``(n,)``, and their embeddings,
            float32 ``(n, n_features)``, finite. All fragments of one opening have its timestamp, and a later opening
            overrides an earlier one, so write no cell twice. It raises `StoreError` if the store stays unreachable or
            is full; then none of these cells are committed.
        """
        with ExitStack() as stack:
            opened: list[tiledbsoma.SparseNDArray] = []

            def write(joinids: npt.NDArray[np.int64], embeddings: npt.NDArray[np.float32]) -> None:
                table = self._table(joinids, embeddings)
                with self._committing(f"{len(joinids)} cells"):
                    if not opened:
                        opened.append(stack.enter_context(self._open_to_write()))
                    # The table is in global order already, so TileDB need not sort it.
                    opened[0].write(table, platform_config=tiledbsoma.TileDBWriteOptions(sort_coords=False))

            yield write

    def write(self, joinids: npt.NDArray[np.int64], embeddings: npt.NDArray[np.float32]) -> None:
        """Commit cells as one fragment; see `writing`."""
        with self.writing() as write:
            write(joinids, embeddings)

    def _table(self, joinids: npt.NDArray[np.int64], embeddings: npt.NDArray[np.float32]) -> pa.Table:
        n = len(joinids)
        if embeddings.shape != (n, self.n_features):
            raise ValueError(f"embeddings are {embeddings.shape}; expected ({n}, {self.n_features})")
        # TileDB does not check this again (`storage.UNCHECKED_WRITES`).
        if not n or joinids[0] < 0 or joinids[-1] >= self.rows or (np.diff(joinids) <= 0).any():
            raise ValueError(f"joinids must be strictly ascending in 0 to {self.rows - 1}")
        return pa.table(
            {
                "soma_dim_0": np.repeat(joinids, self.n_features),
                "soma_dim_1": np.tile(np.arange(self.n_features, dtype=np.int64), n),
                "soma_data": embeddings.reshape(-1),
            }
        )

    def _open_to_write(self) -> tiledbsoma.SparseNDArray:
        return tiledbsoma.SparseNDArray.open(
            self.uri, "w", context=self.storage.soma_context, tiledb_timestamp=self._next_timestamp()
        )

    def _next_timestamp(self) -> int:
        """Return a timestamp that is later than everything written so far.

        Two workers that open at once may get the same timestamp. Then the names of the fragments decide, so readers
        always get the values of the same worker.
        """
        entries = [entry for folder in ("__fragments", "__meta") for entry in self.storage.list(f"{self.uri}/{folder}")]
        return 1 + max([_CREATED_AT, *(last_timestamp(name_of(entry)) for entry in entries)])

    @contextmanager
    def _writing(self, what: str) -> Iterator[tiledbsoma.SparseNDArray]:
        with self._committing(what), self._open_to_write() as array:
            yield array

    @contextmanager
    def _committing(self, what: str) -> Iterator[None]:
        try:
            yield
        except (tiledbsoma.SOMAError, tiledb.TileDBError, RuntimeError) as error:
            raise StoreError(
                f"{what} could not be written to {self.uri} ({error}). Expected a writable store: run this again when "
                "it can be written. Committed megabatches stay."
            ) from error

    def fragments(self) -> list[Fragment]:
        """List the committed fragments, ordered by first joinid. Reads only metadata.

        Raises
        ------
        DamagedFragmentsError
            When a fragment's metadata cannot be read.
        """
        try:
            infos = tiledb.FragmentInfoList(self.uri, ctx=self.storage.tiledb_ctx)
        except tiledb.TileDBError as error:
            raise self._damage_error(error) from error
        found = [
            Fragment(
                name=name_of(info.uri),
                first=int(info.nonempty_domain[0][0]),
                last=int(info.nonempty_domain[0][1]),
                values=int(info.cell_num),
            )
            for info in infos
        ]
        return sorted(found, key=lambda fragment: (fragment.first, fragment.name))

    def fragment_files(self) -> dict[str, dict[str, int]]:
        """Return the size in bytes of each file of each committed fragment, even of a damaged one."""
        found: dict[str, dict[str, int]] = {name: {} for name in self._committed()}
        for path, size in self.storage.file_sizes(f"{self.uri}/__fragments").items():
            name, _, file = path.partition("/")
            if name in found:
                found[name][file] = size
        return found

    def damaged(self) -> dict[str, str]:
        """Return the faults of committed fragments that lack files or that no reader sees yet, by fragment name."""
        now = int(time.time() * 1000)
        found = {}
        for name, files in self.fragment_files().items():
            if missing := sorted(FRAGMENT_FILES - files.keys()):
                found[name] = f"its files {', '.join(missing)} are missing"
            elif (written := last_timestamp(name)) > now:
                hours = (written - now) / 3_600_000
                found[name] = f"its writer's clock was ahead: readers see it in {hours:.2f} hours"
        return found

    def remove_fragments(self, names: Iterable[str]) -> None:
        """Remove fragments from the array. Each commit is removed first, so a reader sees all of a fragment or nothing.

        Raises
        ------
        UserError
            When somebody consolidated the commits, so that a fragment's commit is in one file with others.
        """
        for name in names:
            commit = f"{self.uri}/__commits/{name}.wrt"
            if self.storage.exists(commit):
                self.storage.remove_file(commit)
            elif name in self._committed():
                raise UserError(
                    f"fragment {name} of {self.uri} cannot be removed: its commit is in one file with others. Expected "
                    "a file for each commit: remove the release with `remove`, and launch it again."
                )
            folder = f"{self.uri}/__fragments/{name}"
            if self.storage.is_folder(folder):
                self.storage.remove_folder(folder)

    def _committed(self) -> list[str]:
        commits = [name_of(entry) for entry in self.storage.list(f"{self.uri}/__commits")]
        if any(name.endswith(".con") for name in commits):
            return [name_of(entry) for entry in self.storage.list(f"{self.uri}/__fragments")]
        return [name.removesuffix(".wrt") for name in commits if name.endswith(".wrt")]

    def _damage_error(self, error: Exception) -> Exception:
        """Return the error to raise when TileDB could not open the array."""
        if damaged := self.damaged():
            return DamagedFragmentsError(self, damaged)
        reason = str(error).rpartition("Error: ")[2].replace("\n", " ")[:200]
        # A file that S3 refuses now may be readable at the next try, and so may all files with more memory.
        if "S3" in str(error) or is_lack_of_memory(error):
            return error
        if named := re.search(r"__fragments/(__[0-9a-f_]+)/", str(error)):
            return DamagedFragmentsError(self, {named[1]: reason})
        try:
            tiledb.ArraySchema.load(self.uri, ctx=self.storage.tiledb_ctx)
        except tiledb.TileDBError:
            return DamagedArrayError(self, "__schema", reason)
        try:
            tiledb.FragmentInfoList(self.uri, ctx=self.storage.tiledb_ctx)
        except tiledb.TileDBError:
            return DamagedArrayError(self, "__fragment_meta", reason)
        return DamagedArrayError(self, "__meta", reason)

    def _renewable(self, part: str) -> list[str]:
        """Return the files of a damaged part that can be written anew."""
        files = self.storage.list(f"{self.uri}/{part}")
        if part == "__fragment_meta":
            # They are copies.
            return files
        # Finishing the array writes all metadata anew, except its type and its identity.
        return [] if part == "__schema" else [file for file in files if not self._is_readable_metadata(name_of(file))]

    def _is_readable_metadata(self, name: str) -> bool:
        written = last_timestamp(name)
        try:
            with tiledb.open(self.uri, timestamp=(written, written), ctx=self.storage.tiledb_ctx) as array:
                len(array.meta)
        except tiledb.TileDBError:
            return written <= _IDENTITY_AT
        return True

    def joinids_between(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return the cells that are present in a range of joinids (inclusive) by their first feature; ascending."""
        with tiledbsoma.SparseNDArray.open(self.uri, context=self.storage.soma_context) as array:
            tables = array.read(coords=(slice(first, last), slice(0, 0))).tables()
            return np.sort(tables.concat()["soma_dim_0"].to_numpy())

    @contextmanager
    def reading(self) -> Iterator[Callable[[slice | pa.Array], Iterator[pa.Table]]]:
        """Open the array once for many reads, because the cost of opening grows with the fragments.

        Yields
        ------
        Callable
            Returns all stored values of a range of joinids (both ends inclusive) or of a list, as tables of soma_dim_0,
            soma_dim_1 and soma_data.
        """
        with tiledbsoma.SparseNDArray.open(self.uri, context=self.storage.soma_context) as array:
            yield lambda joinids: array.read(coords=(joinids, slice(None))).tables()

    def gather_metadata(self) -> None:
        """Consolidate the metadata of all fragments into one file.

        Then a reader on S3 opens the array with about 15 requests and one for each such file, instead of three per
        fragment (docs/scale.md). Nothing is removed, so no reader is disturbed, and it may be repeated.
        """
        config = tiledb.Config({"sm.consolidation.mode": "fragment_meta"})
        try:
            tiledb.consolidate(self.uri, config=config, ctx=self.storage.tiledb_ctx)
        except tiledb.TileDBError as error:
            raise StoreError(
                f"metadata could not be written to {self.uri} ({error}). Expected a writable store: run this again "
                "when it can be written."
            ) from error

    def read_info(self) -> str | None:
        """Return the stored `CxG_embedding_info` as JSON; None if there is none."""
        with tiledbsoma.SparseNDArray.open(self.uri, context=self.storage.soma_context) as array:
            info: str | None = array.metadata.get(INFO_KEY)
        return info

    def write_info(self, info: dict[str, Any] | None) -> None:
        """Store the metadata that consumers read from a published embedding; None removes it."""
        with self._writing("CxG_embedding_info") as array:
            if info is not None:
                array.metadata[INFO_KEY] = json.dumps(info)
            elif INFO_KEY in array.metadata:
                del array.metadata[INFO_KEY]

    def read_record(self) -> dict[str, Any]:
        """Return the record that `write_record` stored; empty if the array was never verified."""
        with tiledbsoma.SparseNDArray.open(self.uri, context=self.storage.soma_context) as array:
            record: dict[str, Any] = json.loads(array.metadata.get(RECORD_KEY, "{}"))
        return record

    def write_record(self, record: dict[str, object]) -> None:
        """Store the record of how the array was made and verified."""
        with self._writing("the record") as array:
            array.metadata[RECORD_KEY] = json.dumps(record, sort_keys=True)


def round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round finite values to 7 mantissa bits, half to even, as Census embeddings store them."""
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)
