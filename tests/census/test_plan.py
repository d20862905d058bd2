"""Cells are divided into shards and megabatches, and plan files are written and checked."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from census_tf_dagster.census.division import divide
from census_tf_dagster.census.plan import Plan, plan_totals, read_plan, with_checksums, write_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.storage import Storage


def write(storage: Storage, folder: Path, joinids: np.ndarray, shards: int, size: int) -> Plan:
    batches = divide(joinids, np.full(len(joinids), 5, np.int32), shards, size).megabatches
    batches = with_checksums(batches, joinids)
    return write_plan(storage, str(folder), joinids, batches, plan_totals(batches, shards, 7))


def test_shards_are_ascending_and_balanced_by_tokens() -> None:
    rng = np.random.default_rng(0)
    joinids = np.sort(rng.choice(100_000, 20_000, replace=False))
    tokens = np.where(joinids < 50_000, 90, 1800).astype(np.int32)
    batches = divide(joinids, tokens, shards=7, megabatch_size=500).megabatches
    assert [b.index for b in batches] == list(range(len(batches)))
    assert sum(b.cells for b in batches) == 20_000
    assert all(earlier.last < later.first for earlier, later in itertools.pairwise(batches))
    per_shard = np.array([sum(b.tokens for b in batches if b.shard == s) for s in range(7)])
    assert per_shard.sum() == tokens.sum()
    assert per_shard.max() - per_shard.min() <= 2 * tokens.max()
    assert max(b.cells for b in batches) == 500


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_fewer_cells_than_shards_leave_shards_empty(cells: int) -> None:
    batches = divide(np.arange(cells) * 3, np.full(cells, 10, np.int32), shards=8, megabatch_size=4).megabatches
    assert sum(b.cells for b in batches) == cells
    assert len({b.shard for b in batches}) == cells


def test_written_plan_reads_back_one_row_group_per_megabatch(tmp_path: Path) -> None:
    storage, joinids = Storage(), np.arange(0, 1000, 3)
    written = write(storage, tmp_path, joinids, 3, 50)
    plan = read_plan(storage, str(tmp_path))
    assert plan == written
    assert np.array_equal(np.concatenate(plan.read_ids(storage, plan.megabatches)), joinids)
    file = pq.ParquetFile(tmp_path / f"{plan.totals.plan}.obs_ids.parquet")
    assert file.num_row_groups == len(plan.megabatches)
    batch = plan.megabatches[4]
    (ids,) = plan.read_ids(storage, [batch])
    assert (ids[0], ids[-1], len(ids)) == (batch.first, batch.last, batch.cells)


def test_a_plan_never_changes_another_is_a_new_file(tmp_path: Path) -> None:
    storage, joinids = Storage(), np.arange(100)
    first = write(storage, tmp_path, joinids, 2, 10)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.parquet")}
    second = write(storage, tmp_path, joinids, 3, 10)
    assert first.totals.plan != second.totals.plan
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert np.array_equal(np.concatenate(first.read_ids(storage, first.megabatches)), joinids)
    assert read_plan(storage, str(tmp_path)).totals == second.totals
    assert write(storage, tmp_path, joinids, 2, 10) == first
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    storage = Storage()
    with pytest.raises(UserError, match="materialize obs_id_plan"):
        read_plan(storage, str(tmp_path))
    plan = write(storage, tmp_path, np.arange(10), 2, 10)
    with pytest.raises(UserError, match=r"shard 2 is not in the plan; expected a shard from 0 to 1\."):
        plan.shard(2)


def pointer(**changes: Any) -> Callable[[Path, Plan], None]:
    def change(folder: Path, plan: Plan) -> None:
        content = json.loads((folder / "current.json").read_text())
        (folder / "current.json").write_text(json.dumps({**content, **changes}))

    return change


def pointer_is(content: bytes) -> Callable[[Path, Plan], None]:
    return lambda folder, _: (folder / "current.json").write_bytes(content) and None


def swapped_ids(folder: Path, plan: Plan) -> None:
    """Exchange two cells of adjacent megabatches."""
    path = folder / f"{plan.totals.plan}.obs_ids.parquet"
    tables = [pq.ParquetFile(path).read_row_group(i) for i in range(len(plan.megabatches))]
    ids = [table["soma_joinid"].to_numpy().copy() for table in tables]
    ids[0][3], ids[1][3] = ids[0][3] + 1, ids[1][3] - 1
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for one in ids:
            writer.write_table(pa.table({"soma_joinid": one}))


def flipped_bytes(folder: Path, plan: Plan) -> None:
    path = folder / f"{plan.totals.plan}.obs_ids.parquet"
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)


def another_file(kind: str) -> Callable[[Path, Plan], None]:
    def change(folder: Path, plan: Plan) -> None:
        pq.write_table(pa.table({"x": [1, 2]}), folder / f"{plan.totals.plan}.{kind}.parquet")

    return change


def index_of_another_plan(folder: Path, plan: Plan) -> None:
    other = write(Storage(), folder / "other", np.arange(0, 300, 3), 2, 10)
    name = "megabatches.parquet"
    (folder / "other" / f"{other.totals.plan}.{name}").rename(folder / f"{plan.totals.plan}.{name}")


DAMAGES = {
    "cells": pointer(cells=11),
    "shards": pointer(shards=3),
    "no such entry": pointer(colour="red"),
    "text for a number": pointer(tokens="many"),
    "a list": pointer_is(b"[]"),
    "a number": pointer_is(b"1"),
    "nothing": pointer_is(b""),
    "not UTF-8": pointer_is(b"\xff\xfe{}"),
    "swapped ids": swapped_ids,
    "flipped bytes": flipped_bytes,
    "other ids file": another_file("obs_ids"),
    "other index file": another_file("megabatches"),
    "another plan's index": index_of_another_plan,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_plan_is_refused_in_a_line(tmp_path: Path, damage: Callable[[Path, Plan], None]) -> None:
    storage = Storage()
    written = write(storage, tmp_path, np.arange(100), 2, 10)
    damage(tmp_path, written)
    with pytest.raises(UserError, match=r"^the plan at .* is damaged .* materialize obs_id_plan again\.$") as caught:
        read_plan(storage, str(tmp_path)).read_ids(storage, written.megabatches)
    assert len(str(caught.value)) < 600
    assert write(storage, tmp_path, np.arange(100), 2, 10) == written
    plan = read_plan(storage, str(tmp_path))
    assert np.array_equal(np.concatenate(plan.read_ids(storage, plan.megabatches)), np.arange(100))
