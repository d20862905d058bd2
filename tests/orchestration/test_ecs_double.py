"""The ECS double loses a node as AWS does, and Dagster's launcher sees it."""

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

from dagster._core.launcher.base import WorkerStatus
from dagster_aws.ecs import EcsRunLauncher

from tests.support.ecs_double import TARGET, EcsDouble, Task

REPORTS_SIGTERM = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: print("SIGTERM", flush=True))
print("begun", flush=True)
time.sleep(60)
"""


def begun_task(folder: Path) -> tuple[EcsDouble, Task]:
    """A double with one running task, whose command prints the signals that it gets."""
    double = EcsDouble(moto="http://127.0.0.1:9", env={}, folder=folder)
    command = {"name": "run", "command": ["/usr/bin/env", "python3", "-c", REPORTS_SIGTERM]}
    call = {"tags": [{"key": "dagster/run_id", "value": "r"}], "overrides": {"containerOverrides": [command]}}
    double._accept(call, {"taskArn": "task-1", "containerInstanceArn": "node-1"})
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


def test_dagster_takes_a_task_that_vanished_for_a_failed_worker(tmp_path: Path) -> None:
    double, task = begun_task(tmp_path)
    task.lose_node()
    launcher = mock.Mock(spec=EcsRunLauncher)
    launcher._get_run_tags.return_value = mock.Mock(arn="task-1", cluster="census-tf")
    launcher.ecs = mock.Mock()
    launcher.logs = mock.Mock()
    launcher.ecs.describe_tasks.return_value = {"tasks": [described(double)]}
    launcher.include_cluster_info_in_failure_messages = True
    with mock.patch("dagster_aws.ecs.launcher.EcsContainerContext"):
        seen = EcsRunLauncher.check_run_worker_health(launcher, mock.Mock(tags={}))
    double.end()
    assert seen.status == WorkerStatus.FAILED
