"""The sensor `alerts`: what it tells, that it tells it once, and what a channel that is down does to it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from census_tf_dagster.config.dagster_names import (
    ALERTED_TAG,
    ALERTS,
    APPROVAL,
    ARRAY,
    PLAN,
    SHARDS,
    WILL_RETRY_TAG,
)
from census_tf_dagster.definitions import build_definitions, census_resource, load_sets, store_resource
from census_tf_dagster.orchestration.automation import CONDITION_TAG
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import RELEASES, shard_partitions
from census_tf_dagster.orchestration.sensors import alerts
from census_tf_dagster.orchestration.sensors.alerts import build_alerts
from tests.support.alert_receivers import WEBHOOK, Slack, topic, webhook
from tests.support.builders import tiny
from tests.support.project import RELEASE, Project

__all__ = ["webhook"]

pytestmark = pytest.mark.takes(40)

SETS = {"tiny": (SHARDS,), "other": (SHARDS,), "lab": (PLAN, ARRAY)}
"""As `build_definitions` names them; `lab` is a set of files."""
FILES = dg.DynamicPartitionsDefinition(name="lab_files")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance on disk that retries runs."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text(yaml.safe_dump({"run_retries": {"enabled": True, "max_retries": 3}}))
    with dg.DagsterInstance.from_config(str(home)) as found:
        found.add_dynamic_partitions(str(RELEASES.name), [RELEASE, "older"])
        yield found


class Watch:
    """The sensor, evaluated by hand as Dagster's daemon does it: with the cursor of the last time."""

    def __init__(self, instance: dg.DagsterInstance, channel: str = WEBHOOK, idle: float = 0.5) -> None:
        self.instance = instance
        defs = build_alerts(channel, idle, SETS)
        self.sensor = defs.resolve_sensor_def(ALERTS)
        self.cursor: str | None = None
        self.look()

    def look(self) -> str:
        """Evaluate it once, and return what it reports."""
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursor) as context:
            tick = self.sensor.evaluate_tick(context)
        assert tick.run_requests == []
        self.cursor = tick.cursor
        return str(tick.skip_message)


def embed(
    instance: dg.DagsterInstance,
    shard: int,
    *,
    name: str = "tiny",
    release: str = RELEASE,
    error: Exception | None = None,
    figures: Mapping[str, Any] | None = None,
    retried: bool = False,
) -> dg.ExecuteInProcessResult:
    """Run one shard of a set. It raises `error`, or reports `figures`."""

    @dg.asset(key=[name, SHARDS], partitions_def=shard_partitions(32))
    def shard_embeddings() -> dg.MaterializeResult[None]:
        if error:
            raise error
        return dg.MaterializeResult(metadata=titled(figures or {}))

    job = dg.Definitions([shard_embeddings]).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        partition_key=f"{release}|{shard}",
        asset_selection=[shard_embeddings.key],
        instance=instance,
        tags={"dagster/max_retries": "3" if retried else "0"},
        raise_on_error=False,
    )


# Failed shards.


def test_a_shard_that_failed_for_good_is_told_once(instance: dg.DagsterInstance, webhook: Slack) -> None:
    watch = Watch(instance)
    run = embed(instance, 7, error=ValueError("the GPU is on fire")).run_id
    assert watch.look() == f"told: 1 shard of tiny {RELEASE} failed"
    (text,) = webhook.texts
    assert f"*1 shard of tiny {RELEASE} failed*\nNot retried any more: 7." in text
    assert f"(run {run}): ValueError: the GPU is on fire\n" in text
    assert f"`census-tf-dagster launch tiny {RELEASE}`" in text
    assert watch.look() == watch.look() == "nothing to tell"
    assert len(webhook.texts) == 1
    assert instance.get_run_by_id(run).tags[ALERTED_TAG] == "true"  # type: ignore[union-attr]


def test_a_failure_that_will_be_retried_is_told_only_if_the_retry_is_withdrawn(
    instance: dg.DagsterInstance, webhook: Slack
) -> None:
    watch = Watch(instance)
    run = embed(instance, 7, error=ValueError("x"), retried=True).run_id
    assert instance.get_run_by_id(run).tags[WILL_RETRY_TAG] == "true"  # type: ignore[union-attr]
    assert watch.look() == "nothing to tell"
    instance.add_run_tags(run, {WILL_RETRY_TAG: "false"})
    assert watch.look() == f"told: 1 shard of tiny {RELEASE} failed"


def test_a_failure_is_not_told_before_dagster_has_decided(instance: dg.DagsterInstance, webhook: Slack) -> None:
    watch = Watch(instance)
    run = embed(instance, 7, error=ValueError("x"), retried=True).run_id
    with instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
        found = instance.get_run_by_id(run)
        assert found is not None
        tags = {key: one for key, one in found.tags.items() if key != WILL_RETRY_TAG}
        body = dg.serialize_value(found.with_tags(tags))
        connection.exec_driver_sql("UPDATE runs SET run_body = ? WHERE run_id = ?", (body, run))
    assert watch.look() == "nothing to tell"


