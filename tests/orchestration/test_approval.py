"""The asset `approval`: when it approves by itself, when it asks a person, and which plans an approval covers."""

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import dagster as dg
import pytest
import yaml

from census_tf_dagster.config.cost import utc_now
from census_tf_dagster.definitions import build_definitions, census_resource, load_sets, store_resource
from census_tf_dagster.orchestration.automation import CONDITION_TAG
from census_tf_dagster.orchestration.metadata import values_of
from census_tf_dagster.orchestration.partitions import RELEASES
from tests.support.builders import tiny
from tests.support.project import RELEASE, Project
from tests.support.release_directory import directory_server, entry, retracted

pytestmark = pytest.mark.takes(60)

NODES = {"gpus": 0, "gpu_type": "L40S", "usd_per_gpu_hour": 1e9, "fleet_gpus": 4}
BY_ITSELF = {CONDITION_TAG: "true"}
APPROVAL = dg.AssetKey(["tiny", "approval"])


class Gate:
    """A set's assets, run one partition at a time in this process, by automation or by a person."""

    def __init__(self, project: Project, instance: dg.DagsterInstance, **attributes: Any) -> None:
        self.project, self.instance = project, instance
        tiny(project, cells=40, shards=2, placement=NODES, **attributes)
        instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])

    def change(self, **attributes: Any) -> None:
        path = self.project.folder / "sets" / "tiny" / "defs.yaml"
        document = yaml.safe_load(path.read_text())
        document["attributes"].update(attributes)
        path.write_text(yaml.safe_dump(document))

    def run(self, asset: str, partition: str = RELEASE, *, person: bool = True, **config: Any) -> Any:
        defs = build_definitions(
            load_sets(self.project.folder / "sets"), census_resource(self.project.env), store_resource(self.project.env)
        )
        return defs.resolve_implicit_global_asset_job_def().execute_in_process(
            partition_key=partition,
            asset_selection=[dg.AssetKey(["tiny", asset])],
            instance=self.instance,
            tags={} if person else BY_ITSELF,
            run_config={"ops": {f"tiny__{asset}": {"config": config}}} if config else None,
            raise_on_error=False,
        )

    def decide(self) -> tuple[dict[str, Any] | None, str]:
        """Run the approval by automation. Return the approval's metadata and the last request for a person."""
        result = self.run("approval", person=False)
        assert result.success
        observed = self.instance.fetch_observations(APPROVAL, limit=1).records
        asked = observed[0].asset_observation.description if observed and observed[0].asset_observation else ""
        return figures(result, "approval"), asked or ""


def figures(result: Any, asset: str) -> dict[str, Any] | None:
    events = result.asset_materializations_for_node(f"tiny__{asset}")
    return values_of(events[0].metadata) if events else None


def reason(result: Any) -> str:
    (event,) = [event for event in result.all_events if event.is_step_failure]
    return str(event.step_failure_data.user_failure_data.description)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as one:
        yield one


def test_the_plan_says_what_it_takes(project: Project, instance: dg.DagsterInstance) -> None:
    gate = Gate(project, instance, auto_start={"budget": 1.0})
    shown = figures(gate.run("obs_id_plan"), "obs_id_plan")
    assert shown is not None
    assert shown["tokens_to_compute"] == shown["tokens"] > 0
    hours = shown["tokens"] / shown["tokens_per_second_of_a_gpu"] / 3600
    assert shown["cost_usd"] == pytest.approx(hours * 1e9, rel=1e-3)
    assert shown["cost_usd"] > 1
    assert shown["rate"].startswith("ASSUMED: 25% of the peak arithmetic of the L40S")
    assert (shown["auto_start"], shown["release_deleted_from"]) == ("up to 1.00 USD a release", "stays")
    dry = project.command("launch", "tiny", RELEASE, "--dry-run", "--url", "http://127.0.0.1:9")
    assert f"{shown['tokens']:,} tokens to compute" in dry.stdout
    assert f"{shown['cost_usd']:,.2f} USD" in dry.stdout
    assert "if started now, the shards finish on 20" in dry.stdout


def test_within_the_budget_it_is_given_by_itself(project: Project, instance: dg.DagsterInstance) -> None:
    gate = Gate(project, instance, auto_start={"budget": 1e9})
    assert gate.run("obs_id_plan").success
    given, asked = gate.decide()
    assert given is not None
    assert given["approved_by"] == "auto_start: within the budget of 1,000,000,000.00 USD a release"
    assert not asked
    assert gate.run("shard_embeddings", f"{RELEASE}|0", person=False).success


def test_above_it_a_person_is_asked_and_nothing_is_given(project: Project, instance: dg.DagsterInstance) -> None:
    gate = Gate(project, instance, auto_start={"budget": 1.0})
    assert gate.run("obs_id_plan").success
    given, asked = gate.decide()
    assert given is None
    assert asked.startswith(f"tiny {RELEASE} waits for your approval: it costs ")
    assert "materialize tiny/approval of 2025-11-08 in the web interface, or run `census-tf-dagster approve" in asked
    refused = gate.run("shard_embeddings", f"{RELEASE}|0", person=False)
    assert not refused.success
    assert (
        "is not approved; no plan was. To approve and continue, run `census-tf-dagster launch tiny 2025-11-08`"
        in reason(refused)
    )
    run = instance.get_run_by_id(refused.run_id)
    assert run is not None
    assert run.tags["dagster/retry_on_asset_or_op_failure"] == "false"
    # A person decides without it.
    assert gate.run("shard_embeddings", f"{RELEASE}|0").success


