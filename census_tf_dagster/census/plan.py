"""Writes and reads plans: which cells are embedded, in which shard, in which write. A written plan never changes.

A plan is two Parquet files named by the plan's content hash, and a pointer to the current plan:

- ``<hash>.obs_ids.parquet``: soma_joinid, **one row group per megabatch**, so that a worker reads only its own. A plan
  that reuses cells also has source_joinid: the cell's joinid in the earlier array.
- ``<hash>.megabatches.parquet``: a row per megabatch (shard, first and last joinid, cells, tokens, checksum of its ids,
  whether it is reused). The plan's hash covers these rows, so a reader of some ids can still check them.
- ``current.json``: the hash, and the totals that people ask for.

For sets with `reuse`, a fourth file, ``<hash>.keys.parquet``, lets a later release find these cells (`key_file`).
``identity.json`` states for which identity the release is planned (`pipeline.planned_identity`).

Choosing the cells belongs in `pipeline.list_cells`, dividing them in `division`.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tiledb
import xxhash
from pydantic import ConfigDict, TypeAdapter

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.storage import Storage

Int64Array = npt.NDArray[np.int64]

_ID_COLUMNS = ("soma_joinid", "source_joinid")
_OF_REUSE = ("cells_reused", "tokens_reused", "source")
_BATCH_OF_REUSE = ("reused", "sources")


@dataclass(frozen=True)
class Megabatch:
    """The cells that one write commits: cells of one shard, ascending by joinid.

    Attributes
    ----------
    index
        Position in the plan, from 0; also the row group that holds its ids.
    shard
        The shard it belongs to.
    first, last
        Smallest and largest soma_joinid.
    cells, tokens
        Number of cells, and the largest number of tokens that they can make.
    reused
        Whether the cells are copied from an earlier array instead of computed.
    ids, sources
        Checksum of the joinids and, if the megabatch is reused, of the same cells' joinids in the earlier array.
    """

    index: int
    shard: int
    first: int
    last: int
    cells: int
    tokens: int
    reused: bool = False
    ids: str = ""
    sources: str = ""


@dataclass(frozen=True)
class Source:
    """The earlier array that a plan copies cells from.

    Attributes
    ----------
    release, root
        Its release, and its folder in the store.
    identity
        Digest of its identity.
    """

    release: str
    root: str
    identity: str


@dataclass(frozen=True)
class PlanTotals:
    """Totals of a plan, as `current.json` and the asset's metadata show them.

    Attributes
    ----------
    plan
        The plan's content hash.
    cells, primary_cells, tokens
        Totals of the whole plan.
    cells_reused, tokens_reused, source
        Totals of the cells that are copied, and the array that they are copied from.
    obs_ids
        Checksum of the consumers' list that was written with the plan (`store.obs_ids`).
    cells_without_counts
        Planned cells that express no gene; None if the Census does not state it.
    """

    # A field that a later version adds may matter, so this version refuses such a plan.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    plan: str
    shards: int
    megabatches: int
    cells: int
    primary_cells: int
    tokens: int
    cells_reused: int = 0
    tokens_reused: int = 0
    source: Source | None = None
    obs_ids: str = ""
    cells_without_counts: int | None = None

    @property
    def cells_to_compute(self) -> int:
        """Number of cells that go through the model."""
        return self.cells - self.cells_reused

    @property
    def tokens_to_compute(self) -> int:
        """Largest number of tokens that go through the model."""
        return self.tokens - self.tokens_reused


def to_compute(batches: Iterable[Megabatch]) -> list[Megabatch]:
    """Return the megabatches that go through the model; the others are copied."""
    return [batch for batch in batches if not batch.reused]


@dataclass(frozen=True)
class Plan:
    """A written plan. It reads ids from the file only when a caller asks for them."""

    totals: PlanTotals
    megabatches: tuple[Megabatch, ...]
    folder: str

    @property
    def keys(self) -> str:
        """Path of the file with the cells' keys, which exists if the set reuses cells."""
        return f"{self.folder}/{self.totals.plan}.keys.parquet"

    def shard(self, shard: int) -> tuple[Megabatch, ...]:
        """Return the megabatches of one shard, which may be none if the plan has fewer cells than shards.

        Raises
        ------
        UserError
            When the plan has no such shard.
        """
        if not 0 <= shard < self.totals.shards:
            raise UserError(
                f"shard {shard} is not in the plan; expected a shard from 0 to {self.totals.shards - 1}. "
                "If you changed the set's `shards`, materialize obs_id_plan again."
            )
        return self._by_shard.get(shard, ())

    @cached_property
    def _by_shard(self) -> dict[int, tuple[Megabatch, ...]]:
        ordered = sorted(self.megabatches, key=lambda batch: batch.index)
        return {shard: tuple(batches) for shard, batches in groupby(ordered, key=lambda batch: batch.shard)}

    def read_ids(self, storage: Storage, batches: Iterable[Megabatch]) -> list[Int64Array]:
        """Read the soma_joinids of each given megabatch, int64 ascending."""
        return [ids for ids, _ in self._read(storage, batches, ["soma_joinid"])]

    def read_copies(self, storage: Storage, batch: Megabatch) -> tuple[Int64Array, Int64Array]:
        """Read the soma_joinids of a reused megabatch, and the joinids of the same cells in the earlier array."""
        ((ids, sources),) = self._read(storage, [batch], ["soma_joinid", "source_joinid"])
        return ids, sources

    def _read(
        self, storage: Storage, batches: Iterable[Megabatch], columns: list[str]
    ) -> list[tuple[Int64Array, Int64Array]]:
        """Read and check the first and the last of these columns, for each megabatch."""
        found = []
        uri = f"{self.folder}/{self.totals.plan}.obs_ids.parquet"
        try:
            with storage.open(uri) as file:
                parquet = pq.ParquetFile(file)
                for batch in batches:
                    table = parquet.read_row_group(batch.index, columns=columns)
                    if any(table[name].null_count for name in columns):
                        raise ValueError(f"megabatch {batch.index} lacks values of {' or '.join(columns)}")
                    ids, last = (table[name].to_numpy() for name in (columns[0], columns[-1]))
                    if checksum(ids) != batch.ids or (len(columns) > 1 and checksum(last) != batch.sources):
                        raise ValueError(f"megabatch {batch.index} holds other ids than the plan")
                    found.append((ids, last))
        except _DAMAGE as error:
            # TileDB gives no reason. If S3 refuses access or does not answer, this raises the error that says so.
            storage.exists(uri)
            raise _damaged(self.folder, error) from error
        return found


