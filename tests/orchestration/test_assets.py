"""The assets in Dagster, in this process: how they show progress, failure and staleness."""

import re
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from census_tf_dagster.orchestration.assets import shard_embeddings
from census_tf_dagster.orchestration.metadata import values_of
from tests.support.builders import tiny
from tests.support.census_edits import set_counts
from tests.support.in_process import Deployment
from tests.support.project import RELEASE, Project


@pytest.fixture
def deployment(project: Project) -> Iterator[Deployment]:
    tiny(project, shards=2, megabatch_size=32)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Deployment(project, instance)


def everything(deployment: Deployment) -> None:
    assert deployment.run("obs_id_plan", RELEASE).success
    for shard in range(2):
        assert deployment.run("shard_embeddings", f"{RELEASE}|{shard}").success
    assert deployment.run("embeddings_array", RELEASE).success


def metadata(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    (event,) = result.asset_materializations_for_node(f"tiny__{asset}")
    return values_of(event.metadata)


def test_the_plan_shows_what_the_shards_will_do(deployment: Deployment) -> None:
    shown = metadata(deployment.run("obs_id_plan", RELEASE), "obs_id_plan")
    assert (shown["cells"], shown["shards"]) == (200, 2)
    assert shown["primary_cells"] + shown["duplicate_cells"] == 200
    assert 0 < shown["duplicate_cells"] < 200
    assert shown["tokens"] > 200 * 2
    assert shown["bytes_to_write"] == int(200 * 16 * 3.8)
    assert shown["expressed_genes_known"] < shown["expressed_genes"] <= 120
    assert 0.5 < shown["expressed_entries_known_share"] < 1


def test_a_running_shard_shows_itself(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_embeddings, "OBSERVE_EVERY_SECONDS", 0.0)
    assert deployment.run("obs_id_plan", RELEASE).success
    result = deployment.run("shard_embeddings", f"{RELEASE}|1")
    shown = metadata(result, "shard_embeddings")
    records = deployment.instance.fetch_observations(dg.AssetKey(["tiny", "shard_embeddings"]), limit=10).records
    done = [values_of(record.asset_observation.metadata)["cells_done"] for record in reversed(records)]
    assert len(done) == shown["megabatches"]
    assert done == sorted(done)
    assert done[-1] == shown["cells"]
    assert {record.asset_observation.partition for record in records} == {f"{RELEASE}|1"}
    assert records[0].asset_observation.metadata["Seconds left"].value == 0


def test_observations_are_throttled(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_embeddings, "OBSERVE_EVERY_SECONDS", 3600.0)
    assert deployment.run("obs_id_plan", RELEASE).success
    assert deployment.run("shard_embeddings", f"{RELEASE}|1").success
    key = dg.AssetKey(["tiny", "shard_embeddings"])
    assert not deployment.instance.fetch_observations(key, limit=10).records


def test_recompute_marks_the_array_unverified_until_it_is_checked_again(deployment: Deployment) -> None:
    everything(deployment)
    assert deployment.verified()
    assert deployment.run("shard_embeddings", f"{RELEASE}|0").success
    assert deployment.verified()
    assert deployment.run("shard_embeddings", f"{RELEASE}|0", {"recompute": True}).success
    assert not deployment.verified()
    assert deployment.run("shard_embeddings", f"{RELEASE}|1", {"recompute": True}).success
    assert not deployment.verified()
    again = deployment.run("embeddings_array", RELEASE)
    assert again.success
    assert metadata(again, "embeddings_array")["shards_read_again"] == 0
    assert metadata(again, "embeddings_array")["excess_fragments"] > 0
    assert deployment.verified()


def test_another_plan_marks_the_array_unverified(deployment: Deployment, project: Project) -> None:
    everything(deployment)
    assert deployment.run("obs_id_plan", RELEASE).success
    assert deployment.verified()
    yaml = project.folder / "sets" / "tiny" / "defs.yaml"
    yaml.write_text(yaml.read_text().replace("megabatch_size: 32", "megabatch_size: 16"))
    changed = Deployment(project, deployment.instance)
    assert changed.run("obs_id_plan", RELEASE).success
    assert not changed.verified()
    everything(changed)
    assert changed.verified()


def test_cells_that_are_set_aside_are_listed(deployment: Deployment, project: Project) -> None:
    assert deployment.run("obs_id_plan", RELEASE).success
    set_counts(project, [5], -1.0)
    result = deployment.run("shard_embeddings", f"{RELEASE}|0")
    assert result.success
    shown = metadata(result, "shard_embeddings")
    assert shown["cells_set_aside"] == 1
    (one,) = shown["set_aside"]
    assert re.fullmatch(r"joinid 5: X/raw holds -\d+\.0, which is not a count", one)
    assert deployment.run("shard_embeddings", f"{RELEASE}|1").success
    shown = metadata(deployment.run("embeddings_array", RELEASE), "embeddings_array")
    assert shown["cells_set_aside"] == 1
    assert shown["cells"] == shown["cells_planned"] - 1


def test_an_array_is_not_materialized_before_all_shards_are_there(deployment: Deployment) -> None:
    assert deployment.run("obs_id_plan", RELEASE).success
    assert deployment.run("shard_embeddings", f"{RELEASE}|0").success
    result = deployment.run("embeddings_array", RELEASE)
    assert not result.success
    failure = result.failure_data_for_node("tiny__embeddings_array")
    assert failure is not None
    assert "1 of 2 shards have not finished" in str(failure.user_failure_data)
    assert not result.asset_materializations_for_node("tiny__embeddings_array")
