"""The progress of a release: its shards' observations are summed up once a minute, and `status` shows them."""

import time
from typing import Any

import dagster as dg
import pytest

from census_tf_dagster.embedding_set import EmbeddingSet
from census_tf_dagster.operate.graphql import Deployment
from census_tf_dagster.operate.observations import ShardProgress, progress_of
from census_tf_dagster.operate.remote_set import RemoteSet
from census_tf_dagster.operate.runs import Run
from census_tf_dagster.operate.status import describe, release_statuses
from census_tf_dagster.orchestration import release_progress as progress
from census_tf_dagster.orchestration.metadata import titled, values_of
from census_tf_dagster.orchestration.release_progress import observe_release
from tests.support.builders import tiny
from tests.support.deployment import running_locally
from tests.support.project import RELEASE, Project

SETTINGS = EmbeddingSet(name="tiny", organism="homo_sapiens", checkpoint="x", shards=12)
SHARDS, ARRAY, PLAN = (dg.AssetKey(["tiny", name]) for name in ("shard_embeddings", "embeddings_array", "obs_id_plan"))


def tell(instance: dg.DagsterInstance, shard: int, done: int, rate: float, limit: str, release: str = RELEASE) -> None:
    metadata = {"cells_done": done, "cells": 100, "cells_per_second": rate, "seconds_left": 1, "limited_by": limit}
    partition = f"{release}|{shard}"
    instance.report_runless_asset_event(dg.AssetObservation(SHARDS, partition=partition, metadata=titled(metadata)))


def materialize(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str, cells: int) -> None:
    instance.report_runless_asset_event(
        dg.AssetMaterialization(key, partition=partition, metadata=titled({"cells": cells}))
    )


def shown(instance: dg.DagsterInstance) -> dict[str, Any] | None:
    found = observe_release(instance, SETTINGS, RELEASE)
    if found is None:
        return None
    instance.report_runless_asset_event(found)
    assert (found.asset_key, found.partition) == (ARRAY, RELEASE)
    return values_of(found.metadata)


def test_a_release_is_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        materialize(instance, PLAN, RELEASE, 1200)
        for cells in (90, 100):
            materialize(instance, SHARDS, f"{RELEASE}|0", cells)
        tell(instance, 0, 100, 5.0, "read")
        tell(instance, 3, 10, 1.0, "read")
        tell(instance, 3, 40, 2.5, "compute")
        tell(instance, 11, 60, 7.5, "compute")
        tell(instance, 7, 20, 2.0, "read")
        tell(instance, 4, 99, 99.0, "write", "another")
        assert shown(instance) == {
            "cells_done": 220,
            "cells": 1200,
            "done": "18.3%",
            "cells_per_second": 12.0,
            "time_left": "82 s",
            "shards_done": "1 of 12",
            "shards_running": 3,
            "limited_by": "compute in 2 shards, read in 1 shards",
        }
        assert shown(instance) is None
        later = time.time() + progress.RELEASE_EVERY_SECONDS + 1
        monkeypatch.setattr(progress.time, "time", lambda: later)
        assert (shown(instance) or {})["cells_done"] == 220
        gone = time.time() + progress.FRESH_SECONDS + 60
        monkeypatch.setattr(progress.time, "time", lambda: gone)
        monkeypatch.setattr(progress, "RELEASE_EVERY_SECONDS", 0.0)
        last = shown(instance) or {}
        assert (last["shards_running"], last["cells_done"], last["time_left"]) == (0, 100, "unknown")


def test_status_asks_each_running_shard_for_its_last_word(project: Project) -> None:
    tiny(project)
    partition = f"{RELEASE}|1"
    with dg.instance_for_test(temp_dir=project.env["DAGSTER_HOME"]) as instance:
        for done in (5, 9):
            metadata = {"cells_done": done, "cells": 50, "cells_per_second": 2.5, "limited_by": "read"}
            event = dg.AssetObservation(SHARDS, partition=partition, metadata=titled(metadata))
            instance.report_runless_asset_event(event)
        record = instance.fetch_observations(SHARDS, limit=1).records[0]
    with running_locally(project, daemon=False) as operator:
        of = RemoteSet("tiny", "census_tf_dagster.definitions", (RELEASE,), ("0", "1", "2", "3"), reuses=False)
        run = Run(record.run_id, "shard_embeddings", partition, "STARTED", 0, 0, None, 0, recompute=False)
        silent = Run("other", "shard_embeddings", f"{RELEASE}|2", "STARTED", 0, 0, None, 0, recompute=False)
        found = progress_of(Deployment.at(operator.url), of, [run, silent])
    assert found == {
        partition: ShardProgress(cells_done=9, cells_per_second=2.5, limited_by="read", at=found[partition].at)
    }


def test_status_counts_cells_that_are_set_aside(project: Project) -> None:
    tiny(project)
    with dg.instance_for_test(temp_dir=project.env["DAGSTER_HOME"]) as instance:
        instance.add_dynamic_partitions("census_release", [RELEASE])
        for shard, set_aside in enumerate((0, 3, 2)):
            figures = titled({"cells": 50, "cells_set_aside": set_aside})
            event = dg.AssetMaterialization(SHARDS, partition=f"{RELEASE}|{shard}", metadata=figures)
            instance.report_runless_asset_event(event)
    with running_locally(project, daemon=False) as operator:
        of = RemoteSet("tiny", "census_tf_dagster.definitions", (RELEASE,), ("0", "1", "2", "3"), reuses=False)
        (status,) = release_statuses(Deployment.at(operator.url), of, RELEASE)
    assert (status.cells_done, status.cells_set_aside) == (150, 5)
    assert "  cells   150 of an unknown number; 5 of them set aside" in describe(of, status)
