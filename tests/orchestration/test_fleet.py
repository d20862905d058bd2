"""Every way to start a run places it, and a fleet that loses workers still ends with the right array.

deploy/ecs/dagster.yaml on a real PostgreSQL, with a real webserver and daemon; in front of moto's ECS a double that
runs what is launched, each command in processes of its own. The set `tiny` is done for real; `gpu` and `auto` need a
GPU, so their runs are only looked at, but for one that fails for want of it.
"""

import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from census_tf_dagster.config.dagster_names import LAUNCH_TAG
from census_tf_dagster.operate.backfills import LaunchScope, fetch, start
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import find_set
from census_tf_dagster.operate.runs import materializations
from census_tf_dagster.orchestration.asset_support import RUN_IS_OVER
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from tests.support.builders import tiny
from tests.support.deployment import materialize, until
from tests.support.ecs_deployment import CAP, EcsDeployment, ecs_deployment, on_cpu, on_gpu_node
from tests.support.ecs_double import Task
from tests.support.postgres import PASSWORD
from tests.support.project import BOUND, RELEASE, Project, read_array, relative_errors

pytestmark = pytest.mark.takes(240)

CELLS, SHARDS = 480, 4
FALSELY_LOST = 1
STRIKES = {0: None, FALSELY_LOST: signal.SIGSTOP, 2: signal.SIGTERM}
"""What happens to the first worker of a shard: its spot node is taken back (None), or it gets a signal. The frozen one
is declared lost, and thaws once another works on its shard. SIGTERM is how ECS stops a task when someone asks."""
OVERRIDES_LIMIT = 8192
"""In characters; a limit of ECS."""

RUNS = """{ runsOrError(limit: 1000) { ... on Runs { results {
  runId status creationTime endTime assetSelection { path } tags { key value }
} } } }"""
FAILURES = """query Failures($run: ID!) { logsForRun(runId: $run) {
  ... on EventConnection { events { __typename ... on RunFailureEvent { timestamp } } }
} }"""
REPORT = """mutation Report($params: ReportRunlessAssetEventsParams!) {
  reportRunlessAssetEvents(eventParams: $params) { __typename ... on Error { message } }
}"""
TERMINATE = """mutation Terminate($runIds: [String!]!) {
  terminateRuns(runIds: $runIds, terminatePolicy: MARK_AS_CANCELED_IMMEDIATELY) { __typename }
}"""


@dataclass
class Cluster:
    """The cluster's side of the story: nodes come, are lost, and seem to be lost."""

    on: EcsDeployment
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    struck: dict[int, Task] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def deployment(self) -> Deployment:
        return Deployment.at(self.on.operator.url)

    def runs(self) -> dict[str, dict[str, Any]]:
        """All runs by id, with set, asset, shard and tags."""
        found = {}
        for run in self.deployment.ask(RUNS)["runsOrError"]["results"]:
            tags = {tag["key"]: tag["value"] for tag in run["tags"]}
            # Those of a sensor or schedule with a target of its own are whole jobs: gpu's shards.
            # The plan and its approval may share a run; of two assets it is the last that names it.
            selected = sorted(one["path"] for one in run["assetSelection"] or ())
            name, asset = selected[-1] if selected else ("gpu", "shard_embeddings")
            partition = tags["dagster/partition"]
            found[run["runId"]] = run | {"set": name, "asset": asset, "partition": partition, "tags": tags}
        return found

    def look(self) -> None:
        """Give every new task a node, or end it if it would do nothing here."""
        self.known = self.runs()
        for task in list(self.on.ecs.tasks):
            if task.run_id in self.seen or task.run_id not in self.known:
                continue
            self.seen.add(task.run_id)
            run = self.known[task.run_id]
            if run["set"] == "tiny" or run["tags"].get("ecs/memory") == "61440":
                self.on.ecs.begin(task)
            else:
                self.deployment.ask(TERMINATE, runIds=[task.run_id])

    def strike(self) -> None:
        """Let the first workers of three shards be lost, each in its way, once they have committed something."""
        for task in list(self.on.ecs.tasks):
            run = self.known.get(task.run_id, {})
            if (run.get("set"), run.get("asset")) != ("tiny", "shard_embeddings") or b" cells/s, " not in _said(task):
                continue
            shard = int(run["partition"][-1])
            first = self.struck.setdefault(shard, task)
            if first is not task:
                if shard == FALSELY_LOST:
                    first.signal(signal.SIGCONT)
            elif shard in STRIKES and task.run_id not in self.done:
                self.done.add(task.run_id)
                strike = STRIKES[shard]
                if strike is None:
                    task.drain_node()
                    task.lose_node()
                else:
                    task.signal(strike)
                task.reported_lost = shard == FALSELY_LOST


def _said(task: Task) -> bytes:
    return task.output.read_bytes() if task.output.exists() else b""


