"""Writes the consumers' list of planned cells, with facts to know before using a cell's embedding.

The list is one Parquet file beside the array, with a row per planned cell: ``soma_joinid`` ascending, ``zero_counts``
(the cell has no counts, so its embedding says nothing) and ``set_aside`` (why the cell has no embedding; null if it has
one). The plan that shards read belongs in `census.plan`.
"""

import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from census_tf_dagster.census.plan import Plan, parquet_bytes
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.layout import ReleaseFolder

SCHEMA = pa.schema([("soma_joinid", pa.int64()), ("zero_counts", pa.bool_()), ("set_aside", pa.string())])


def write_planned(
    storage: Storage, folder: ReleaseFolder, joinids: npt.NDArray[np.int64], zero_counts: npt.NDArray[np.bool_] | None
) -> str:
    """Write the list of a plan; return its checksum.

    Parameters
    ----------
    joinids
        Ascending soma_joinids, int64 ``(n,)``.
    zero_counts
        Which of these cells express no gene, bool ``(n,)``; None, written as null, if the Census does not state it.
    """
    n = len(joinids)
    zeros = pa.nulls(n, pa.bool_()) if zero_counts is None else pa.array(zero_counts)
    table = pa.table([pa.array(joinids), zeros, pa.nulls(n, pa.string())], schema=SCHEMA)
    return _write(storage, folder, table)


def write_obs_ids(storage: Storage, folder: ReleaseFolder, plan: Plan, set_aside: dict[int, str]) -> str:
    """Add to the list why planned cells have no embedding; return the list's checksum.

    Raises
    ------
    UserError
        When the list that was written with the plan is missing or damaged.
    """
    content = storage.read(folder.obs_ids) if storage.exists(folder.obs_ids) else b""
    found = None
    if _checksum(content) == plan.totals.obs_ids:
        if not set_aside:
            return plan.totals.obs_ids
        found = pq.read_table(io.BytesIO(content))
    else:
        # An earlier run may have written the list with other cells set aside.
        found = _table(content)
        nothing = None if found is None else _with_reasons(found, pa.nulls(len(found), pa.string()))
        if found is None or _checksum(_bytes(nothing)) != plan.totals.obs_ids:
            raise UserError(
                f"the list of cells at {folder.obs_ids} is missing or damaged; expected the one that obs_id_plan "
                "wrote: materialize obs_id_plan again."
            )
    joinids = found["soma_joinid"].to_numpy()
    reasons = np.full(len(joinids), None, object)
    reasons[np.searchsorted(joinids, list(set_aside))] = list(set_aside.values())
    return _write(storage, folder, _with_reasons(found, pa.array(reasons, pa.string())))


def obs_ids_faults(storage: Storage, folder: ReleaseFolder, expected: str | None) -> list[str]:
    """Compare the list with the checksum in the finished array's record; return what is wrong."""
    if not storage.exists(folder.obs_ids):
        return [f"{folder.obs_ids} is missing: materialize obs_id_plan again, then embeddings_array"]
    if expected is not None and _checksum(storage.read(folder.obs_ids)) != expected:
        return [f"{folder.obs_ids} has changed: materialize obs_id_plan again, then embeddings_array"]
    return []


def read_obs_ids(storage: Storage, folder: ReleaseFolder, expected: str | None) -> pa.Table:
    """Read the list, whose checksum the finished array's record states.

    Raises
    ------
    UserError
        When the list is missing or has changed.
    """
    if faults := obs_ids_faults(storage, folder, expected):
        raise UserError(faults[0])
    return pq.read_table(io.BytesIO(storage.read(folder.obs_ids)))


def _with_reasons(found: pa.Table, reasons: pa.Array) -> pa.Table:
    return found.set_column(2, SCHEMA.field("set_aside"), reasons)


def _table(content: bytes) -> pa.Table | None:
    try:
        found = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError, ValueError):
        return None
    return found if found.schema.equals(SCHEMA) else None


def _bytes(table: pa.Table) -> bytes:
    return parquet_bytes([table.combine_chunks()])


def _write(storage: Storage, folder: ReleaseFolder, table: pa.Table) -> str:
    content = _bytes(table)
    storage.write(folder.obs_ids, content)
    return _checksum(content)


def _checksum(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
