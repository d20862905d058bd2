"""deploy/k8s: the values fit the chart, the objects fit the API's schema, and both fit each other."""

import re
from typing import Any

import dagster as dg
import jsonschema
import kubernetes_validate
import pytest
import yaml

from census_tf_dagster.config.placement import read_placement
from census_tf_dagster.definitions import load_sets, load_settings
from tests.support import helm_chart
from tests.support.k8s_deployment import FOLDER, NAMESPACE, environment, read_objects, read_values
from tests.support.project import REPOSITORY, Project

VERSIONS = ("1.31", "1.37")


def test_the_chart_takes_the_values() -> None:
    helm_chart.check(read_values())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dagsterDaemon", "runCordinator"), {}),
        (("dagsterDaemon", "runCoordinator", "type"), "PlacingRunCoordinator"),
        (("runLauncher", "config", "k8sRunLauncher", "env_config_maps"), []),
        (("retention", "autoMaterialize", "purgeAfterDays"), {"skipped": 7}),
        (("concurrencies",), {}),
    ],
    ids=lambda one: ".".join(one) if isinstance(one, tuple) else "",
)
def test_the_chart_refuses_what_is_misspelt(path: tuple[str, ...], value: Any) -> None:
    values = read_values()
    inside = values
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        helm_chart.check(values)