def way_in(run: dict[str, Any]) -> str:
    """How a run was started, by the tags that Dagster gives it."""
    tags = run["tags"]
    if "dagster/retry_number" in tags:
        return "retry"
    if LAUNCH_TAG in tags and run["set"] == "gpu":
        return "launch"
    for key in ("dagster/sensor_name", "dagster/schedule_name"):
        if key in tags:
            return str(tags[key])
    return "backfill" if "dagster/backfill" in tags else "click"


ENDED = {"SUCCESS", "FAILURE", "CANCELED"}
WAYS = {"backfill", "click", "launch", "sensor", "schedule", "automation", "retry"}


@dataclass(frozen=True)
class Story:
    on: EcsDeployment
    cluster: Cluster
    runs: dict[str, dict[str, Any]]
    backfill: str
    moved: str

    def tasks(self) -> list[tuple[dict[str, Any], Task]]:
        """Every RunTask up to the end of the story, with its run."""
        return [(self.runs[task.run_id], task) for task in self.on.ecs.tasks if task.run_id in self.runs]

    def of(self, shard: int) -> list[dict[str, Any]]:
        """The runs of one of tiny's shards, first to last."""
        mine = [run for run, _ in self.tasks() if (run["set"], run["asset"]) == ("tiny", "shard_embeddings")]
        return [run for run in mine if run["partition"] == f"{RELEASE}|{shard}"]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    project = tiny(Project(tmp_path_factory.mktemp("fleet")), cells=CELLS, megabatch_size=1, placement={})
    project.add_set("gpu", organism="homo_sapiens", device="cuda")
    project.add_set("auto", organism="homo_sapiens", device="cuda", shards=1)
    project.add_set("same", organism="homo_sapiens", shards=1)
    with ecs_deployment(project) as on:
        cluster = Cluster(on)
        deployment = cluster.deployment
        work = LaunchScope(plan=True, shards=tuple(range(SHARDS)), array=True, recompute=False)
        of, gpu = find_set(deployment, "tiny"), find_set(deployment, "gpu")
        backfill = start(deployment, of, RELEASE, work)
        for name in ("gpu", "auto"):
            for asset in ("obs_id_plan", "approval"):
                params = {"eventType": "ASSET_MATERIALIZATION", "assetKey": {"path": [name, asset]}}
                answer = deployment.ask(REPORT, params=params | {"partitionKeys": [RELEASE]})
                expect(answer["reportRunlessAssetEvents"], "ReportRunlessAssetEventsSuccess", "report")
        launched = on.operator.begin("launch", "launch", "gpu", RELEASE, "--shards", "0", "--no-wait")
        materialize(deployment, gpu, 3)
        materialize(deployment, gpu, 3, **{"ecs/memory": "61440"})
        with pytest.raises(Exception, match="Expected tags that change sizes only") as moved:
            materialize(deployment, gpu, 2, **{"ecs/run_task_kwargs": '{"launchType": "FARGATE"}'})
        looked = 0.0

        def told() -> bool:
            nonlocal looked
            cluster.strike()
            if time.monotonic() - looked < 1:
                return False
            cluster.look()
            looked = time.monotonic()
            left = [run for run in cluster.known.values() if run["status"] not in ENDED]
            ways = {way_in(cluster.known[task.run_id]) for task in on.ecs.tasks if task.run_id in cluster.known}
            return not left and ways >= WAYS and not fetch(deployment, of, RELEASE, backfill).is_running

        until(told, "the backfill and every way in")
        assert launched.end()[0] == 0
        zombie = cluster.struck[FALSELY_LOST].process
        assert zombie is not None
        zombie.wait(timeout=120)
        yield Story(on, cluster, cluster.runs(), fetch(deployment, of, RELEASE, backfill).status, str(moved.value))


def test_every_shard_s_task_is_on_a_gpu_node_and_no_other_is(story: Story) -> None:
    assert story.backfill == "COMPLETED_SUCCESS"
    seen = set()
    for run, task in story.tasks():
        seen.add((way_in(run), run["asset"]))
        if run["asset"] == "shard_embeddings":
            call = json.loads(json.dumps(task.call))
            if run["tags"].get("ecs/memory") == "61440":
                call["overrides"]["containerOverrides"][0]["memory"] = 28672
            assert on_gpu_node(call), (run, task.call)
            assert not on_cpu(task.call)
        else:
            assert on_cpu(task.call), (run, task.call)
    assert seen == {(way, "shard_embeddings") for way in WAYS} | {
        ("backfill", "obs_id_plan"),
        ("backfill", "embeddings_array"),
    }


