"""New releases are found: a local HTTP server is the directory; the sensor and the schedule's job read it."""

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from cellxgene_census import _release_directory

from census_tf_dagster.census.directory import PUBLIC_DIRECTORY, ListedRelease, parse_directory, read_directory
from census_tf_dagster.config.cost import utc_now
from census_tf_dagster.errors import DirectoryError, UserError
from census_tf_dagster.orchestration.resources import CensusResource
from census_tf_dagster.orchestration.sensors.release_watch import RELEASES_NAME, Kinds, build_release_watch, read_kinds
from tests.support.project import Project
from tests.support.release_directory import DirectoryServer, directory_server, entry, retracted

pytestmark = pytest.mark.takes(35)

PLAN = dg.AssetKey(["tiny", "obs_id_plan"])
OLD, NEW = "2025-01-30", "2025-11-08"


@pytest.fixture
def server() -> Iterator[DirectoryServer]:
    with directory_server() as state:
        yield state


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance that can be opened again with its stored state."""
    with dg.DagsterInstance.local_temp(str(tmp_path)) as opened:
        yield opened


def evaluate(server: DirectoryServer, instance: dg.DagsterInstance, kinds: Kinds = "lts") -> dg.SensorResult:
    """Evaluate the sensor, and do what the daemon does with its answer."""
    (sensor,) = build_release_watch(kinds, [PLAN]).sensors or ()
    assert isinstance(sensor, dg.SensorDefinition)
    census = CensusResource(directory=server.url)
    with dg.build_sensor_context(instance=instance, resources={"census": census}) as context:
        result = sensor(context)
    assert isinstance(result, dg.SensorResult)
    for request in result.dynamic_partitions_requests or ():
        instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
    for event in result.asset_events or ():
        instance.report_runless_asset_event(event)
    return result


def reason(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None
    return str(result.skip_reason.skip_message)


def releases(instance: dg.DagsterInstance) -> list[str]:
    return list(instance.get_dynamic_partitions(RELEASES_NAME))


def weekly(days_ago: int) -> str:
    return (utc_now() - timedelta(days=days_ago)).date().isoformat()


def test_the_last_long_term_release_is_added_once(server: DirectoryServer, instance: dg.DagsterInstance) -> None:
    server.lists(stable=NEW, latest="2025-11-24", V5=NEW, r2025_11_08=entry(NEW), r2025_01_30=entry(OLD))
    first = evaluate(server, instance)
    assert reason(first) == (
        f"older releases, not added automatically (use `release add NAME`): {OLD}; "
        f"release {NEW} (long-term, built {NEW}) is new and was added"
    )
    assert releases(instance) == [NEW]
    again = evaluate(server, instance)
    assert (reason(again), again.dynamic_partitions_requests) == ("nothing new", [])


def test_a_release_that_somebody_removed_stays_away(
    server: DirectoryServer, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    server.lists(r2025_11_08=entry(NEW))
    evaluate(server, instance)
    evaluate(server, instance)
    instance.delete_dynamic_partition(RELEASES_NAME, NEW)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as restarted:
        assert reason(evaluate(server, restarted)) == "nothing new"
        assert releases(restarted) == []
        server.lists(r2025_11_08=entry(NEW), r2026_05_11=entry("2026-05-11"))
        evaluate(server, restarted)
        assert releases(restarted) == ["2026-05-11"]


def test_what_is_older_than_a_release_that_is_there_is_not_added(
    server: DirectoryServer, instance: dg.DagsterInstance
) -> None:
    instance.add_dynamic_partitions(RELEASES_NAME, [NEW])
    server.lists(r2025_11_08=entry(NEW), r2025_01_30=entry(OLD))
    assert f"older releases, not added automatically (use `release add NAME`): {OLD}" in reason(
        evaluate(server, instance)
    )
    assert releases(instance) == [NEW]
    assert reason(evaluate(server, instance)) == "nothing new"


def test_an_evaluation_that_broke_off_loses_nothing(server: DirectoryServer, instance: dg.DagsterInstance) -> None:
    server.lists(r2025_11_08=entry(NEW))
    (sensor,) = build_release_watch("lts", [PLAN]).sensors or ()
    assert isinstance(sensor, dg.SensorDefinition)
    census = CensusResource(directory=server.url)
    with dg.build_sensor_context(instance=instance, resources={"census": census}) as context:
        sensor(context)  # Its answer never reaches the daemon.
    evaluate(server, instance)
    assert releases(instance) == [NEW]


def test_an_outage_is_a_skip_with_its_cause(server: DirectoryServer, instance: dg.DagsterInstance) -> None:
    server.status = 503
    said = reason(evaluate(server, instance))
    assert said.startswith(
        f"the Census release directory cannot be reached at {server.url}: HTTPError: 503 Server Error"
    )
    nobody = DirectoryServer(port=9)
    assert "Connection refused" in reason(evaluate(nobody, instance))
    server.silent = True
    until = time.monotonic() + 60
    with pytest.raises(DirectoryError, match=r"cannot be reached at http://.*: no answer in 5 s"):
        read_directory(server.url, patience=5)
    assert time.monotonic() < until
    assert releases(instance) == []
    server.silent, server.status = False, 200
    server.lists(r2025_11_08=entry(NEW))
    evaluate(server, instance)
    assert releases(instance) == [NEW]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "it is not JSON"),
        (b"[]", "its JSON is a list"),
        (b"{}", "It lists: nothing"),
    ],
)
def test_a_malformed_answer_is_a_skip_with_its_reason(
    server: DirectoryServer, instance: dg.DagsterInstance, body: bytes, message: str
) -> None:
    server.body = body
    said = reason(evaluate(server, instance))
    assert "malformed: " in said
    assert message in said
    assert releases(instance) == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"stable": entry(NEW)}, "it lists no release that is named by its day. It lists: stable"),
        ({NEW: {"release_build": NEW, "flags": {"lts": True}}}, f"{NEW}: soma: Field required"),
        ({NEW: entry(NEW) | {"release_build": 7}}, "release_build: Input should be a valid string"),
        ({NEW: entry(NEW) | {"release_build": "2025-13-08"}}, "month must be in 1..12"),
        ({NEW: entry(NEW) | {"flags": {"lts": "yes"}}}, "flags.lts: Input should be a valid boolean"),
        ({NEW: retracted(NEW) | {"retraction": "yes"}}, "retraction: Input should be a valid dictionary"),
    ],
)
def test_entries_are_checked(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(DirectoryError) as caught:
        parse_directory(entries)
    assert message in str(caught.value)


def test_aliases_that_name_each_other_do_not_hold_anyone_up(server: DirectoryServer) -> None:
    server.lists(r2025_11_08=entry(NEW), r2025_11_01="2025-11-02", r2025_11_02="2025-11-01", a="b", b="a")
    assert [found.name for found in read_directory(server.url, patience=5).releases] == [NEW]


def test_a_server_that_sends_a_byte_now_and_then(server: DirectoryServer) -> None:
    server.lists(r2025_11_08=entry(NEW))
    server.pause = 0.2
    until = time.monotonic() + 30
    with pytest.raises(DirectoryError, match="no answer in 2 s"):
        read_directory(server.url, patience=2)
    assert time.monotonic() < until


def test_an_endless_answer(server: DirectoryServer) -> None:
    server.body = b" " * 17 * 2**20
    with pytest.raises(DirectoryError, match="it has more than 16,777,216 bytes"):
        read_directory(server.url)


def test_the_address_is_that_of_the_censuss_own_package() -> None:
    assert PUBLIC_DIRECTORY == _release_directory.CELL_CENSUS_RELEASE_DIRECTORY_URL


def test_a_malformed_entry_is_told_and_the_others_count(server: DirectoryServer, instance: dg.DagsterInstance) -> None:
    server.lists(r2026_05_11={"release_build": "2026-05-11"}, r2025_11_08=entry(NEW))
    assert "malformed entry: 2026-05-11: soma: Field required" in reason(evaluate(server, instance))
    assert releases(instance) == [NEW]


def test_a_retracted_release_is_never_added(server: DirectoryServer, instance: dg.DagsterInstance) -> None:
    server.lists(r2025_11_08=retracted(NEW), r2025_01_30=entry(OLD))
    assert (
        f"WARNING: release {NEW} (long-term) is not added: the release was retracted on 2025-12-01; wrong counts; "
        "replaced by 2025-12-08"
    ) in reason(evaluate(server, instance))
    assert releases(instance) == [OLD]


def test_a_release_that_is_retracted_after_it_was_added_warns(
    server: DirectoryServer, instance: dg.DagsterInstance
) -> None:
    server.lists(r2025_11_08=entry(NEW))
    evaluate(server, instance)
    server.lists(r2025_11_08=retracted(NEW))
    for _ in range(2):
        said = reason(evaluate(server, instance))
        assert said.startswith(f"WARNING: the added release {NEW} was retracted on 2025-12-01; wrong counts")
    # On the asset's own page as well, and only once.
    (record,) = instance.fetch_observations(PLAN, limit=10).records
    observed = record.asset_observation
    assert observed is not None
    assert observed.partition == NEW
    assert observed.description == (
        "WARNING: the release was retracted on 2025-12-01; wrong counts; replaced by 2025-12-08"
    )


def planned(instance: dg.DagsterInstance, days: float | str, partition: str = OLD) -> None:
    """Store a plan that says how long the fleet needs."""
    metadata = {"Days with the fleet": days}
    instance.report_runless_asset_event(dg.AssetMaterialization(PLAN, partition=partition, metadata=metadata))


def test_weekly_releases_only_by_choice(server: DirectoryServer, instance: dg.DagsterInstance) -> None:
    name = weekly(3)
    server.lists(r2025_11_08=entry(NEW), latest=name, **{f"r{name}": entry(name, lts=False)})
    evaluate(server, instance, "lts")
    assert releases(instance) == [NEW]
    evaluate(server, instance, "weekly")
    assert releases(instance) == [NEW, name]
    # A weekly one is in no long-term release's way.
    server.lists(r2025_11_08=entry(NEW), **{f"r{name}": entry(name, lts=False), f"r{weekly(4)}": entry(weekly(4))})
    evaluate(server, instance, "weekly")
    assert releases(instance) == [NEW, name, weekly(4)]


def test_a_weekly_release_that_is_deleted_before_the_finish_is_refused_with_both_dates(
    server: DirectoryServer, instance: dg.DagsterInstance
) -> None:
    name = weekly(10)
    gone = ListedRelease(name, date.fromisoformat(name), False, None, "").deleted_from
    assert gone is not None
    left = (datetime.combine(gone, datetime.min.time(), UTC) - utc_now()).total_seconds() / 86400
    server.lists(**{f"r{name}": entry(name, lts=False)})
    planned(instance, left + 2)
    planned(instance, 0.0)  # Planned again when its cells were there: that says nothing of the next release.
    finish = (utc_now() + timedelta(days=left + 2)).date()
    assert reason(evaluate(server, instance, "weekly")) == (
        f"WARNING: release {name} (weekly) is not added: the weekly release may be deleted from {gone}, and the work "
        f"would end on {finish}"
    )
    assert releases(instance) == []
    # A faster fleet has the next plan done in time.
    planned(instance, left - 2, partition=NEW)
    evaluate(server, instance, "weekly")
    assert releases(instance) == [name]


def test_long_term_releases_stay(server: DirectoryServer, instance: dg.DagsterInstance) -> None:
    server.lists(r2025_11_08=entry(NEW))
    planned(instance, 400.0)
    evaluate(server, instance)
    assert releases(instance) == [NEW]


def test_weekly_releases_stay_for_a_month() -> None:
    days = {"2025-01-31": date(2025, 2, 28), "2025-12-05": date(2026, 1, 5), "2024-01-30": date(2024, 2, 29)}
    for built, gone in days.items():
        assert ListedRelease(built, date.fromisoformat(built), False, None, "").deleted_from == gone


def run_job(server: DirectoryServer, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    defs = dg.Definitions.merge(
        build_release_watch("lts", [PLAN]),
        dg.Definitions(resources={"census": CensusResource(directory=server.url)}),
    )
    job = defs.resolve_job_def("look_for_census_releases")
    return job.execute_in_process(instance=instance, raise_on_error=False)


def test_the_schedule_looks_in_the_same_way(server: DirectoryServer, instance: dg.DagsterInstance) -> None:
    watch = build_release_watch("lts", [PLAN])
    (schedule,) = watch.schedules or ()
    assert isinstance(schedule, dg.ScheduleDefinition)
    assert (schedule.job_name, schedule.default_status) == (
        "look_for_census_releases",
        dg.DefaultScheduleStatus.STOPPED,
    )
    server.lists(r2025_11_08=entry(NEW))
    assert run_job(server, instance).success
    assert run_job(server, instance).success
    assert releases(instance) == [NEW]
    assert reason(evaluate(server, instance)) == "nothing new"
    server.lists(r2025_11_08=retracted(NEW))
    assert run_job(server, instance).success
    assert len(instance.fetch_observations(PLAN, limit=10).records) == 1
    server.status = 500
    assert not run_job(server, instance).success


def test_a_census_of_ones_own_has_no_directory(instance: dg.DagsterInstance) -> None:
    (sensor,) = build_release_watch("lts", [PLAN]).sensors or ()
    assert isinstance(sensor, dg.SensorDefinition)
    census = CensusResource(location="s3://mine/{release}/soma")
    with dg.build_sensor_context(instance=instance, resources={"census": census}) as context:
        result: Any = sensor(context)
    assert reason(result).startswith("the releases of s3://mine/{release}/soma are in no directory. Add each with")


def test_a_release_name_means_what_the_directory_says(server: DirectoryServer) -> None:
    server.lists(stable=NEW, r2025_11_08=entry(NEW, "s3://there/soma/"), r2025_01_30=retracted(OLD))
    census = CensusResource(directory=server.url)
    assert census.uri(NEW) == "s3://there/soma"
    # What was embedded of a release that was retracted since can still be checked.
    assert census.uri(OLD)
    for name in ("stable", "1999-01-01"):
        with pytest.raises(UserError, match=f"'{name}' is not in the public Census directory; expected .*{NEW}"):
            census.uri(name)
    with pytest.raises(UserError, match=r"address is 'file:///x'; expected http\(s\)://HOST"):
        CensusResource(directory="file:///x").uri(NEW)
    with pytest.raises(UserError, match="CENSUS_TF_RELEASES is 'all'; expected lts, or weekly"):
        read_kinds("all")


def test_a_release_is_read_in_the_region_that_the_directory_names(server: DirectoryServer) -> None:
    """As cellxgene_census does: bucket and region belong together, whatever the deployment's region is."""
    abroad, silent = entry(NEW, "s3://there/soma/"), entry(OLD)
    abroad["soma"]["s3_region"] = "eu-central-1"
    del silent["soma"]["s3_region"]
    server.lists(r2025_11_08=abroad, r2025_01_30=silent)
    census = CensusResource(directory=server.url, s3_region="us-east-2")
    for name, region in ((NEW, "eu-central-1"), (OLD, "us-east-2")):
        _, storage = census.place(name)
        assert storage.s3.region == storage.soma_context.tiledb_config["vfs.s3.region"] == region


def test_a_retracted_release_is_not_added_by_hand_either(server: DirectoryServer, project: Project) -> None:
    project.env |= {"CENSUS_TF_CENSUS": "public", "CENSUS_TF_CENSUS_DIRECTORY": server.url}
    server.lists(r2025_11_08=entry(NEW), r2025_01_30=retracted(OLD))
    refused = project.command("release", "add", OLD)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"error: release {OLD} was retracted on 2025-12-01; wrong counts; replaced by 2025-12-08" in refused.stderr
    assert project.command("release", "add", NEW).returncode == 0
    assert project.command("release", "list").stdout.split() == [NEW]
