"""An ECS double in front of moto: moto accepts each call, the double records RunTask and really runs the command.

What moto refuses (an unknown task definition, a launch type beside a capacity provider) never gets that far. A task is
PROVISIONING, as while ECS waits for a node, until a test begins it. Its node may be drained or lost: as on AWS, neither
sends a signal to a task that belongs to no service, and the containers of a lost node have no exit code
(docs.aws.amazon.com/AmazonECS/latest/developerguide/container-instance-draining.html, "standalone tasks").
"""

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.fork_server import ForkedProcess
from tests.support.http_server import QuietHandler, served

TARGET = "AmazonEC2ContainerServiceV20141113."
Call = dict[str, Any]


@dataclass
class Task:
    """One accepted RunTask."""

    call: Call
    answer: Call
    at: float
    """Seconds since 1970."""
    output: Path
    process: ForkedProcess | None = None
    reported_lost: bool = False
    node_lost: bool = False
    stopped_reason: str = ""
    """Why ECS stopped the task before its containers started."""

    @property
    def run_id(self) -> str:
        return next(tag["value"] for tag in self.call["tags"] if tag["key"] == "dagster/run_id")

    @property
    def container(self) -> Call:
        override: Call
        (override,) = self.call["overrides"]["containerOverrides"]
        return override

    @property
    def gpus(self) -> list[Call]:
        requirements: list[Call] = self.container.get("resourceRequirements", [])
        return requirements

    def signal(self, number: int) -> None:
        """Send a signal to the command and all its children."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def stop_before_start(self, reason: str) -> None:
        """Do what ECS does after 10 to 30 minutes without capacity, or when the containers cannot be made."""
        assert self.process is None, "this task has started"
        self.stopped_reason = reason

    def drain_node(self) -> None:
        """Do what the notice of a spot interruption does to a task without a service: nothing."""

    def lose_node(self) -> None:
        """End the task with its node, two minutes after that notice or without one."""
        self.node_lost = True
        self.signal(signal.SIGKILL)

    def described(self) -> Call:
        """The task in an answer of DescribeTasks."""
        code = self.process.poll() if self.process else None
        status = "RUNNING" if self.process else "PROVISIONING"
        if self.reported_lost or self.node_lost or self.stopped_reason or code is not None:
            status = "STOPPED"
        container = {"name": self.container["name"], "lastStatus": status}
        if code is not None and not self.node_lost:
            container["exitCode"] = 128 - code if code < 0 else code
        why = {"stopCode": "TaskFailedToStart", "stoppedReason": self.stopped_reason} if self.stopped_reason else {}
        return {**self.answer, "lastStatus": status, "containers": [container], **why}


@dataclass
class EcsDouble:
    """The state of the double."""

    moto: str
    env: Mapping[str, str]
    folder: Path
    tasks: list[Task] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, headers: Mapping[str, str], path: str, body: bytes) -> tuple[int, bytes]:
        action = headers.get("X-Amz-Target", "").removeprefix(TARGET)
        request: Call = json.loads(body) if action in ("RunTask", "DescribeTasks", "StopTask") else {}
        if action == "DescribeTasks":
            found = [task.described() for task in self.tasks if task.answer["taskArn"] in request["tasks"]]
            return 200, json.dumps({"tasks": found, "failures": []}).encode()
        status, content = self._moto(headers, path, body)
        if action == "RunTask" and status == 200:
            self._accept(request, json.loads(content)["tasks"][0])
        if action == "StopTask" and status == 200:
            (task,) = [one for one in self.tasks if one.answer["taskArn"] == request["task"]]
            if task.process and task.process.poll() is None:
                task.signal(signal.SIGTERM)
        return status, content

    def _moto(self, headers: Mapping[str, str], path: str, body: bytes) -> tuple[int, bytes]:
        kept = {name: headers[name] for name in headers if name.lower() not in ("host", "content-length")}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.moto + path, body, kept), timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _accept(self, call: Call, answer: Call) -> None:
        with self.lock:
            self.tasks.append(Task(call, answer, time.time(), self.folder / f"task-{len(self.tasks)}.out"))

    def begin(self, task: Task) -> None:
        """Run the command as `python -m`, as when a node has started."""
        module, *arguments = task.container["command"]
        with task.output.open("wb") as output:
            task.process = ForkedProcess(
                module,
                arguments,
                self.folder,
                self.env,
                stdout=output.fileno(),
                stderr=output.fileno(),
                new_session=True,
            )

    def end(self) -> None:
        for task in self.tasks:
            if task.process and task.process.poll() is None:
                task.signal(signal.SIGKILL)
                task.process.wait()


@contextmanager
def serving(double: EcsDouble) -> Iterator[str]:
    """Serve the double, and yield its address."""

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, content = double.answer(dict(self.headers), self.path, body)
            self.reply(status, "application/x-amz-json-1.1", content)

    try:
        with served(Handler) as port:
            yield f"http://127.0.0.1:{port}"
    finally:
        double.end()
