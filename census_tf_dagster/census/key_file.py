"""Writes the keys of a plan's cells to a file, and finds a new plan's cells in the file of an earlier plan.

The file is Parquet. The first bits of a key choose its bucket, and each bucket is one row group. Two plans of any size
are compared bucket by bucket, in the memory of one bucket. Making keys belongs in `cell_keys`.
"""

import json
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tiledb

from census_tf_dagster.census.cell_keys import Keys
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.compiled import compiled
from census_tf_dagster.io.storage import Storage

Int64Array = npt.NDArray[np.int64]

CELLS_IN_BUCKET = 2**20
"""Approximate number of cells in a bucket."""

_COUNTS = b"census_tf_buckets"
_SCHEMA = pa.schema({"soma_joinid": pa.int64(), "key": pa.binary(16)})


def write_keys(storage: Storage, uri: str, joinids: Int64Array, keys: Keys) -> None:
    """Write joinids with their keys; cells without a key are left out.

    Parameters
    ----------
    joinids, keys
        Ascending int64 ``(n,)``, and uint64 ``(n, 2)``.
    """
    bits = max(0, int(len(joinids) / CELLS_IN_BUCKET).bit_length())
    order, ends = _by_bucket(keys, bits)
    schema = _SCHEMA.with_metadata({_COUNTS: json.dumps(np.diff(ends).tolist())})
    with (
        storage.writing(uri) as file,
        pq.ParquetWriter(
            file,
            schema,
            compression={"soma_joinid": "zstd", "key": "none"},
            use_dictionary=False,
            write_statistics=False,
            column_encoding={"soma_joinid": "DELTA_BINARY_PACKED", "key": "PLAIN"},
        ) as writer,
    ):
        for bucket in range(len(ends) - 1):
            chosen = order[ends[bucket] : ends[bucket + 1]]
            if len(chosen):
                content = pa.py_buffer(np.ascontiguousarray(keys[chosen]))
                key = pa.Array.from_buffers(pa.binary(16), len(chosen), [None, content])
                table = pa.table([pa.array(joinids[chosen]), key], schema=schema)
                writer.write_table(table, row_group_size=len(chosen))


def find_cells(storage: Storage, uri: str, keys: Keys) -> Int64Array:
    """Find cells by their keys in a file that `write_keys` wrote.

    Parameters
    ----------
    storage, uri
        The earlier plan's file.
    keys
        Keys of the new cells, uint64 ``(n, 2)``.

    Returns
    -------
    numpy.ndarray
        The earlier joinid of each cell, int64 ``(n,)``. It is -1 for a cell without a key, for a key that the file does
        not hold, and for a key that two cells share in either plan.

    Raises
    ------
    UserError
        When the file is damaged.
    """
    found = np.full(len(keys), -1, np.int64)
    try:
        with storage.open(uri) as file:
            parquet = pq.ParquetFile(file)
            counts = json.loads(parquet.schema_arrow.metadata[_COUNTS])
            order, ends = _by_bucket(keys, (len(counts) - 1).bit_length())
            for bucket, (joinids, earlier) in enumerate(_buckets(parquet, counts)):
                chosen = order[ends[bucket] : ends[bucket + 1]]
                if len(joinids) and len(chosen):
                    found[chosen] = _match(earlier, joinids, keys[chosen])
    except (ValueError, KeyError, TypeError, pa.ArrowInvalid, OSError, tiledb.TileDBError) as error:
        # TileDB gives no reason. If S3 refuses access or does not answer, this raises the error that says so.
        storage.exists(uri)
        raise UserError(
            f"the cells' keys at {uri} cannot be read ({error}). Expected the Parquet file that its obs_id_plan wrote: "
            "materialize obs_id_plan of that release again."
        ) from error
    return found


def _buckets(parquet: pq.ParquetFile, counts: list[int]) -> Iterator[tuple[Int64Array, Keys]]:
    row_group = 0
    for count in counts:
        if not count:
            yield np.empty(0, np.int64), np.empty((0, 2), np.uint64)
            continue
        table = parquet.read_row_group(row_group).combine_chunks()
        key = table["key"].chunk(0)
        content = np.frombuffer(key.buffers()[1], np.uint64)[2 * key.offset :][: 2 * count]
        yield table["soma_joinid"].to_numpy(), content.reshape(-1, 2)
        row_group += 1


@compiled()
def _by_bucket(keys, bits):  # type: ignore[no-untyped-def]
    """Return the positions of cells with a key, bucket by bucket and in order within each, and the buckets' ends."""
    n_buckets = 1 << bits
    shift = np.uint64(64 - bits) if bits else np.uint64(0)
    ends = np.zeros(n_buckets + 1, np.int64)
    for i in range(len(keys)):
        if keys[i, 0] | keys[i, 1]:
            ends[(np.int64(keys[i, 0] >> shift) if bits else 0) + 1] += 1
    ends = np.cumsum(ends)
    at = ends[:-1].copy()
    order = np.empty(ends[-1], np.uint32)
    for i in range(len(keys)):
        if keys[i, 0] | keys[i, 1]:
            bucket = np.int64(keys[i, 0] >> shift) if bits else 0
            order[at[bucket]] = i
            at[bucket] += 1
    return order, ends


@compiled()
def _match(earlier, joinids, keys):  # type: ignore[no-untyped-def]
    """Return the earlier joinid for each key; -1 if there is none, or if either plan has the key twice."""
    size = 1
    while size < 2 * len(earlier):
        size *= 2
    mask = np.uint64(size - 1)
    table = np.full(size, -1, np.int64)
    twice = np.zeros(len(earlier), np.bool_)
    for i in range(len(earlier)):
        slot = earlier[i, 1] & mask
        while table[slot] >= 0:
            at = table[slot]
            if earlier[at, 0] == earlier[i, 0] and earlier[at, 1] == earlier[i, 1]:
                twice[at] = True
                break
            slot = (slot + np.uint64(1)) & mask
        if table[slot] < 0:
            table[slot] = i
    found = np.full(len(keys), -1, np.int64)
    taken = np.full(len(earlier), -1, np.int64)
    for i in range(len(keys)):
        slot = keys[i, 1] & mask
        while table[slot] >= 0:
            at = table[slot]
            if earlier[at, 0] == keys[i, 0] and earlier[at, 1] == keys[i, 1]:
                if taken[at] >= 0:
                    found[taken[at]] = -1
                elif not twice[at]:
                    found[i] = joinids[at]
                    taken[at] = i
                break
            slot = (slot + np.uint64(1)) & mask
    return found
