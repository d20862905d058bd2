"""A Kubernetes double: the API as far as Dagster's launcher calls it, the Job controller and the scheduler.

It accepts every Job, and starts its pod only on a node that takes it. No container runs: a pod on a node is Running
until a test ends it. Pages below are those of kubernetes.io/docs/concepts; `tasks` and `reference` are beside it.
"""

import json
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from kubernetes.utils.quantity import parse_quantity

from census_tf_dagster.config.node_types import (
    DAEMON_SETS_MIB,
    DAEMON_SETS_MILLICORES,
    NODE_TYPES,
    allocatable_on_eks,
)
from tests.support.http_server import QuietHandler, served

Object = dict[str, Any]


@dataclass
class Node:
    """A node, and what the pods on it may request in all.

    The scheduler looks at Allocatable, which is less than the node's capacity
    (tasks/administer-cluster/reserve-compute-resources).
    """

    name: str
    allocatable: Mapping[str, str]
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Mapping[str, str], ...] = ()


def eks_node(instance_type: str, labels: Mapping[str, str], name: str = "gpu-1") -> Node:
    """A GPU node of EKS with 100 GiB of disk and the taint of deploy/k8s/README.md, as its DaemonSets leave it."""
    node = NODE_TYPES[instance_type]
    room = allocatable_on_eks(node)
    allocatable = {
        "cpu": f"{room.millicores - DAEMON_SETS_MILLICORES}m",
        "memory": f"{room.memory_mib - DAEMON_SETS_MIB}Mi",
        "ephemeral-storage": "89Gi",
        "nvidia.com/gpu": str(node.gpus),
    }
    return Node(name, allocatable, labels, ({"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},))


def requests_of(pod: Object) -> dict[str, Decimal]:
    """What the pod's containers request together.

    A limit without a request is the request, too (configuration/manage-resources-containers, "Requests and limits").
    GPUs are always given that way.
    """
    total: dict[str, Decimal] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources", {})
        for name, value in {**resources.get("limits", {}), **resources.get("requests", {})}.items():
            total[name] = total.get(name, Decimal(0)) + parse_quantity(value)
    return total


def tolerates(toleration: Mapping[str, str], taint: Mapping[str, str]) -> bool:
    """Tell whether a toleration matches a taint (scheduling-eviction/taint-and-toleration, "Concepts").

    An empty effect matches all effects, an empty key with `Exists` all keys, and the default operator is `Equal`.
    """
    if toleration.get("effect") and toleration["effect"] != taint["effect"]:
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key", "") in ("", taint["key"])
    return toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", "")


def refuses(node: Node, pod: Object, others: list[Object]) -> str | None:
    """Why a node does not take a pod beside the others on it, in the scheduler's words; None when it does."""
    # A node needs each of the labels (scheduling-eviction/assign-pod-node, "nodeSelector").
    if not pod["spec"].get("nodeSelector", {}).items() <= node.labels.items():
        return "node(s) didn't match Pod's node affinity/selector"
    # PreferNoSchedule is only a preference.
    hard = [taint for taint in node.taints if taint["effect"] in ("NoSchedule", "NoExecute")]
    if any(not any(tolerates(one, taint) for one in pod["spec"].get("tolerations", [])) for taint in hard):
        return "node(s) had untolerated taint(s)"
    # The sum of the requests counts, not what the pods use (configuration/manage-resources-containers, "How Pods with
    # resource requests are scheduled"). A node without an extended resource has none of it.
    for name, wanted in requests_of(pod).items():
        taken = sum((requests_of(one).get(name, Decimal(0)) for one in others), Decimal(0))
        if taken + wanted > parse_quantity(node.allocatable.get(name, "0")):
            return f"Insufficient {name}"
    return None


@dataclass
class KubernetesDouble:
    """The state of the cluster."""

    nodes: list[Node] = field(default_factory=list)
    jobs: dict[str, Object] = field(default_factory=dict)
    pods: dict[str, Object] = field(default_factory=dict)
    created: list[Object] = field(default_factory=list)
    """Each Job as it was posted."""
    started: list[str] = field(default_factory=list)
    """The Jobs whose container was started, in order."""
    resets: float = 0
    """How many of the next requests end with a reset connection, as while an API server is replaced."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add_node(self, node: Node) -> None:
        with self.lock:
            self.nodes.append(node)
            self._schedule()

    def end(self, job: str, *, succeeded: bool) -> None:
        """End the container of a Job, whose status then says so (workloads/controllers/job)."""
        with self.lock:
            (pod,) = [one for one in self.pods.values() if one["metadata"]["labels"]["job-name"] == job]
            pod["status"]["phase"] = "Succeeded" if succeeded else "Failed"
            condition = {"type": "Complete" if succeeded else "Failed", "status": "True"}
            self.jobs[job]["status"] |= {"active": 0, "conditions": [condition]}
            self.jobs[job]["status"]["succeeded" if succeeded else "failed"] = 1
            self._schedule()

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Object) -> tuple[int, Object]:
        kind, _, name = path.partition("/namespaces/")[2].partition("/")[2].partition("/")
        name = name.removesuffix("/status")
        with self.lock:
            found = {"jobs": self.jobs, "pods": self.pods, "events": self._events()}[kind]
            if method == "POST":
                return self._create_job(body)
            if not name:
                return 200, {"items": [one for one in found.values() if _selected(one, query)]}
            if name not in found:
                return 404, {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            if method == "DELETE":
                self._delete(kind, name, query.get("propagationPolicy") or body.get("propagationPolicy"))
                return 200, {"kind": "Status", "status": "Success"}
            return 200, found[name]

    def _create_job(self, body: Object) -> tuple[int, Object]:
        name = body["metadata"]["name"]
        if name in self.jobs:
            return 409, {"kind": "Status", "status": "Failure", "reason": "AlreadyExists", "code": 409}
        self.created.append(body)
        # Active counts pending pods, too (reference/kubernetes-api/workload-resources/job-v1).
        self.jobs[name] = {**body, "status": {"active": 1, "startTime": datetime.now(UTC).isoformat()}}
        template = body["spec"]["template"]
        labels = template.get("metadata", {}).get("labels", {}) | {"job-name": name}
        metadata = {"name": f"{name}-x7k2p", "labels": labels}
        self.pods[metadata["name"]] = {
            "metadata": metadata,
            "spec": dict(template["spec"]),
            "status": {"phase": "Pending"},
        }
        self._schedule()
        return 201, self.jobs[name]

    def _delete(self, kind: str, name: str, policy: str | None) -> None:
        """Delete an object, and its pods unless they are orphaned (architecture/garbage-collection).

        Orphan is the API's default for Jobs; kubectl's is Background. Source: `DefaultGarbageCollectionPolicy` in
        pkg/registry/batch/job/strategy.go of kubernetes/kubernetes. Grace periods end at once here.
        """
        if kind == "jobs":
            del self.jobs[name]
            gone = [key for key, one in self.pods.items() if one["metadata"]["labels"]["job-name"] == name]
            for key in gone if policy in ("Background", "Foreground") else []:
                del self.pods[key]
        else:
            del self.pods[name]
        self._schedule()

    def _schedule(self) -> None:
        """Put each pod that waits on the first node that takes it. The others stay Pending, for as long as it takes."""
        for pod in self.pods.values():
            if pod["status"]["phase"] != "Pending":
                continue
            why = []
            for node in self.nodes:
                on_it = [
                    one
                    for one in self.pods.values()
                    if one["spec"].get("nodeName") == node.name and one["status"]["phase"] == "Running"
                ]
                refusal = refuses(node, pod, on_it)
                if refusal is None:
                    pod["spec"]["nodeName"] = node.name
                    pod["status"] = {"phase": "Running"}
                    self.started.append(pod["metadata"]["labels"]["job-name"])
                    break
                why.append(refusal)
            else:
                said = f"0/{len(self.nodes)} nodes are available: {', '.join(why)}"
                pod["status"]["message"] = said

    def _events(self) -> dict[str, Object]:
        """A FailedScheduling event for each pod that waits (scheduling-eviction/kube-scheduler)."""
        return {
            name: {
                "metadata": {"name": name},
                "involvedObject": {"name": name},
                "type": "Warning",
                "reason": "FailedScheduling",
                "message": pod["status"].get("message", ""),
            }
            for name, pod in self.pods.items()
            if pod["status"]["phase"] == "Pending"
        }


def _selected(one: Object, query: Mapping[str, str]) -> bool:
    """Tell whether an object matches the label selector and the field selector of a list.

    A label selector has `key=value` or, for any value, `key` (overview/working-with-objects/labels).
    """
    labels = one["metadata"].get("labels", {})
    for wanted in filter(None, query.get("labelSelector", "").split(",")):
        key, equals, value = wanted.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    names = {"metadata.name": one["metadata"]["name"], "involvedObject.name": one.get("involvedObject", {}).get("name")}
    fields = [wanted.partition("=") for wanted in filter(None, query.get("fieldSelector", "").split(","))]
    return all(names[key] == value for key, _, value in fields)


@contextmanager
def serving(double: KubernetesDouble) -> Iterator[str]:
    """Serve the double, and yield its address."""

    class Handler(QuietHandler):
        def respond(self) -> None:
            with double.lock:
                reset = double.resets > 0
                double.resets -= reset
            if reset:
                # Closed without lingering, the connection ends with RST.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = double.answer(self.command, url.path, query, json.loads(body or b"{}"))
            self.reply(status, "application/json", json.dumps(content).encode())

        do_GET = do_POST = do_DELETE = respond

    with served(Handler) as port:
        yield f"http://127.0.0.1:{port}"


def outside_of_the_cluster(folder: Path, address: str) -> dict[str, Any]:
    """Write a kubeconfig, and return the launcher's configuration that uses it in place of a pod's account."""
    path = folder / "kube"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "double",
                "clusters": [{"name": "double", "cluster": {"server": address}}],
                "users": [{"name": "double", "user": {}}],
                "contexts": [{"name": "double", "context": {"cluster": "double", "user": "double"}}],
            }
        )
    )
    return {"load_incluster_config": False, "kubeconfig_file": str(path)}
