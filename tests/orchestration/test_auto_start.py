"""Automatic starts within a budget, with a real daemon, a real webserver and a local release directory."""

import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from census_tf_dagster import embed
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import find_set
from census_tf_dagster.operate.runs import QUEUED, RUNNING, Run, fetch_runs, materializations
from census_tf_dagster.operate.status import ReleaseStatus, release_statuses
from tests.support.builders import value_of
from tests.support.deployment import Operator, running_locally, until
from tests.support.project import RELEASE, Project, read_array
from tests.support.release_directory import directory_server, entry
from tests.support.releases import EARLIER, TwoReleases, two_releases, verify_earlier

pytestmark = pytest.mark.takes(420)

CELLS, REUSED = 220, 160
AUTOMATIC = {"cheap": {"budget": 1e6}, "dear": {"budget": 1.0}, "asked": {"budget": 1.0}}
"""The set `cheap` has an array of the earlier release and reuses its cells."""
NODES = {"gpus": 0, "gpu_type": "L40S", "usd_per_gpu_hour": 1e9, "fleet_gpus": 4}
"""At this price and the assumed rate of such a GPU, a few thousand tokens cost some thousand dollars."""
SHARDS = 2

TICKS = """query Ticks($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) {
    __typename
    ... on Sensor { sensorState { ticks(limit: 1000) { tickId status skipReason requestedAssetMaterializationCount } } }
  }
}"""

LAUNCH = """mutation Launch($executionParams: ExecutionParams!) {
  launchPipelineExecution(executionParams: $executionParams) {
    __typename
    ... on Error { message }
    ... on LaunchRunSuccess { run { runId } }
  }
}"""


def ticks(operator: Operator, sensor: str) -> list[dict[str, Any]]:
    of = find_set(Deployment.at(operator.url), "cheap")
    selector = {
        "repositoryLocationName": of.location,
        "repositoryName": "__repository__",
        "sensorName": sensor,
    }
    answer = Deployment.at(operator.url).ask(TICKS, selector=selector)["sensorOrError"]
    found: list[dict[str, Any]] = expect(answer, "Sensor", sensor)["sensorState"]["ticks"]
    return found


def click(operator: Operator, job: str, asset: list[str] | None = None, release: str = "") -> str:
    """Launch a job, or one partition of an asset, as the web interface does."""
    of = find_set(Deployment.at(operator.url), "cheap")
    selector: dict[str, Any] = {
        "repositoryLocationName": of.location,
        "repositoryName": "__repository__",
        "pipelineName": job,
    }
    if asset:
        selector |= {"assetSelection": [{"path": asset}], "assetCheckSelection": []}
    tags = [{"key": "dagster/partition", "value": release}] if release else []
    params = {"selector": selector, "mode": "default", "runConfigData": "{}", "executionMetadata": {"tags": tags}}
    answer = Deployment.at(operator.url).ask(LAUNCH, executionParams=params)["launchPipelineExecution"]
    run: str = expect(answer, "LaunchRunSuccess", job)["run"]["runId"]
    return run


def ended_ticks(operator: Operator, sensor: str) -> int:
    return len([tick for tick in ticks(operator, sensor) if tick["status"] != "STARTED"])


def looks_done(operator: Operator, *sensors: str) -> None:
    """Wait until each sensor has run twice more, because the first run may have begun before."""
    before = {sensor: ended_ticks(operator, sensor) for sensor in sensors}
    for sensor, looks in before.items():
        until(lambda sensor=sensor, looks=looks: ended_ticks(operator, sensor) >= looks + 2, f"two looks of {sensor}")


def status(operator: Operator, name: str) -> ReleaseStatus:
    """Return the status that `status` shows, without a process for each call."""
    deployment = Deployment.at(operator.url)
    (found,) = release_statuses(deployment, find_set(deployment, name), RELEASE)
    return found