def test_without_retries_every_failure_is_for_good(tmp_path: Path, webhook: Slack) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])
        watch = Watch(instance)
        embed(instance, 7, error=ValueError("x"), retried=True)
        assert watch.look() == f"told: 1 shard of tiny {RELEASE} failed"


def test_failures_of_one_release_are_one_message(instance: dg.DagsterInstance, webhook: Slack) -> None:
    watch = Watch(instance)
    for shard in range(22):
        embed(instance, shard, error=ValueError("x" * 3000))
    embed(instance, 1, name="other", error=dg.Failure("asked for it"))
    embed(instance, 1, release="older", error=ValueError("x"))
    embed(instance, 2, name="unknown", error=ValueError("x"))
    told = [f"22 shards of tiny {RELEASE}", f"1 shard of other {RELEASE}", "1 shard of tiny older"]
    assert watch.look() == "; ".join(f"told: {one} failed" for one in told)
    assert "18, 19 and 2 more." in webhook.texts[0]
    assert max(len(one) for one in webhook.texts) < 1200
    assert ": asked for it\n" in webhook.texts[1]


@pytest.mark.parametrize("asset", [PLAN, ARRAY])
def test_files_are_told_as_well(instance: dg.DagsterInstance, webhook: Slack, asset: str) -> None:
    watch = Watch(instance)
    instance.add_dynamic_partitions("lab_files", ["a.h5ad", "b.h5ad"])

    def run(name: str, error: Exception | None, figures: Mapping[str, Any]) -> None:
        @dg.asset(key=["lab", asset], partitions_def=FILES)
        def of_a_file() -> dg.MaterializeResult[None]:
            if error:
                raise error
            return dg.MaterializeResult(metadata=titled(figures))

        job = dg.Definitions([of_a_file]).resolve_implicit_global_asset_job_def()
        tags = {"dagster/max_retries": "0"}
        selected = [of_a_file.key]
        job.execute_in_process(
            partition_key=name, asset_selection=selected, instance=instance, tags=tags, raise_on_error=False
        )

    run("a.h5ad", dg.Failure("it holds log-normalised values"), {})
    assert watch.look() == "told: lab a.h5ad failed"
    assert ": it holds log-normalised values\nFix the cause, then materialize lab/embeddings_array" in webhook.texts[0]
    run("b.h5ad", None, waiting(900))
    if asset == ARRAY:
        assert watch.look() == "told: GPUs of lab b.h5ad wait 90% of their time"
        assert "b.h5ad on NVIDIA L40S: in 1,000 s" in webhook.texts[1]
    assert watch.look() == "nothing to tell"


def test_what_was_before_the_sensor_is_not_told(instance: dg.DagsterInstance, webhook: Slack) -> None:
    embed(instance, 7, error=ValueError("x"))
    embed(instance, 8, figures=waiting(900))
    watch = Watch(instance)
    assert watch.look() == "nothing to tell"
    # A person may edit a cursor in the web interface.
    for cursor in ("", "not JSON", "[]", '{"x": 1}', "7"):
        watch.cursor = cursor
        assert watch.look() == "nothing to tell"
        assert json.loads(watch.cursor)["after"] > 0


# Waiting GPUs.


def waiting(seconds: float, of: float = 1000.0) -> dict[str, Any]:
    return {
        "devices": "NVIDIA L40S",
        "limited_by": "read",
        "seconds_busy_compute": of - seconds,
        "seconds_waiting_compute": seconds,
    }


def test_waiting_gpus_are_told_once_a_release(instance: dg.DagsterInstance, webhook: Slack) -> None:
    watch = Watch(instance)
    embed(instance, 1, figures=waiting(500))
    embed(instance, 2, figures=waiting(290, of=299))
    embed(instance, 3, figures={})
    assert watch.look() == "nothing to tell"
    embed(instance, 4, figures=waiting(510))
    embed(instance, 5, figures=waiting(900))
    assert watch.look() == f"told: GPUs of tiny {RELEASE} wait 51% of their time"
    embed(instance, 6, figures=waiting(900))
    assert watch.look() == "nothing to tell"
    (text,) = webhook.texts
    assert "Shard 4 on NVIDIA L40S: in 1,000 s, the GPUs computed for 490 s and waited for 510 s." in text
    assert "The stage `read` sets the pace" in text
    embed(instance, 6, release="older", figures=waiting(900))
    assert watch.look() == "told: GPUs of tiny older wait 90% of their time"