_DAMAGE = (ValueError, TypeError, KeyError, IndexError, OSError, pa.ArrowException, tiledb.TileDBError)
"""Errors that a file with unexpected content may cause."""


def _damaged(folder: str, error: Exception | str) -> UserError:
    said = str(error).replace("\n", " ")[:200]
    return UserError(
        f"the plan at {folder} is damaged ({said}). Expected the files that obs_id_plan wrote: materialize obs_id_plan "
        "again."
    )


def checksum(ids: Int64Array) -> str:
    """Return the XXH3 checksum of ids, 128 bits in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(ids, "<i8").data)


def with_checksums(
    megabatches: Iterable[Megabatch], joinids: Int64Array, sources: Int64Array | None = None
) -> tuple[Megabatch, ...]:
    """Return megabatches with the checksums of their ids.

    Parameters
    ----------
    joinids, sources
        In the order of the megabatches; `sources` is None in a plan that reuses nothing.
    """
    found, start = [], 0
    for batch in megabatches:
        part = slice(start, start + batch.cells)
        copied = checksum(sources[part]) if batch.reused and sources is not None else ""
        found.append(replace(batch, ids=checksum(joinids[part]), sources=copied))
        start += batch.cells
    return tuple(found)


def plan_totals(
    megabatches: Sequence[Megabatch], shards: int, primary_cells: int, source: Source | None = None
) -> PlanTotals:
    """Sum up a division, and name the plan by the hash of its content.

    Parameters
    ----------
    megabatches
        Megabatches with their checksums.
    shards, primary_cells
        The fields of `PlanTotals`.
    source
        The array that the plan copies from; None if it copies nothing.
    """
    copied = [batch for batch in megabatches if batch.reused]
    source = source if copied else None
    content = [shards, primary_cells, source and asdict(source), [asdict(batch) for batch in megabatches]]
    return PlanTotals(
        plan=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16],
        shards=shards,
        megabatches=len(megabatches),
        cells=sum(batch.cells for batch in megabatches),
        primary_cells=primary_cells,
        tokens=sum(batch.tokens for batch in megabatches),
        cells_reused=sum(batch.cells for batch in copied),
        tokens_reused=sum(batch.tokens for batch in copied),
        source=source,
    )


def write_plan(
    storage: Storage,
    folder: str,
    joinids: Int64Array,
    megabatches: tuple[Megabatch, ...],
    totals: PlanTotals,
    sources: Int64Array | None = None,
) -> Plan:
    """Write a plan below `folder` and make it the current one. Equal plans give equal files.

    Parameters
    ----------
    joinids
        In the order of the megabatches.
    sources
        The joinid of each cell in the earlier array, in the same order; None for a plan that reuses nothing.
    """
    index = pa.Table.from_pylist([asdict(batch) for batch in megabatches])
    if sources is None:
        index = index.drop_columns(list(_BATCH_OF_REUSE))
    # Existing files are written again: the content is the same, and this repairs a damaged file.
    storage.write(f"{folder}/{totals.plan}.megabatches.parquet", parquet_bytes([index]))
    ids = parquet_bytes(_id_tables(joinids, megabatches, sources))
    storage.write(f"{folder}/{totals.plan}.obs_ids.parquet", ids)
    content = {key: value for key, value in asdict(totals).items() if sources is not None or key not in _OF_REUSE}
    storage.write(f"{folder}/current.json", json.dumps(content, indent=1).encode())
    return Plan(totals, megabatches, folder)


def _id_tables(
    joinids: Int64Array, megabatches: tuple[Megabatch, ...], sources: Int64Array | None
) -> Iterator[pa.Table]:
    start = 0
    for batch in megabatches:
        part = slice(start, start + batch.cells)
        columns = {"soma_joinid": pa.array(joinids[part])}
        if sources is not None:
            columns["source_joinid"] = pa.array(sources[part]) if batch.reused else pa.nulls(batch.cells, pa.int64())
        yield pa.table(columns)
        start += batch.cells


def read_plan(storage: Storage, folder: str) -> Plan:
    """Load the current plan.

    Raises
    ------
    UserError
        When there is no plan yet, or its files disagree.
    """
    pointer = f"{folder}/current.json"
    if not storage.exists(pointer):
        raise UserError(f"there is no plan at {folder}; expected one: materialize obs_id_plan of this release first.")
    try:
        totals = _TOTALS.validate_json(storage.read(pointer))
        rows = pq.read_table(io.BytesIO(storage.read(f"{folder}/{totals.plan}.megabatches.parquet"))).to_pylist()
        megabatches = _MEGABATCHES.validate_python(rows)
    except _DAMAGE as error:
        raise _damaged(folder, error) from error
    found = plan_totals(megabatches, totals.shards, totals.primary_cells, totals.source)
    if totals != replace(found, obs_ids=totals.obs_ids, cells_without_counts=totals.cells_without_counts):
        raise _damaged(folder, "its files disagree")
    return Plan(totals, megabatches, folder)


_TOTALS = TypeAdapter(PlanTotals)
_MEGABATCHES = TypeAdapter(tuple[Megabatch, ...])


def parquet_bytes(row_groups: Iterable[pa.Table]) -> bytes:
    """Return a Parquet file with one row group for each table."""
    sink = io.BytesIO()
    writer = None
    for table in row_groups:
        if writer is None:
            # With delta encoding, an ascending id takes about one byte.
            encoding = {name: "DELTA_BINARY_PACKED" for name in table.column_names if name in _ID_COLUMNS}
            writer = pq.ParquetWriter(
                sink, table.schema, compression="zstd", use_dictionary=False, column_encoding=encoding or None
            )
        writer.write_table(table, row_group_size=len(table))
    if writer is not None:
        writer.close()
    return sink.getvalue()
