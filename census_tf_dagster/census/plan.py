"""The plan: which cells are embedded, in which shard, in which write. Immutable once written.

A plan is two Parquet files named by the plan's content hash, and a pointer to the current one:

- ``<hash>.obs_ids.parquet``: soma_joinid, **one row group per megabatch**, so that a worker reads just its own;
- ``<hash>.megabatches.parquet``: a row per megabatch (shard, first and last joinid, cells, tokens);
- ``current.json``: the hash, and the totals that people ask for.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tiledb

from census_tf_dagster.errors import UserError
from census_tf_dagster.storage import Storage

Int64Array = npt.NDArray[np.int64]


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
    """

    index: int
    shard: int
    first: int
    last: int
    cells: int
    tokens: int


@dataclass(frozen=True)
class PlanTotals:
    """What a plan amounts to, as `current.json` and the asset's metadata show it."""

    plan: str
    shards: int
    megabatches: int
    cells: int
    primary_cells: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """A written plan. Ids stay in the file until they are asked for."""

    totals: PlanTotals
    megabatches: tuple[Megabatch, ...]
    folder: str

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
        found = []
        try:
            with storage.open(f"{self.folder}/{self.totals.plan}.obs_ids.parquet") as file:
                parquet = pq.ParquetFile(file)
                for batch in batches:
                    ids = parquet.read_row_group(batch.index)["soma_joinid"].to_numpy()
                    if (len(ids), ids[0], ids[-1]) != (batch.cells, batch.first, batch.last) or (
                        np.diff(ids) <= 0
                    ).any():
                        raise ValueError(f"megabatch {batch.index} holds other ids than the index says")
                    found.append(ids)
        except (ValueError, pa.ArrowInvalid, tiledb.TileDBError) as error:
            raise UserError(
                f"the plan at {self.folder} is damaged ({error}): materialize obs_id_plan again."
            ) from error
        return found


def divide(
    joinids: Int64Array, tokens: npt.NDArray[np.int32], shards: int, megabatch_size: int
) -> tuple[Megabatch, ...]:
    """Cut ascending joinids into shards of about equal tokens, and those into megabatches.

    Parameters
    ----------
    joinids
        Ascending soma_joinids, ``(n,)``.
    tokens
        Tokens of each of those cells, ``(n,)``.
    shards
        Number of shards; some stay empty when there are fewer cells.
    megabatch_size
        Cells in a megabatch; the last of a shard may be smaller.
    """
    running = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
    targets = running[-1] * np.arange(1, shards, dtype=np.float64) / shards
    edges = [0, *np.searchsorted(running[1:], targets, side="left").tolist(), len(joinids)]
    batches: list[Megabatch] = []
    for shard in range(shards):
        for start in range(edges[shard], edges[shard + 1], megabatch_size):
            stop = min(start + megabatch_size, edges[shard + 1])
            batches.append(
                Megabatch(
                    index=len(batches),
                    shard=shard,
                    first=int(joinids[start]),
                    last=int(joinids[stop - 1]),
                    cells=stop - start,
                    tokens=int(running[stop] - running[start]),
                )
            )
    return tuple(batches)


def plan_totals(joinids: Int64Array, megabatches: tuple[Megabatch, ...], shards: int, primary_cells: int) -> PlanTotals:
    """Sum a division up, and name it by the hash of its content."""
    digest = hashlib.sha256(joinids.astype("<i8").tobytes())
    digest.update(json.dumps([shards, [(batch.shard, batch.cells) for batch in megabatches]]).encode())
    return PlanTotals(
        plan=digest.hexdigest()[:16],
        shards=shards,
        megabatches=len(megabatches),
        cells=len(joinids),
        primary_cells=primary_cells,
        tokens=sum(batch.tokens for batch in megabatches),
    )


def write_plan(
    storage: Storage, folder: str, joinids: Int64Array, megabatches: tuple[Megabatch, ...], totals: PlanTotals
) -> Plan:
    """Write a plan below `folder` and make it the current one; equal plans are equal files."""
    index = pa.Table.from_pylist([asdict(batch) for batch in megabatches])
    # Written again when they are there: the same content, and whole again should one have been damaged.
    storage.write(f"{folder}/{totals.plan}.megabatches.parquet", _parquet_bytes(index, [len(index)]))
    ids = pa.table({"soma_joinid": joinids})
    storage.write(f"{folder}/{totals.plan}.obs_ids.parquet", _parquet_bytes(ids, [b.cells for b in megabatches]))
    storage.write(f"{folder}/current.json", json.dumps(asdict(totals), indent=1).encode())
    return Plan(totals, megabatches, folder)


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
        totals = PlanTotals(**json.loads(storage.read(pointer)))
        rows = pq.read_table(io.BytesIO(storage.read(f"{folder}/{totals.plan}.megabatches.parquet"))).to_pylist()
        plan = Plan(totals, tuple(Megabatch(**row) for row in rows), folder)
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        raise UserError(f"the plan at {folder} is damaged ({error}): materialize obs_id_plan again.") from error
    if sum(batch.cells for batch in plan.megabatches) != totals.cells:
        raise UserError(f"the plan at {folder} is damaged (its files disagree): materialize obs_id_plan again.")
    return plan


def write_obs_ids(storage: Storage, uri: str, joinids: Int64Array) -> None:
    """Write the consumers' list of planned ids: one Parquet column, soma_joinid, ascending."""
    storage.write(uri, _parquet_bytes(pa.table({"soma_joinid": joinids}), [len(joinids)]))


def _parquet_bytes(table: pa.Table, row_groups: list[int]) -> bytes:
    sink = io.BytesIO()
    # Ascending ids take about a byte each when delta-encoded.
    encoding = {"soma_joinid": "DELTA_BINARY_PACKED"} if "soma_joinid" in table.column_names else None
    with pq.ParquetWriter(
        sink, table.schema, compression="zstd", use_dictionary=False, column_encoding=encoding
    ) as writer:
        start = 0
        for rows in row_groups:
            writer.write_table(table.slice(start, rows), row_group_size=rows)
            start += rows
    return sink.getvalue()