def test_a_person_approves_one_plan(project: Project, instance: dg.DagsterInstance) -> None:
    gate = Gate(project, instance, auto_start={"budget": 1.0})
    planned = figures(gate.run("obs_id_plan"), "obs_id_plan")
    assert planned is not None
    other = gate.run("approval", plan="0123456789abcdef", by="Ada")
    assert not other.success
    assert f"the plan to approve is 0123456789abcdef; expected {planned['plan']}, which is current" in reason(other)
    given = figures(gate.run("approval", plan=planned["plan"], by="Ada"), "approval")
    assert given is not None
    assert (given["approved_by"], given["plan"]) == ("Ada", planned["plan"])
    assert given["cost_usd"] == planned["cost_usd"]
    assert gate.run("shard_embeddings", f"{RELEASE}|0", person=False).success
    # The same plan again: nothing new is asked.
    assert gate.run("obs_id_plan").success
    assert gate.decide() == (None, "")


def test_an_approval_does_not_cover_a_dearer_plan(project: Project, instance: dg.DagsterInstance) -> None:
    gate = Gate(project, instance, auto_start={"budget": 1.0}, mod=4)
    small = figures(gate.run("obs_id_plan"), "obs_id_plan")
    assert gate.run("approval").success
    gate.change(mod=1)
    large = figures(gate.run("obs_id_plan"), "obs_id_plan")
    assert small is not None
    assert large is not None
    assert large["tokens"] > small["tokens"]
    refused = gate.run("shard_embeddings", f"{RELEASE}|0", person=False)
    assert f"plan {large['plan']} of tiny {RELEASE} ({large['tokens']:,} tokens) is not approved; plan " in reason(
        refused
    )
    assert f"{small['plan']} ({small['tokens']:,} tokens) was, by a person, in Dagster" in reason(refused)
    given, asked = gate.decide()
    assert given is None
    assert "waits for your approval" in asked
    # Another plan of the same cells needs no more: it is covered.
    assert gate.run("approval").success
    gate.change(shards=3)
    again = figures(gate.run("obs_id_plan"), "obs_id_plan")
    assert again is not None
    assert again["plan"] != large["plan"]
    assert gate.run("shard_embeddings", f"{RELEASE}|0", person=False).success


def test_shards_measure_what_the_next_plan_is_told_with(project: Project, instance: dg.DagsterInstance) -> None:
    gate = Gate(project, instance)
    gate.change(placement={**NODES, "gpu_type": None})
    first = figures(gate.run("obs_id_plan"), "obs_id_plan")
    assert first is not None
    assert (first["cost_usd"], first["gpu_hours"]) == ("unknown", "unknown")
    done = figures(gate.run("shard_embeddings", f"{RELEASE}|0"), "shard_embeddings")
    assert done is not None
    shown = figures(gate.run("obs_id_plan"), "obs_id_plan")
    assert shown is not None
    assert shown["rate"] == "measured: the last 1 shards of this set on CPU"
    seconds = done["seconds_load"] + done["seconds_work"] + done["seconds_verification"]
    assert shown["tokens_per_second_of_a_gpu"] == pytest.approx(done["tokens_computed"] / seconds, rel=0.01)
    assert 0 < shown["tokens_to_compute"] < first["tokens_to_compute"]


def test_off_means_that_automation_gives_nothing(project: Project, instance: dg.DagsterInstance) -> None:
    gate = Gate(project, instance)
    assert gate.run("obs_id_plan").success
    given, asked = gate.decide()
    assert given is None
    assert "`auto_start` of this set is off" in asked
    assets = load_sets(project.folder / "sets")
    assert not assets.sensors
    assert all(
        not any(asset.automation_conditions_by_key.values())
        for asset in assets.assets or ()
        if isinstance(asset, dg.AssetsDefinition)
    )


@pytest.mark.parametrize("what", ["weekly", "retracted"])
def test_a_release_that_goes_away_waits_whatever_the_rule(
    project: Project, instance: dg.DagsterInstance, what: str
) -> None:
    with directory_server() as server:
        project.env |= {"CENSUS_TF_CENSUS": "public", "CENSUS_TF_CENSUS_DIRECTORY": server.url}
        gate = Gate(project, instance, auto_start="on")
        built = (utc_now() - timedelta(days=10)).date().isoformat()
        listed = {
            "weekly": entry(built, str(project.census), lts=False),
            "retracted": retracted(RELEASE, soma={"uri": str(project.census)}),
        }
        # 0.000001 % of a GPU: the work outlasts every release.
        canary = {"tokens": 1e-3, "seconds": 3600, "devices": 1, "device": "NVIDIA L40S"}
        (project.folder / "store" / "tiny").mkdir(parents=True)
        (project.folder / "store" / "tiny" / "canary.json").write_text(json.dumps(canary))
        server.body = json.dumps({RELEASE: listed[what]}).encode()
        assert gate.run("obs_id_plan").success
        given, asked = gate.decide()
    assert given is None
    if what == "weekly":
        assert f"the weekly release may be deleted from {(utc_now() + timedelta(days=20)).year}-" in asked
        assert ", and the work would end on " in asked
    else:
        assert "the release was retracted on 2025-12-01; wrong counts; replaced by 2025-12-08" in asked
