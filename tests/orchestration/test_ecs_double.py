"""The ECS double loses a node as AWS does, and Dagster's launcher sees it."""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import pytest
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, RunLauncher, WorkerStatus
from dagster_aws.ecs import EcsRunLauncher

from census_tf_dagster.config.placement import Placement
from census_tf_dagster.orchestration.sensors import lost_runs
from census_tf_dagster.orchestration.sensors.lost_runs import START_FAULT, TASK_TAG, ask_for_nodes_again
from census_tf_dagster.run_coordinator import place
from tests.support.ecs_double import TARGET, EcsDouble, Task
from tests.support.launching import job
from tests.support.placements import PLACEMENT

REPORTS_SIGTERM = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
print("begun", flush=True)
time.sleep(60)
"""


def waiting_task(folder: Path) -> EcsDouble:
    """A double with one task that waits for a node."""
    (folder / "reports_sigterm.py").write_text(REPORTS_SIGTERM)
    double = EcsDouble(moto="http://127.0.0.1:9", env={"PYTHONPATH": str(folder)}, folder=folder)
    command = {"name": "run", "command": ["reports_sigterm"]}
    call = {"tags": [{"key": "dagster/run_id", "value": "r"}], "overrides": {"containerOverrides": [command]}}
    double._accept(call, {"taskArn": "task-1", "containerInstanceArn": "node-1"})
    return double


def begun_task(folder: Path) -> tuple[EcsDouble, Task]:
    """A double with one running task, whose command prints the signals that it gets."""
    double = waiting_task(folder)
    (task,) = double.tasks
    double.begin(task)
    deadline = time.monotonic() + 30
    while task.output.read_text() != "begun\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return double, task


def described(double: EcsDouble) -> dict[str, Any]:
    headers = {"X-Amz-Target": f"{TARGET}DescribeTasks"}
    status, content = double.answer(headers, "/", json.dumps({"tasks": ["task-1"]}).encode())
    assert status == 200
    (task,) = json.loads(content)["tasks"]
    found: dict[str, Any] = task
    return found


def test_a_drained_node_goes_on_with_a_run_and_then_vanishes_with_it(tmp_path: Path) -> None:
    double, task = begun_task(tmp_path)
    try:
        task.drain_node()
        time.sleep(0.2)
        # Draining stops tasks of services only.
        assert task.output.read_text() == "begun\n"
        assert described(double)["lastStatus"] == "RUNNING"
        task.lose_node()
        assert task.process is not None
        task.process.wait(timeout=10)
        assert task.output.read_text() == "begun\n"
    finally:
        double.end()
    lost = described(double)
    assert lost["lastStatus"] == "STOPPED"
    assert "exitCode" not in lost["containers"][0]


def health(double: EcsDouble) -> CheckRunHealthResult:
    """What Dagster's launcher makes of the double's answer."""
    launcher = mock.Mock(spec=EcsRunLauncher)
    launcher._get_run_tags.return_value = mock.Mock(arn="task-1", cluster="census-tf")
    launcher.ecs = mock.Mock()
    launcher.logs = mock.Mock()
    launcher.ecs.describe_tasks.return_value = {"tasks": [described(double)] if double.tasks else []}
    launcher.include_cluster_info_in_failure_messages = True
    with mock.patch("dagster_aws.ecs.launcher.EcsContainerContext"):
        return EcsRunLauncher.check_run_worker_health(launcher, mock.Mock(tags={}))


def test_dagster_takes_a_task_that_vanished_for_a_failed_worker(tmp_path: Path) -> None:
    double, task = begun_task(tmp_path)
    task.lose_node()
    seen = health(double)
    double.end()
    assert seen.status == WorkerStatus.FAILED


class Launcher(RunLauncher):
    """Dagster's ECS launcher, as far as the sensor uses it: health by the double's answer, launches are counted."""

    def __init__(self, double: EcsDouble) -> None:
        super().__init__()
        self.double = double
        self.launched: list[str] = []
        self.providers: list[str] = []
        self.refuses = False

    def launch_run(self, context: LaunchRunContext) -> None:
        if self.refuses:
            raise RuntimeError("at most 100 tasks may be provisioning")
        self.launched.append(context.dagster_run.run_id)
        kwargs = json.loads(context.dagster_run.tags.get("ecs/run_task_kwargs", "{}"))
        self.providers += [one["capacityProvider"] for one in kwargs.get("capacityProviderStrategy", ())]

    def terminate(self, run_id: str) -> bool:
        raise NotImplementedError(run_id)

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        return health(self.double)


@contextmanager
def launched_by(launcher: RunLauncher) -> Iterator[dg.DagsterInstance]:
    with (
        dg.DagsterInstance.ephemeral() as instance,
        mock.patch.object(type(instance), "run_launcher", new_callable=mock.PropertyMock, return_value=launcher),
    ):
        yield instance


@pytest.mark.parametrize(
    ("reason", "asked_again", "status"),
    [
        ("", False, "STARTING"),
        # The first is what ECS says of a lack of capacity; the others are faults that no waiting repairs.
        ("Capacity is unavailable at this time. Please try again later or in a different availability zone", True, ""),
        ("CannotPullContainerError: pull image manifest has been retried 1 time(s): not found", False, "FAILURE"),
        ("ResourceInitializationError: unable to pull secrets or registry auth", False, "FAILURE"),
    ],
)
def test_a_task_for_which_no_node_came_is_replaced(tmp_path: Path, reason: str, asked_again: bool, status: str) -> None:
    double = waiting_task(tmp_path)
    if reason:
        double.tasks[0].stop_before_start(reason)
    launcher = Launcher(double)
    with launched_by(launcher) as instance:
        starting = dg.DagsterRunStatus.STARTING
        run = instance.create_run_for_job(job, status=starting, tags={TASK_TAG: "task-1"})
        elsewhere = instance.create_run_for_job(job, status=starting)
        said = list(ask_for_nodes_again(instance))
        found = instance.get_run_by_id(run.run_id)
        assert found is not None
        assert found.status.value == (status or "STARTING")
        assert launcher.launched == ([run.run_id] if asked_again else [])
        assert len(said) == bool(reason)
        assert elsewhere.run_id not in "".join(said)


def test_a_run_that_got_no_spot_node_twice_asks_for_an_on_demand_one(tmp_path: Path) -> None:
    double = waiting_task(tmp_path)
    double.tasks[0].stop_before_start("Capacity is unavailable at this time")
    launcher = Launcher(double)
    moves = Placement.model_validate(PLACEMENT | {"on_demand_after": 2}).tags()
    tags = {TASK_TAG: "task-1", **place("ecs", {"shard": moves}, {})}
    with launched_by(launcher) as instance:
        run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING, tags=tags)
        # ECS may refuse new tasks for a while. No node was asked for then.
        launcher.refuses = True
        assert all("was refused" in line for _ in range(3) for line in ask_for_nodes_again(instance))
        launcher.refuses = False
        said = [line for _ in range(3) for line in ask_for_nodes_again(instance)]
        left = instance.get_run_by_id(run.run_id)
    assert launcher.providers == ["gpu-spot", "gpu-on-demand", "gpu-on-demand"]
    assert [line.partition("waits for ")[2] for line in said] == ["one", "an on-demand node", "one"]
    # If this node is lost, the retry inherits the tags and stays with on-demand nodes.
    assert left is not None
    again = place("ecs", {"shard": moves}, left.tags)
    assert "gpu-on-demand" in again["ecs/run_task_kwargs"]


def test_a_refused_task_leaves_the_others_their_turn(tmp_path: Path) -> None:
    double = waiting_task(tmp_path)
    double.tasks[0].stop_before_start("Capacity is unavailable at this time")
    launcher = Launcher(double)
    launcher.refuses = True
    with launched_by(launcher) as instance:
        for _ in range(2):
            instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING, tags={TASK_TAG: "task-1"})
        said = list(ask_for_nodes_again(instance))
    assert len(said) == 2
    assert all("a new one was refused (at most 100 tasks" in one for one in said)


@pytest.mark.parametrize("silent_for", [0.0, 3700.0])
def test_a_task_that_ecs_has_forgotten_is_replaced_after_an_hour(
    tmp_path: Path, silent_for: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    double = waiting_task(tmp_path)
    double.tasks.clear()
    launcher = Launcher(double)
    with launched_by(launcher) as instance:
        run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING, tags={TASK_TAG: "task-1"})
        monkeypatch.setattr(lost_runs, "FORGOTTEN_SECONDS", lost_runs.FORGOTTEN_SECONDS - silent_for)
        said = list(ask_for_nodes_again(instance))
    assert launcher.launched == ([run.run_id] if silent_for else [])
    assert len(said) == bool(silent_for)


def test_a_worker_that_ended_at_once_is_not_started_for_ever(tmp_path: Path) -> None:
    double, task = begun_task(tmp_path)
    task.signal(signal.SIGKILL)
    assert task.process is not None
    task.process.wait(timeout=10)
    assert START_FAULT.search(health(double).msg or "")
    double.end()
