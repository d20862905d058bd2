"""Copies the records of a finished run of a shard, so that a deployment has those of thousands.

Rows of Dagster's tables are read and inserted again under other ids, partitions and times. They are the rows that
Dagster's own methods would write, which open connections for each event, so that 8,000 runs would take an hour or more.
"""

import re
import shutil
import sqlite3
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from datetime import datetime, timedelta
from typing import Any

import dagster as dg
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    AssetEventTagsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable
from sqlalchemy import ColumnElement, Connection, Table, func, select, text

BACKFILL_TAG, SHARD_TAG, RELEASE_TAG = "dagster/backfill", "dagster/partition/shard", "dagster/partition/release"


class FinishedRun:
    """The records of a run of a shard."""

    def __init__(self, instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
        self.instance, self.run = instance, run
        self.begun = instance.get_run_record_by_id(run.run_id).create_timestamp.timestamp()  # type: ignore[union-attr]
        with _events_of(instance) as connection:
            self.events = _rows(connection, SqlEventLogStorageTable, SqlEventLogStorageTable.c.run_id == run.run_id)
            wanted = AssetEventTagsTable.c.event_id.in_([event["id"] for event in self.events])
            self.tables = {
                SqlEventLogStorageTable: self.events,
                AssetEventTagsTable: _rows(connection, AssetEventTagsTable, wanted),
            }
            self.tables[AssetCheckExecutionsTable] = _rows(
                connection, AssetCheckExecutionsTable, AssetCheckExecutionsTable.c.run_id == run.run_id
            )
        with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
            self.runs = {
                table: _rows(connection, table, table.c.run_id == run.run_id) for table in (RunsTable, RunTagsTable)
            }

    def copy(self, release: str, backfill: str, begun: Mapping[str, float]) -> None:
        """Record such a run for shards of a release: when each began, in seconds since 1970, by the shard's key."""
        with _events_of(self.instance) as connection:
            free = connection.execute(select(func.max(SqlEventLogStorageTable.c.id))).scalar_one() + 1
        first = min(event["id"] for event in self.events)
        span = max(event["id"] for event in self.events) - first + 1
        copies: dict[Any, list[dict[str, Any]]] = {table: [] for table in (*self.tables, *self.runs)}
        for number, (shard, at) in enumerate(begun.items()):
            names = _Names(self.run, release, shard, backfill, at - self.begun, free + number * span - first)
            for table, rows in (self.tables | self.runs).items():
                copies[table] += [names.row(row, keep_id=table is SqlEventLogStorageTable) for row in rows]
            self._copy_file(names)
        with _events_of(self.instance) as connection:
            for table in self.tables:
                connection.execute(table.insert(), copies[table])
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT setval('event_logs_id_seq', (SELECT max(id) FROM event_logs))"))
        with self.instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
            for table in self.runs:
                connection.execute(table.insert(), copies[table])

    def _copy_file(self, names: "_Names") -> None:
        """Copy the run's own database. Only SQLite has one for each run."""
        storage = self.instance.event_log_storage
        if not isinstance(storage, SqliteEventLogStorage):
            return
        path = storage.path_for_shard(names.run_id)
        with closing(sqlite3.connect(storage.path_for_shard(self.run.run_id))) as of_template:
            of_template.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copy(storage.path_for_shard(self.run.run_id), path)
        with closing(sqlite3.connect(path)) as connection, connection:
            for key, event in connection.execute("SELECT id, event FROM event_logs").fetchall():
                wanted = (names.run_id, names.text(event), f"{names.later} seconds", key)
                connection.execute(
                    "UPDATE event_logs SET run_id = ?, event = ?, timestamp = datetime(timestamp, ?) WHERE id = ?",
                    wanted,
                )
            connection.execute("UPDATE event_logs SET partition = ? WHERE partition IS NOT NULL", (names.partition,))


class _Names:
    """Translates the rows of a run to those of another shard's run."""

    def __init__(self, of: dg.DagsterRun, release: str, shard: str, backfill: str, later: float, further: int) -> None:
        self.run_id, self.partition = str(uuid.uuid4()), f"{release}|{shard}"
        self.shard, self.later, self.further = shard, later, further
        own = of.tags[SHARD_TAG]
        self.names = {of.run_id: self.run_id, of.tags["dagster/partition"]: self.partition}
        self.names |= {of.tags[BACKFILL_TAG]: backfill, of.tags[RELEASE_TAG]: release}
        self.names[f'"{SHARD_TAG}": "{own}"'] = f'"{SHARD_TAG}": "{shard}"'

    def text(self, value: str) -> str:
        for mine, new in self.names.items():
            value = value.replace(mine, new)
        return re.sub(r'(?<="timestamp": )[\d.]+', lambda found: repr(float(found[0]) + self.later), value)

    def row(self, row: Mapping[str, Any], *, keep_id: bool) -> dict[str, Any]:
        new = dict(row)
        for name, value in row.items():
            if name == "id":
                new[name] = value + self.further
            elif name.endswith("_storage_id") or name == "event_id":
                new[name] = value and value + self.further
            elif isinstance(value, str):
                new[name] = self.text(value)
            elif isinstance(value, datetime):
                new[name] = value + timedelta(seconds=self.later)
            elif isinstance(value, float):
                new[name] = value + self.later
        if not keep_id:
            del new["id"]
        if row.get("key") == SHARD_TAG:
            new["value"] = self.shard
        return new


def _events_of(instance: dg.DagsterInstance) -> AbstractContextManager[Connection]:
    """Connect to the events of all runs: with SQLite only those that Dagster repeats in its index."""
    return instance.event_log_storage.index_connection()  # type: ignore[attr-defined,no-any-return]


def _rows(connection: Connection, table: Table, wanted: ColumnElement[bool]) -> list[dict[str, Any]]:
    return [dict(row._mapping) for row in connection.execute(select(table).where(wanted).order_by(table.c.id))]
