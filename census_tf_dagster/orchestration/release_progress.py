"""The progress of a whole release, as observations of `embeddings_array`.

A running shard reports its own progress. If the last report of the whole release is old, the shard reports that too,
so one of the running shards always does it. Everything comes from Dagster's records; no array is read here.
"""

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import dagster as dg

from census_tf_dagster.config.dagster_names import ARRAY, PLAN, SHARDS
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.durations import duration
from census_tf_dagster.orchestration.asset_support import asset_key
from census_tf_dagster.orchestration.metadata import titled, values_of

RELEASE_EVERY_SECONDS = 60.0
"""The progress of a release is reported at most this often."""
FRESH_SECONDS = 150.0
"""A shard whose last observation is older than this no longer runs."""


def observe_release(instance: dg.DagsterInstance, settings: SetSettings, release: str) -> dg.AssetObservation | None:
    """Return an observation of the progress of a release; None when the last one is recent.

    Parameters
    ----------
    instance
        The instance that has the observations and materializations of the shards.
    settings, release
        The set, and the name of the release.
    """
    array, shards = asset_key(settings, ARRAY), asset_key(settings, SHARDS)
    now = time.time()
    if any(now - at < RELEASE_EVERY_SECONDS for at, _, _ in _observations(instance, array, [release], 1)):
        return None
    partitions = [f"{release}|{shard}" for shard in range(settings.shards)]
    done = {key: values["cells"] for key, values in _materialized(instance, shards, partitions)}
    running: dict[str, dict[str, Any]] = {}
    for at, key, values in _observations(instance, shards, partitions, 8 * settings.shards):
        if now - at < FRESH_SECONDS and values["cells_done"] < values["cells"]:
            running.setdefault(key, values)
    planned = next((values["cells"] for _, values in _materialized(instance, _plan(settings), [release])), 0)
    cells = sum(done.values()) + sum(one["cells_done"] for key, one in running.items() if key not in done)
    rate = sum(one["cells_per_second"] for one in running.values())
    limits = Counter(one["limited_by"] for one in running.values())
    return dg.AssetObservation(
        asset_key=array,
        partition=release,
        description="Progress of this release, from its running shards.",
        metadata=titled(
            {
                "cells_done": cells,
                "cells": planned,
                "done": f"{cells / planned:.1%}" if planned else "unknown",
                "cells_per_second": round(rate, 1),
                "time_left": duration((planned - cells) / rate) if rate else "unknown",
                "shards_done": f"{len(done)} of {settings.shards}",
                "shards_running": len(running),
                "limited_by": ", ".join(f"{stage} in {count} shards" for stage, count in limits.most_common())
                or "unknown",
            }
        ),
    )


def _plan(settings: SetSettings) -> dg.AssetKey:
    return asset_key(settings, PLAN)


def _observations(
    instance: dg.DagsterInstance, key: dg.AssetKey, partitions: list[str], limit: int
) -> Iterable[tuple[float, str, dict[str, Any]]]:
    """Yield (time, partition, metadata) of observations, newest first."""
    wanted = dg.AssetRecordsFilter(asset_key=key, asset_partitions=partitions)
    for record in instance.fetch_observations(wanted, limit=limit).records:
        if record.asset_observation is not None and record.partition_key is not None:
            yield record.timestamp, record.partition_key, values_of(record.asset_observation.metadata)


def _materialized(
    instance: dg.DagsterInstance, key: dg.AssetKey, partitions: list[str]
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield (partition, metadata) of the last materialization of each partition."""
    wanted = dg.AssetRecordsFilter(asset_key=key, asset_partitions=partitions)
    seen: set[str] = set()
    for record in instance.fetch_materializations(wanted, limit=2 * len(partitions)).records:
        if record.asset_materialization and record.partition_key and record.partition_key not in seen:
            seen.add(record.partition_key)
            yield record.partition_key, values_of(record.asset_materialization.metadata)