def runs_of(operator: Operator, name: str) -> Counter[str]:
    """How often each asset and partition of a set ran; a run may hold several assets."""
    deployment = Deployment.at(operator.url)
    return Counter(f"{run.asset} {run.partition}" for run in fetch_runs(deployment, find_set(deployment, name), {}))


CELLS_OF = """query CellsOf($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {
  assetMaterializations { partition metadataEntries { label ... on IntMetadataEntry { intValue } } } } } }"""
FILE, CELLS_IN_FILE = "first.h5ad", 50


def cells_of_files(operator: Operator) -> dict[str, int]:
    """The cells of each file that has an array."""
    answer = Deployment.at(operator.url).ask(CELLS_OF, key={"path": ["lab", "embeddings_array"]})["assetNodeOrError"]
    return {
        event["partition"]: {one["label"]: one.get("intValue") for one in event["metadataEntries"]}["Cells"]
        for event in answer["assetMaterializations"]
    }


ONCE = Counter(
    [
        f"obs_id_plan {RELEASE}",
        f"approval {RELEASE}",
        *(
            f"{asset} {RELEASE}|{shard}"
            for asset in ("reused_embeddings", "shard_embeddings")
            for shard in range(SHARDS)
        ),
        f"embeddings_array {RELEASE}",
    ]
)


def run_status(operator: Operator, run: str) -> str:
    """The status of a run of any of the sets."""
    deployment = Deployment.at(operator.url)
    sets = [find_set(deployment, name) for name in AUTOMATIC]
    (found,) = {one.status for of in sets for one in fetch_runs(deployment, of, {"runIds": [run]})}
    return found


def active(operator: Operator) -> list[Run]:
    """Runs that wait or work."""
    deployment = Deployment.at(operator.url)
    wanted = {"statuses": sorted(QUEUED | RUNNING)}
    return [run for name in AUTOMATIC for run in fetch_runs(deployment, find_set(deployment, name), wanted)]


