"""Releases run by themselves, within limits: a real daemon and webserver beside a directory played over HTTP."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.runs import fetch_runs, materializations
from census_tf_dagster.operate.sets import find_set
from tests.builders import tiny
from tests.deployment import Operator, running_locally, until
from tests.release_directory import DirectoryServer, directory_server, entry
from tests.support import RELEASE, Project, read_array

CELLS = 60
EARLIER = "2025-01-30"
AUTOMATIC = {"free": "on", "cheap": {"budget": 1e6}, "dear": {"budget": 1.0}}
NODES = {"gpus": 0, "gpu_type": "L40S", "usd_per_gpu_hour": 1e9, "fleet_gpus": 4}
"""At this price a few thousand tokens cost some thousand dollars, by the rate that is assumed of such a GPU."""
SHARDS = 2

TICKS = """query Ticks($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) {
    __typename
    ... on Sensor { sensorState { ticks(limit: 50) { tickId status skipReason requestedAssetMaterializationCount } } }
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
    of = find_set(Deployment.at(operator.url), "free")
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
    of = find_set(Deployment.at(operator.url), "free")
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


def looks_done(operator: Operator, sensor: str, more: int = 1) -> None:
    """Wait until a sensor has looked again as often."""
    before = ended_ticks(operator, sensor)
    until(lambda: ended_ticks(operator, sensor) >= before + more, f"{more} more looks of {sensor}")


def status(operator: Operator, name: str) -> dict[str, Any]:
    done = operator.command("status", name, RELEASE, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any]
    (found,) = json.loads(done.stdout)["releases"]
    return found


def runs_of(operator: Operator, name: str) -> Counter[str]:
    """How often each asset and partition of a set ran; a run may hold several assets."""
    deployment = Deployment.at(operator.url)
    return Counter(f"{run.asset} {run.partition}" for run in fetch_runs(deployment, find_set(deployment, name), {}))


ONCE = Counter(
    [
        f"obs_id_plan {RELEASE}",
        f"approval {RELEASE}",
        *(f"shard_embeddings {RELEASE}|{shard}" for shard in range(SHARDS)),
        f"embeddings_array {RELEASE}",
    ]
)


@dataclass
class Story:
    """What happened by itself, and what a person did."""

    operator: Operator
    server: DirectoryServer
    waiting: dict[str, Any]
    waiting_runs: Counter[str]
    approved: Any
    after_replanning: dict[str, Counter[str]]
    launched: tuple[int, str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with directory_server() as server:
        folder = tmp_path_factory.mktemp("auto")
        project = Project(folder, {"CENSUS_TF_CENSUS": "public", "CENSUS_TF_CENSUS_DIRECTORY": server.url})
        tiny(project, cells=CELLS, megabatch_size=CELLS, shards=SHARDS)
        for name, rule in AUTOMATIC.items():
            placement = {} if name == "free" else {"placement": NODES}
            project.add_set(name, organism="homo_sapiens", shards=SHARDS, auto_start=rule, **placement)
        project.add_set("asked", organism="homo_sapiens", shards=SHARDS, auto_start={"budget": 1.0}, placement=NODES)
        # There before anything looks: for `launch`.
        server.lists(r2025_01_30=entry(EARLIER, str(project.census)))
        assert project.command("release", "add", EARLIER).returncode == 0
        with running_locally(project, daemon=True) as operator:
            for sensor in ("auto_start", "census_releases"):
                until(lambda sensor=sensor: ended_ticks(operator, sensor), f"the first look of {sensor}")
            server.lists(
                r2025_01_30=entry(EARLIER, str(project.census)), r2025_11_08=entry(RELEASE, str(project.census))
            )
            click(operator, "look_for_census_releases")
            until(lambda: RELEASE in find_set(Deployment.at(operator.url), "free").releases, "the release's partition")
            until(
                lambda: all(status(operator, name)["array"] == "done" for name in ("free", "cheap")),
                "arrays by themselves",
            )
            until(lambda: "waits" in str(status(operator, "dear")["approved"]).replace("wait ", "waits "), "a question")
            until(lambda: status(operator, "asked")["approved"] is not None, "another question")
            # An approval that ended without one is not tried again at each look.
            looks_done(operator, "auto_start", 2)
            waiting, waiting_runs = status(operator, "dear"), runs_of(operator, "dear")
            approved = operator.command("approve", "dear", RELEASE)
            launched = operator.begin("launched", "launch", "asked", RELEASE)
            until(lambda: status(operator, "dear")["array"] == "done", "the array after the approval")
            ended = launched.end()
            for name in ("free", "dear"):
                click(operator, "__ASSET_JOB", [name, "obs_id_plan"], RELEASE)
            until(
                lambda: all(runs_of(operator, name)[f"obs_id_plan {RELEASE}"] == 2 for name in ("free", "dear")),
                "plans",
            )
            until(lambda: status(operator, "free")["plan"] == status(operator, "dear")["plan"] == "done", "made plans")
            looks_done(operator, "auto_start", 3)
            yield Story(
                operator=operator,
                server=server,
                waiting=waiting,
                waiting_runs=waiting_runs,
                approved=approved,
                after_replanning={name: runs_of(operator, name) for name in ("free", "cheap", "dear", "asked", "tiny")},
                launched=ended,
            )


def at_least(runs: Counter[str]) -> Counter[str]:
    """Those of the four assets: others may stand between plan and array."""
    return Counter({key: n for key, n in runs.items() if key in ONCE})


def test_a_new_release_runs_by_itself_once(story: Story, tmp_path: Path) -> None:
    assert at_least(story.after_replanning["cheap"]) == ONCE
    for name in ("free", "cheap"):
        folder = story.operator.project.folder / "store" / name / RELEASE
        (array,) = folder.glob("*/embeddings")
        assert len(read_array(array, tmp_path).ids) == CELLS
    assert status(story.operator, "free")["proved"] is True


def test_a_plan_made_again_does_not_spend_gpu_time_again(story: Story) -> None:
    runs = story.after_replanning["free"]
    assert runs[f"obs_id_plan {RELEASE}"] == 2
    assert [runs[f"shard_embeddings {RELEASE}|{shard}"] for shard in range(SHARDS)] == [1] * SHARDS
    assert runs[f"embeddings_array {RELEASE}"] == 1
    runs = story.after_replanning["dear"]
    assert [runs[f"shard_embeddings {RELEASE}|{shard}"] for shard in range(SHARDS)] == [1] * SHARDS


def test_above_the_budget_shards_wait(story: Story) -> None:
    assert story.waiting["plan"] == "done"
    assert story.waiting["approval"] == "missing"
    assert story.waiting["shard_counts"]["missing"] == SHARDS
    assert at_least(story.waiting_runs) == Counter([f"obs_id_plan {RELEASE}", f"approval {RELEASE}"])
    asked = story.waiting["approved"]
    assert asked.startswith(f"The shards of dear {RELEASE} wait for your approval: it costs ")
    assert "USD above the budget of 1.00 USD a release" in asked
    assert "ASSUMED: 25% of the arithmetic that a L40S can do" in asked
    assert f"census_tf_dagster approve dear {RELEASE}" in asked


def test_an_approval_lets_them_go_on(story: Story) -> None:
    assert (story.approved.returncode, story.approved.stderr) == (0, "")
    assert "tokens to compute" in story.approved.stdout
    after = status(story.operator, "dear")
    assert (after["array"], after["proved"], after["approval"]) == ("done", True, "done")
    deployment = Deployment.at(story.operator.url)
    given = materializations(deployment, find_set(deployment, "dear"), "approval", [RELEASE])[RELEASE]
    assert ", from " in given.texts["approved_by"]
    assert given.texts["plan"]
    assert given.figures["cost_usd"] > 1


def test_launch_approves_and_nothing_runs_twice(story: Story) -> None:
    code, said = story.launched
    assert code == 0, said
    runs = story.after_replanning["asked"]
    # The plan, and the approval that was asked for, came by themselves; the launch did all four.
    assert runs[f"obs_id_plan {RELEASE}"] == runs[f"approval {RELEASE}"] == 2
    assert [runs[f"shard_embeddings {RELEASE}|{shard}"] for shard in range(SHARDS)] == [1] * SHARDS
    assert runs[f"embeddings_array {RELEASE}"] == 1


def test_off_and_earlier_releases_are_left_alone(story: Story) -> None:
    assert not story.after_replanning["tiny"]
    assert not [key for runs in story.after_replanning.values() for key in runs if EARLIER in key]


def test_the_daemon_adds_a_release_once_also_over_restarts(story: Story) -> None:
    operator = story.operator
    of = find_set(Deployment.at(operator.url), "free")
    assert of.releases == (EARLIER, RELEASE)
    (first, *_) = ticks(operator, "census_releases")
    assert (first["status"], first["skipReason"]) == ("SKIPPED", "nothing new")
    operator.stop("dagster-daemon")
    operator.serve("dagster-daemon")
    until(operator.answers, "the daemon again")
    looks_done(operator, "auto_start", 2)
    assert find_set(Deployment.at(operator.url), "free").releases == (EARLIER, RELEASE)
    assert at_least(runs_of(operator, "cheap")) == ONCE
