"""The plan: which cells are embedded, in which shard, in which write. Immutable once written.

A plan is two Parquet files named by the plan's content hash, and a pointer to the current one:

- ``<hash>.obs_ids.parquet``: soma_joinid, **one row group per megabatch**, so that a worker reads just its own; in a
  plan that reuses cells also source_joinid, where they stand in the earlier array;
- ``<hash>.megabatches.parquet``: a row per megabatch (shard, first and last joinid, cells, tokens, checksum of its ids,
  whether reused); the plan's hash is of these rows, so whoever reads a part of the ids can still check them;
- ``current.json``: the hash, and the totals that people ask for.

Beside them, for sets with `reuse`, ``<hash>.keys.parquet`` lets a later release find these cells (`key_file`).
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
    """What one write commits: some cells of one shard, ascending by joinid.

    Attributes
    ----------
    index
        Position in the plan, from 0; also the row group that holds its ids.
    shard
        The shard it belongs to.
    first, last
        Smallest and largest soma_joinid.
    cells, tokens
        How many cells, and how many tokens they make at most.
    reused
        Whether they are copied from an earlier array, not computed.
    ids, sources
        Checksums of its joinids and, where it is reused, of where they stand in the earlier array.
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
    """What a plan amounts to, as `current.json` and the asset's metadata show it.

    Attributes
    ----------
    plan
        Its content hash.
    cells, primary_cells, tokens
        Of the whole plan.
    cells_reused, tokens_reused, source
        Of the cells that are copied, and the array that they are copied from.
    obs_ids
        Checksum of the consumers' list that was written with the plan (`store.obs_ids`).
    cells_without_counts
        Planned cells that express no gene; None where the Census does not say.
    """

    # What a later version adds may matter: this one then cannot read the plan.
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
        """Cells that go through the model."""
        return self.cells - self.cells_reused

    @property
    def tokens_to_compute(self) -> int:
        """Tokens of the cells that go through the model, at most."""
        return self.tokens - self.tokens_reused


def to_compute(batches: Iterable[Megabatch]) -> list[Megabatch]:
    """Return those of some megabatches that go through the model; the others are copied."""
    return [batch for batch in batches if not batch.reused]


@dataclass(frozen=True)
class Plan:
    """A written plan. Ids stay in the file until they are asked for."""

    totals: PlanTotals
    megabatches: tuple[Megabatch, ...]
    folder: str

    @property
    def keys(self) -> str:
        """Where the keys of its cells stand, if the set reuses cells."""
        return f"{self.folder}/{self.totals.plan}.keys.parquet"

    def shard(self, shard: int) -> tuple[Megabatch, ...]:
        """Return the megabatches of one shard; empty when the plan has fewer cells than shards.

        Raises
        ------
        UserError
            When the plan has no such shard.
        """
        if not 0 <= shard < self.totals.shards:
            raise UserError(
                f"shard {shard} is not in the plan, which has {self.totals.shards} (0 to {self.totals.shards - 1}). "
                "If the set's `shards` was changed, materialize obs_id_plan again."
            )
        return self._by_shard.get(shard, ())

    @cached_property
    def _by_shard(self) -> dict[int, tuple[Megabatch, ...]]:
        ordered = sorted(self.megabatches, key=lambda batch: batch.index)
        return {shard: tuple(batches) for shard, batches in groupby(ordered, key=lambda batch: batch.shard)}

    def read_ids(self, storage: Storage, batches: Iterable[Megabatch]) -> list[Int64Array]:
        """Read the soma_joinids, int64 ascending, of each of some megabatches."""
        return [ids for ids, _ in self._read(storage, batches, ["soma_joinid"])]

    def read_copies(self, storage: Storage, batch: Megabatch) -> tuple[Int64Array, Int64Array]:
        """Read the soma_joinids of a megabatch that is reused, and those of the same cells in the earlier array."""
        ((ids, sources),) = self._read(storage, [batch], ["soma_joinid", "source_joinid"])
        return ids, sources

    def _read(
        self, storage: Storage, batches: Iterable[Megabatch], columns: list[str]
    ) -> list[tuple[Int64Array, Int64Array]]:
        """Read the first and the last of some columns."""
        found = []
        try:
            with storage.open(f"{self.folder}/{self.totals.plan}.obs_ids.parquet") as file:
                parquet = pq.ParquetFile(file)
                for batch in batches:
                    table = parquet.read_row_group(batch.index, columns=columns)
                    if any(table[name].null_count for name in columns):
                        raise ValueError(f"megabatch {batch.index} lacks values of {' or '.join(columns)}")
                    ids, last = (table[name].to_numpy() for name in (columns[0], columns[-1]))
                    if checksum(ids) != batch.ids or (len(columns) > 1 and checksum(last) != batch.sources):
                        raise ValueError(f"megabatch {batch.index} holds other ids than were planned")
                    found.append((ids, last))
        except _DAMAGE as error:
            raise _damaged(self.folder, error) from error
        return found


_DAMAGE = (ValueError, TypeError, KeyError, IndexError, OSError, pa.ArrowException, tiledb.TileDBError)
"""What reading a file with another content may raise."""


def _damaged(folder: str, error: Exception | str) -> UserError:
    said = str(error).replace("\n", " ")[:200]
    return UserError(f"the plan at {folder} is damaged ({said}): materialize obs_id_plan again.")


def checksum(ids: Int64Array) -> str:
    """Return the XXH3 checksum, 128 bits in hexadecimal, of some ids."""
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
    """Sum a division up, and name it by the hash of its content.

    Parameters
    ----------
    megabatches
        With their checksums.
    shards, primary_cells
        As `PlanTotals` has them.
    source
        The array that the plan copies from, if it copies.
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
    """Write a plan below `folder` and make it the current one; equal plans are equal files.

    Parameters
    ----------
    joinids
        In the order of the megabatches.
    sources
        Where each cell stands in the earlier array, in the same order; None for a plan that reuses nothing.
    """
    index = pa.Table.from_pylist([asdict(batch) for batch in megabatches])
    if sources is None:
        index = index.drop_columns(list(_BATCH_OF_REUSE))
    # Written again when they are there: the same content, and whole again should one have been damaged.
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
        When there is none yet, or its files disagree.
    """
    pointer = f"{folder}/current.json"
    if not storage.exists(pointer):
        raise UserError(f"there is no plan at {folder}: materialize obs_id_plan of this release first.")
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
            # Ascending ids take about a byte each when delta-encoded.
            encoding = {name: "DELTA_BINARY_PACKED" for name in table.column_names if name in _ID_COLUMNS}
            writer = pq.ParquetWriter(
                sink, table.schema, compression="zstd", use_dictionary=False, column_encoding=encoding or None
            )
        writer.write_table(table, row_group_size=len(table))
    if writer is not None:
        writer.close()
    return sink.getvalue()