def test_the_bound_is_the_deployments(instance: dg.DagsterInstance, webhook: Slack) -> None:
    watch = Watch(instance, idle=0.95)
    embed(instance, 4, figures=waiting(940))
    assert watch.look() == "nothing to tell"


def ask(instance: dg.DagsterInstance, question: str) -> None:
    """Report what the asset `approval` reports when a release waits."""
    key, metadata = dg.AssetKey(["tiny", APPROVAL]), titled({"waits_for_approval": question})
    instance.report_runless_asset_event(dg.AssetObservation(key, partition=RELEASE, metadata=metadata))


# A channel that is down.


def test_what_is_not_delivered_is_tried_again(instance: dg.DagsterInstance, webhook: Slack) -> None:
    watch = Watch(instance)
    failed = embed(instance, 1, error=ValueError("x")).run_id
    webhook.status = 500
    report = watch.look()
    assert report == "not delivered, and tried again in 60 s: Slack did not take the message: HTTP 500"
    assert ALERTED_TAG not in instance.get_run_by_id(failed).tags  # type: ignore[union-attr]
    embed(instance, 4, figures=waiting(900))
    webhook.status = 200
    told = [f"1 shard of tiny {RELEASE} failed", f"GPUs of tiny {RELEASE} wait 90% of their time"]
    assert watch.look() == "; ".join(f"told: {one}" for one in told)
    assert watch.look() == "nothing to tell"
    assert len(webhook.texts) == 2


def test_an_event_that_is_not_delivered_is_tried_again(instance: dg.DagsterInstance, webhook: Slack) -> None:
    watch = Watch(instance)
    embed(instance, 4, figures=waiting(900))
    webhook.status = 500
    assert watch.look().startswith("not delivered")
    webhook.status = 200
    assert watch.look() == f"told: GPUs of tiny {RELEASE} wait 90% of their time"


def test_messages_that_do_not_fit_follow_later(
    instance: dg.DagsterInstance, webhook: Slack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "MOST_MESSAGES", 2)
    watch = Watch(instance)
    embed(instance, 1, error=ValueError("x"))
    for number in range(4):
        ask(instance, f"question {number}")
    assert [watch.look().count("told: ") for _ in range(4)] == [2, 2, 1, 0]
    assert [text.rpartition("\n")[2] for text in webhook.texts[1:]] == [f"question {number}" for number in range(4)]


def test_no_event_is_lost_behind_a_full_page(
    instance: dg.DagsterInstance, webhook: Slack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "PAGE", 1)
    watch = Watch(instance)
    for name in SETS:
        for release in (RELEASE, "older"):
            embed(instance, 4, name=name, release=release, figures=waiting(900))
    while watch.look() != "nothing to tell":
        pass
    assert len(set(webhook.texts)) == len(webhook.texts) == 4


def test_to_sns(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with topic() as sns:
        monkeypatch.setenv("AWS_ENDPOINT_URL", sns.endpoint)
        watch = Watch(instance, sns.arn)
        embed(instance, 7, error=ValueError("x"))
        watch.look()
        ((subject, text),) = sns.received()
        assert subject == f"1 shard of tiny {RELEASE} failed"
        assert "ValueError: x" in text
        watch.look()
        assert sns.received() == []


# In a deployment.


def definitions(project: Project, channel: str = WEBHOOK) -> dg.Definitions:
    census, store = census_resource(project.env), store_resource(project.env)
    return build_definitions(load_sets(project.folder / "sets"), census, store, alerts=channel)


def test_a_release_over_its_budget_is_told(project: Project, instance: dg.DagsterInstance, webhook: Slack) -> None:
    """The set's own assets ask for the approval."""
    nodes = {"gpus": 0, "gpu_type": "L40S", "usd_per_gpu_hour": 1e9, "fleet_gpus": 4}
    tiny(project, cells=40, shards=2, placement=nodes, auto_start={"budget": 1})
    defs = definitions(project)
    job = defs.resolve_implicit_global_asset_job_def()
    watch = Watch(instance)
    for asset in ("obs_id_plan", APPROVAL):
        done = job.execute_in_process(
            partition_key=RELEASE,
            asset_selection=[dg.AssetKey(["tiny", asset])],
            instance=instance,
            tags={CONDITION_TAG: "true"},
        )
        assert done.success
    assert watch.look() == f"told: tiny {RELEASE} waits for your approval"
    (text,) = webhook.texts
    assert f"census-tf-dagster approve tiny {RELEASE}" in text
    assert watch.look() == "nothing to tell"


def test_there_is_a_sensor_only_with_a_channel(project: Project) -> None:
    tiny(project, cells=40, shards=2)
    assert ALERTS not in {one.name for one in definitions(project, "").sensors or ()}
    (sensor,) = [one for one in definitions(project).sensors or () if one.name == ALERTS]
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