def test_a_run_s_own_tags_change_sizes_and_move_nothing(story: Story) -> None:
    (larger,) = [task for run, task in story.tasks() if run["tags"].get("ecs/memory") == "61440"]
    assert larger.container["memory"] == 61440
    assert "the run's own tag ecs/run_task_kwargs is " in story.moved
    (refused,) = [run for run in story.runs.values() if "FARGATE" in run["tags"].get("ecs/run_task_kwargs", "")]
    assert refused["status"] == "FAILURE"
    assert refused["runId"] not in {task.run_id for task in story.on.ecs.tasks}


def test_what_a_user_has_to_mend_is_not_retried(story: Story) -> None:
    (run,) = [run for run, _ in story.tasks() if run["tags"].get("ecs/memory") == "61440"]
    assert (run["status"], run["tags"]["dagster/will_retry"]) == ("FAILURE", "false")
    (task,) = [task for _, task in story.tasks() if task.run_id == run["runId"]]
    assert b"send the work to the deployment's GPU nodes" in _said(task)


def test_never_more_gpu_runs_than_the_cap(story: Story) -> None:
    ends = {run["runId"]: run["endTime"] for run in story.runs.values()}
    # The first of its ends: where Dagster loses the retry, a failure is reported again.
    for struck in story.cluster.struck.values():
        events = story.cluster.deployment.ask(FAILURES, run=struck.run_id)["logsForRun"]["events"]
        failures = [float(one["timestamp"]) / 1000 for one in events if one["__typename"] == "RunFailureEvent"]
        ends[struck.run_id] = min([ends[struck.run_id], *failures])
    spans = [(task.at, ends[task.run_id]) for run, task in story.tasks() if run["asset"] == "shard_embeddings"]
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == CAP


@pytest.mark.parametrize("shard", STRIKES)
def test_a_lost_worker_s_shard_is_retried_and_resumed(story: Story, shard: int) -> None:
    first, second = story.runs[story.cluster.struck[shard].run_id], story.of(shard)[-1]
    assert first["tags"]["dagster/will_retry"] == "true"
    assert second["status"] == "SUCCESS"
    assert int(second["tags"]["dagster/retry_number"]) >= 1
    assert first["status"] == "FAILURE"
    deployment = story.cluster.deployment
    done = materializations(deployment, find_set(deployment, "tiny"), "shard_embeddings", [f"{RELEASE}|{shard}"])
    last = done[f"{RELEASE}|{shard}"]
    assert last.run_id == second["runId"]
    assert 0 < last.numbers["cells_computed"] < last.numbers["cells"]


def test_the_falsely_lost_worker_stops_after_a_megabatch(story: Story) -> None:
    task = story.cluster.struck[FALSELY_LOST]
    assert task.process is not None
    assert task.process.returncode == RUN_IS_OVER
    assert f"Run {task.run_id} has ended (FAILURE) without this worker".encode() in _said(task)


def test_the_array_is_right_though_two_wrote_one_shard(story: Story, tmp_path: Any) -> None:
    project = story.on.operator.project
    array = read_array(project.array("tiny"), tmp_path)
    with project.context("same") as context:
        make_plan(context)
        embed_shard(context, 0)
        finish_array(context)
    same = read_array(project.array("same"), tmp_path)
    assert array.ids.tolist() == same.ids.tolist() == list(range(CELLS))
    assert array.stored_values == same.stored_values
    assert relative_errors(array.values, same.values).max() <= BOUND
    # A megabatch has one cell. The worker that was declared lost wrote the one that it was computing, or none.
    fragments = list((project.array("tiny") / "__fragments").iterdir())
    assert CELLS <= len(fragments) <= CELLS + 2


def test_commands_fit_and_hold_no_secret(story: Story) -> None:
    for run, task in story.tasks():
        assert len(json.dumps(task.call["overrides"])) < OVERRIDES_LIMIT
        assert PASSWORD not in json.dumps([task.call, run])
        assert PASSWORD.encode() not in _said(task)


def test_what_runs_print_is_on_s3(story: Story) -> None:
    s3 = boto3.client(
        "s3", endpoint_url=story.on.ecs.moto, aws_access_key_id="test", aws_secret_access_key="test", region_name="x"
    )
    keys = [one["Key"] for one in s3.list_objects_v2(Bucket="dagster-logs")["Contents"]]
    for run in (one for one in story.runs.values() if one["set"] == "tiny" and one["status"] == "SUCCESS"):
        assert any(key.startswith(f"dagster/storage/{run['runId']}/") for key in keys)


def test_no_server_loads_the_data_plane(story: Story) -> None:
    servers = [psutil.Process(server.pid) for server in story.on.operator.servers.values()]
    processes = [one for server in servers for one in (server, *server.children(recursive=True))]
    # Webserver and daemon, and a code server of each.
    assert len(processes) >= 4
    for process in processes:
        loaded = {part for mapped in process.memory_maps() for part in Path(mapped.path).parts}
        assert not loaded & {"torch", "tiledb", "tiledbsoma", "numba", "llvmlite", "h5py", "pandas", "scipy"}