@dataclass
class Story:
    """The automatic actions and the actions of a person."""

    operator: Operator
    releases: TwoReleases
    waiting: ReleaseStatus
    waiting_runs: Counter[str]
    finished_runs: Counter[str]
    approved: subprocess.CompletedProcess[str]
    launched: tuple[int, str]
    in_the_end: dict[str, Counter[str]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with directory_server() as server:
        folder = tmp_path_factory.mktemp("auto")
        env = {"CENSUS_TF_CENSUS": "public", "CENSUS_TF_CENSUS_DIRECTORY": server.url}
        project = Project(folder, env)
        releases = two_releases(project, shards=SHARDS, megabatch_size=CELLS)
        for name, rule in AUTOMATIC.items():
            settings: dict[str, Any] = {"shards": SHARDS, "auto_start": rule, "placement": NODES}
            if name == "cheap":
                settings |= {"reuse": True, "gene_order": "vocabulary"}
            project.add_set(name, organism="homo_sapiens", **settings)
        project.add_file_set("lab", auto_start={"budget": 1e6}, placement=NODES)
        contents = releases.later
        (project.folder / "lab").mkdir()
        anndata.AnnData(
            contents.counts[:CELLS_IN_FILE],
            contents.cells[["assay"]].iloc[:CELLS_IN_FILE].astype(str).set_axis([f"{i}" for i in range(CELLS_IN_FILE)]),
            contents.genes[["feature_id"]].astype(str).set_axis(contents.genes["feature_id"].astype(str)),
        ).write_h5ad(project.folder / "lab" / FILE)
        # There before anything looks: for `launch`.
        earlier = {"r2025_01_30": entry(EARLIER, str(project.folder / "census" / EARLIER))}
        server.lists(**earlier)
        verify_earlier(releases, "cheap")
        assert project.command("release", "add", EARLIER).returncode == 0
        with running_locally(project, daemon=True) as operator:
            for sensor in (*(f"{name}_auto_start" for name in AUTOMATIC), "census_releases"):
                until(lambda sensor=sensor: ended_ticks(operator, sensor), f"the first look of {sensor}")
            server.lists(**earlier, r2025_11_08=entry(RELEASE, str(project.census)))
            click(operator, "look_for_census_releases")
            of = find_set(Deployment.at(operator.url), "cheap")
            until(lambda: RELEASE in find_set(Deployment.at(operator.url), of.name).releases, "the release's partition")
            until(lambda: status(operator, "cheap").array == "done", "an array by itself")
            for name in ("dear", "asked"):
                until(lambda name=name: status(operator, name).approved, f"what {name} asks")
            # An approval that ended without one is not tried again at each look.
            looks_done(operator, "dear_auto_start")
            waiting, waiting_runs = status(operator, "dear"), runs_of(operator, "dear")
            finished_runs = runs_of(operator, "cheap")
            approved = operator.command("approve", "dear", RELEASE)
            launched = operator.begin("launched", "launch", "asked", RELEASE)
            until(lambda: status(operator, "dear").array == "done", "the array after the approval")
            ended = launched.end()
            again = [click(operator, "__ASSET_JOB", [name, "obs_id_plan"], RELEASE) for name in ("cheap", "dear")]
            until(lambda: all(run_status(operator, run) == "SUCCESS" for run in again), "plans made again")
            looks_done(operator, *(f"{name}_auto_start" for name in AUTOMATIC))
            until(lambda: not active(operator), "the end of what that started")
            until(lambda: FILE in cells_of_files(operator), "the array of the file")
            yield Story(
                operator=operator,
                releases=releases,
                waiting=waiting,
                waiting_runs=waiting_runs,
                finished_runs=finished_runs,
                approved=approved,
                launched=ended,
                in_the_end={name: runs_of(operator, name) for name in (*AUTOMATIC, "reusing")},
            )


def test_a_new_release_runs_by_itself_once(story: Story, tmp_path: Path) -> None:
    assert story.finished_runs == ONCE
    array = read_array(story.operator.project.array("cheap"), tmp_path)
    assert (len(array.ids), array.stored_values) == (CELLS, array.values.size)
    assert status(story.operator, "cheap").verified is True


def test_only_its_new_cells_are_computed(story: Story, tmp_path: Path) -> None:
    deployment = Deployment.at(story.operator.url)
    of = find_set(deployment, "cheap")
    shards = [of.partition(RELEASE, shard) for shard in range(SHARDS)]
    counted = {
        figure: sum(one.numbers[figure] for one in materializations(deployment, of, asset, shards).values())
        for asset, figure in (("reused_embeddings", "cells_copied"), ("shard_embeddings", "cells_computed"))
    }
    assert counted == {"cells_copied": REUSED, "cells_computed": CELLS - REUSED}
    releases, unchanged = story.releases, story.releases.unchanged()
    place = {int(row): joinid for joinid, row in enumerate(releases.earlier.rows)}
    earlier = np.array([place[int(row)] for row in releases.later.rows[unchanged]])
    stored = read_array(story.operator.project.array("cheap"), tmp_path)
    assert np.array_equal(stored.values[unchanged], value_of(earlier, stored.shape[1]))


def test_a_plan_made_again_does_not_spend_gpu_time_again(story: Story) -> None:
    for name in ("cheap", "dear"):
        runs = story.in_the_end[name]
        assert runs[f"obs_id_plan {RELEASE}"] == 2
        assert [runs[f"shard_embeddings {RELEASE}|{shard}"] for shard in range(SHARDS)] == [1] * SHARDS
        assert runs[f"embeddings_array {RELEASE}"] == 1


def test_a_new_file_is_embedded_by_itself(story: Story, tmp_path: Path) -> None:
    operator = story.operator
    assert cells_of_files(operator) == {FILE: CELLS_IN_FILE}
    # Each asset has a run of its own, so that only the array's run occupies a GPU node.
    runs = {asset: n for (asset, partition), n in operator.runs().items() if partition == FILE}
    assert runs == {"lab/obs_id_plan": 1, "lab/approval": 1, "lab/embeddings_array": 1}
    project = operator.project
    with pytest.warns(UserWarning, match="have an assay that the checkpoint does not know"):
        ours = embed(project.folder / "lab" / FILE, project.checkpoint, precision="fp32", device="cpu")
    assert np.array_equal(read_array(project.array("lab", FILE), tmp_path).values, ours)
    asked = operator.command("status", "lab")
    assert asked.returncode == 1
    assert "lab is a set of files, and this command is for sets of releases (asked, cheap, dear" in asked.stderr


def test_above_the_budget_shards_wait(story: Story) -> None:
    assert story.waiting.plan == "done"
    assert story.waiting.approval == "missing"
    assert story.waiting.shards.missing == tuple(range(SHARDS))
    assert story.waiting_runs == Counter([f"obs_id_plan {RELEASE}", f"approval {RELEASE}"])
    asked = str(story.waiting.approved)
    assert asked.startswith(f"dear {RELEASE} waits for your approval: it costs ")
    assert "USD above the budget of 1.00 USD a release" in asked
    assert "ASSUMED: 25% of the peak arithmetic of the L40S" in asked
    assert f"census-tf-dagster approve dear {RELEASE}" in asked


def test_an_approval_lets_them_go_on(story: Story) -> None:
    assert (story.approved.returncode, story.approved.stderr) == (0, "")
    assert "tokens to compute" in story.approved.stdout
    after = status(story.operator, "dear")
    assert (after.array, after.verified, after.approval) == ("done", True, "done")
    deployment = Deployment.at(story.operator.url)
    given = materializations(deployment, find_set(deployment, "dear"), "approval", [RELEASE])[RELEASE]
    assert ", from " in given.texts["approved_by"]
    assert given.texts["plan"]
    assert given.figures["cost_usd"] > 1
    of = find_set(deployment, "dear")
    partitions = [of.partition(RELEASE, shard) for shard in range(SHARDS)]
    for paid in materializations(deployment, of, "shard_embeddings", partitions).values():
        per_hour = NODES["usd_per_gpu_hour"]
        assert paid.figures["usd"] == pytest.approx(paid.figures["device_seconds"] / 3600 * per_hour, rel=0.2)


def test_launch_approves_and_nothing_runs_twice(story: Story) -> None:
    code, said = story.launched
    assert code == 0, said
    assert "plan done; shards 2/2 done" in said
    shown = story.operator.command("status", "asked", RELEASE).stdout
    assert "  gate    approved: by a person, in Dagster, plan " in shown
    runs = story.in_the_end["asked"]
    # The plan, and the approval that was asked for, came by themselves; the launch did all four.
    assert runs[f"obs_id_plan {RELEASE}"] == runs[f"approval {RELEASE}"] == 2
    assert [runs[f"shard_embeddings {RELEASE}|{shard}"] for shard in range(SHARDS)] == [1] * SHARDS
    assert runs[f"embeddings_array {RELEASE}"] == 1


def test_off_and_earlier_releases_are_left_alone(story: Story) -> None:
    assert not story.in_the_end["reusing"]
    assert not [key for runs in story.in_the_end.values() for key in runs if EARLIER in key]


def test_the_daemon_adds_a_release_once_also_over_restarts(story: Story) -> None:
    operator = story.operator
    of = find_set(Deployment.at(operator.url), "cheap")
    assert of.releases == (EARLIER, RELEASE)
    (first, *_) = ticks(operator, "census_releases")
    assert (first["status"], first["skipReason"]) == ("SKIPPED", "nothing new")
    operator.stop("dagster-daemon")
    operator.serve("dagster-daemon")
    until(operator.answers, "the daemon again")
    before = runs_of(operator, "cheap")
    looks_done(operator, "cheap_auto_start")
    assert find_set(Deployment.at(operator.url), "cheap").releases == (EARLIER, RELEASE)
    assert runs_of(operator, "cheap") == before