def test_both_platforms_have_one_instance() -> None:
    """Everything that does not depend on the platform is the same on ECS and on Kubernetes."""
    ecs = yaml.safe_load((REPOSITORY / "deploy" / "ecs" / "dagster.yaml").read_text())
    kubernetes = helm_chart.instance_of(read_values())
    assert kubernetes["run_coordinator"]["config"].pop("platform") == "kubernetes"
    assert ecs["run_coordinator"]["config"].pop("platform") == "ecs"
    for part in ("run_coordinator", "concurrency", "backfills", "run_retries", "telemetry"):
        assert kubernetes[part] == ecs[part], part
    # What the chart adds says what Dagster does anyway.
    assert kubernetes["run_monitoring"] == ecs["run_monitoring"] | {"free_slots_after_run_end_seconds": 0}
    assert kubernetes["compute_logs"]["config"] == ecs["compute_logs"]["config"] | {"verify": True}
    for kind in ("schedule", "sensor"):
        assert kubernetes["retention"][kind] == ecs["retention"][kind]
    database = ecs["storage"]["postgres"]["postgres_db"]
    assert kubernetes["run_storage"]["config"]["postgres_db"]["scheme"] == database["scheme"]
    assert kubernetes["run_storage"]["config"]["postgres_db"]["password"] == database["password"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_objects_are_valid(version: str) -> None:
    objects = read_objects()
    assert [one["kind"] for one in objects] == [
        "ConfigMap",
        "ServiceAccount",
        "ServiceAccount",
        "Role",
        "RoleBinding",
        "NetworkPolicy",
    ]
    canary = yaml.safe_load((FOLDER / "canary.yaml").read_text())
    for one in [*objects, canary]:
        kubernetes_validate.validate(one, version, strict=True)
        assert one["metadata"]["namespace"] == NAMESPACE


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("server", ["dagsterWebserver", "dagsterDaemon", "dagster-user-deployments"])
def test_the_servers_pods_are_valid(version: str, server: str) -> None:
    """Everything that the chart copies into a pod is allowed in a pod."""
    values = read_values()[server]
    values = values.get("deployments", [values])[0]
    image = values["image"]
    container = {
        "name": "dagster",
        "image": f"{image['repository']}:{image['tag']}",
        "imagePullPolicy": image["pullPolicy"],
        "resources": values["resources"],
        "envFrom": [{"configMapRef": one} for one in values["envConfigMaps"]],
    }
    if "readinessProbe" in values:
        container["readinessProbe"] = values["readinessProbe"]
        assert values["readinessProbe"]["httpGet"]["port"] == values["service"]["port"]
    spec = {"containers": [container], "securityContext": values["podSecurityContext"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
    kubernetes_validate.validate(pod, version, strict=True)
    assert values["podSecurityContext"]["runAsUser"] == 1000


def test_accounts() -> None:
    objects, values = read_objects(), read_values()
    accounts = {one["metadata"]["name"] for one in objects if one["kind"] == "ServiceAccount"}
    runs = values["runLauncher"]["config"]["k8sRunLauncher"]["runK8sConfig"]["podSpecConfig"]["service_account_name"]
    assert accounts == {values["global"]["serviceAccountName"], runs}
    # The chart makes no account and no role of its own.
    assert (values["rbacEnabled"], values["serviceAccount"]["create"]) == (False, False)
    (binding,) = [one for one in objects if one["kind"] == "RoleBinding"]
    assert [one["name"] for one in binding["subjects"]] == [values["global"]["serviceAccountName"]]
    assert binding["roleRef"]["name"] in [one["metadata"]["name"] for one in objects if one["kind"] == "Role"]


def may(verb: str, resource: str) -> bool:
    (role,) = [one for one in read_objects() if one["kind"] == "Role"]
    return any(resource in rule["resources"] and verb in rule["verbs"] for rule in role["rules"])


def test_the_role_is_what_the_launcher_calls() -> None:
    """The role allows each API call of dagster_k8s's client, and no other call that changes something."""
    import dagster_k8s.client

    text = (REPOSITORY / str(dagster_k8s.client.__file__)).read_text()
    calls = set(re.findall(r"_api\.((?:create|delete|list|read)_namespaced_\w+)\(", text))
    verbs = {"create": "create", "delete": "delete", "list": "list", "read": "get"}
    resources = {
        "job": "jobs",
        "job_status": "jobs/status",
        "pod": "pods",
        "pod_log": "pods/log",
        "event": "events",
    }
    assert len(calls) >= 8
    for call in calls:
        verb, _, resource = call.partition("_namespaced_")
        assert may(verbs[verb], resources[resource]), call
    for verb, resource in (("create", "pods"), ("patch", "jobs"), ("get", "secrets"), ("create", "pods/exec")):
        assert not may(verb, resource)


def test_the_web_interface_is_not_open() -> None:
    assert read_values()["dagsterWebserver"]["service"]["type"] == "ClusterIP"
    assert "ingress" not in read_values()
    (policy,) = [one["spec"] for one in read_objects() if one["kind"] == "NetworkPolicy"]
    assert policy["podSelector"] == {}
    # From pods of the same namespace only.
    assert policy["ingress"] == [{"from": [{"podSelector": {}}]}]


def test_every_server_and_run_has_the_environment() -> None:
    values = read_values()
    servers = [values["dagsterWebserver"], values["dagsterDaemon"], *values["dagster-user-deployments"]["deployments"]]
    for one in [*servers, values["runLauncher"]["config"]["k8sRunLauncher"]]:
        assert one["envConfigMaps"] == [{"name": "census-tf-env"}]
    wanted = re.findall(r"'env': '(\w+)'", str(helm_chart.instance_of(values)))
    assert set(wanted) - {"DAGSTER_PG_PASSWORD"} <= environment().keys()


def test_the_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = read_placement(FOLDER)
    assert placement is not None
    assert placement.kubernetes is not None
    assert placement.kubernetes.nodes.keys() == {"spot", "on_demand"}
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    settings = load_settings(REPOSITORY / "deploy" / "sets")
    assert all(one.checkpoint.startswith("s3://bucket/checkpoints/") for one in settings.values())


def test_sets_may_be_mounted_as_a_config_map(project: Project) -> None:
    """Kubernetes mounts files in a folder of another name, and links to it twice."""
    project.add_set("one", organism="homo_sapiens")
    mounted = project.folder / "mounted"
    (mounted / "..2026_11_25").mkdir(parents=True)
    (project.folder / "sets" / "one").rename(mounted / "..2026_11_25" / "one")
    (mounted / "..data").symlink_to("..2026_11_25")
    (mounted / "one").symlink_to("..data/one")
    loaded = load_sets(mounted).assets or []
    assert [key.path[0] for one in loaded if isinstance(one, dg.AssetsDefinition) for key in one.keys] == ["one"] * 4
    assert list(load_settings(mounted)) == ["one"]
