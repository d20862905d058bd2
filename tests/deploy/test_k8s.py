"""deploy/k8s: the values fit the chart, the objects fit the API's schema, and both fit each other."""

import json
import re
import subprocess
import textwrap
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import jsonschema
import kubernetes_validate
import pytest
import yaml
from dagster_k8s.models import k8s_model_from_dict
from kubernetes.client import ApiClient, V1PodTemplateSpec
from kubernetes.utils.quantity import parse_quantity

from census_tf_dagster.config.node_types import NODE_TYPES, Platform, shortfall
from census_tf_dagster.config.placement import read_placement
from census_tf_dagster.definitions import load_sets, load_settings
from tests.support import helm_chart
from tests.support.k8s_deployment import FOLDER, NAMESPACE, environment, read_objects, read_values
from tests.support.project import REPOSITORY, Project

VERSIONS = ("1.31", "1.37")
README = (FOLDER / "README.md").read_text()


def test_the_chart_takes_the_values() -> None:
    helm_chart.check(read_values())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dagsterDaemon", "runCordinator"), {}),
        (("dagsterDaemon", "runCoordinator", "type"), "PlacingRunCoordinator"),
        (("runLauncher", "config", "customRunLauncher", "env_config_maps"), []),
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
    # ECS stops a task that waits for a node, and the sensor lost_runs replaces it. On Kubernetes nothing looks at a pod
    # that cannot start before this time.
    timeouts = [one["run_monitoring"].pop("start_timeout_seconds") for one in (ecs, kubernetes)]
    assert timeouts == [86400, 3600]
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


def launcher_of(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run launcher."""
    config: dict[str, Any] = values["runLauncher"]["config"]["customRunLauncher"]["config"]
    return config


def test_the_launcher_has_the_names_of_the_chart() -> None:
    """The chart fills in none of them for a launcher of one's own.

    Its ConfigMap is ``{{ template "dagster.fullname" . }}-instance``, and the name of the chart is part of the full
    name unless the release's name contains it (templates/configmap-instance.yaml, templates/helpers/_helpers.tpl).
    """
    values = read_values()
    launcher = launcher_of(values)
    (release,) = re.findall(r"helm upgrade --install (\S+) dagster/dagster", README)
    assert "dagster" not in release
    assert launcher["instance_config_map"] == f"{release}-dagster-instance"
    assert launcher["job_namespace"] == NAMESPACE
    assert launcher["postgres_password_secret"] == values["global"]["postgresqlSecretName"]
    assert launcher["dagster_home"] == values["global"]["dagsterHome"]


def test_accounts() -> None:
    objects, values = read_objects(), read_values()
    accounts = {one["metadata"]["name"] for one in objects if one["kind"] == "ServiceAccount"}
    assert accounts == {values["global"]["serviceAccountName"], launcher_of(values)["service_account_name"]}
    # The chart makes no account and no role of its own.
    assert (values["rbacEnabled"], values["serviceAccount"]["create"]) == (False, False)
    (binding,) = [one for one in objects if one["kind"] == "RoleBinding"]
    assert [one["name"] for one in binding["subjects"]] == [values["global"]["serviceAccountName"]]
    assert binding["roleRef"]["name"] in [one["metadata"]["name"] for one in objects if one["kind"] == "Role"]


def may(verb: str, resource: str) -> bool:
    (role,) = [one for one in read_objects() if one["kind"] == "Role"]
    return any(resource in rule["resources"] and verb in rule["verbs"] for rule in role["rules"])


def test_the_role_is_what_the_launcher_calls() -> None:
    """The role allows each API call of dagster_k8s's client and of our launcher, and no other change."""
    import dagster_k8s.client

    import census_tf_dagster.orchestration.run_launcher

    modules = (dagster_k8s.client, census_tf_dagster.orchestration.run_launcher)
    text = "".join((REPOSITORY / str(one.__file__)).read_text() for one in modules)
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
    for one in servers:
        assert one["envConfigMaps"] == [{"name": "census-tf-env"}]
    assert launcher_of(values)["env_config_maps"] == ["census-tf-env"]
    wanted = re.findall(r"'env': '(\w+)'", str(helm_chart.instance_of(values)))
    assert set(wanted) - {"DAGSTER_PG_PASSWORD"} <= environment().keys()


def shard_pod() -> tuple[dict[str, Any], V1PodTemplateSpec]:
    """The container of a shard's pod and its whole template, as dagster_k8s reads them from the placement."""
    placement = read_placement(FOLDER)
    assert placement is not None
    config = json.loads(placement.tags()["dagster-k8s/config"])
    template = k8s_model_from_dict(
        V1PodTemplateSpec,
        {
            "metadata": config["pod_template_spec_metadata"],
            "spec": {"containers": [{"name": "dagster", **config["container_config"]}], **config["pod_spec_config"]},
        },
    )
    whole: dict[str, Any] = ApiClient().sanitize_for_serialization(template)
    return whole["spec"]["containers"][0], whole


def test_the_canary_runs_where_shards_run() -> None:
    job = yaml.safe_load((FOLDER / "canary.yaml").read_text())
    canary, pod = job["spec"]["template"], job["spec"]["template"]["spec"]
    shard_container, shard = shard_pod()
    (container,) = pod["containers"]
    assert pod["nodeSelector"] == shard["spec"]["nodeSelector"]
    assert pod["tolerations"] == shard["spec"]["tolerations"]
    assert canary["metadata"]["annotations"] == shard["metadata"]["annotations"]
    assert container["image"] == shard_container["image"]
    assert sizes(container["resources"]) == sizes(shard_container["resources"])
    launcher = launcher_of(read_values())
    assert container["volumeMounts"] == launcher["volume_mounts"]
    assert pod["volumes"] == launcher["volumes"]


def sizes(resources: dict[str, dict[str, str]]) -> dict[str, dict[str, Decimal]]:
    return {kind: {name: parse_quantity(one) for name, one in values.items()} for kind, values in resources.items()}


def test_the_readme_s_pools_are_those_of_the_placement() -> None:
    placement = read_placement(FOLDER)
    assert placement is not None
    assert placement.kubernetes is not None
    labels = re.findall(r"^ *kubectl label node \S+ (\S+?)=(\S+)", README, re.MULTILINE)
    taints = re.findall(r"^ *kubectl taint node .* (\S+?)=\w+:(\w+)", README, re.MULTILINE)
    assert labels == [pair for kind in placement.kubernetes.nodes.values() for pair in kind.node_selector.items()]
    for kind in placement.kubernetes.nodes.values():
        assert [(one.key, one.effect) for one in kind.tolerations] == taints


@pytest.mark.parametrize("platform", ["k8s", "ecs"])
def test_the_requests_fit_the_nodes(platform: str) -> None:
    placement = read_placement(REPOSITORY / "deploy" / platform)
    assert placement is not None
    assert placement.instance_types
    # Each of them, not only the largest.
    for name in placement.instance_types:
        node = NODE_TYPES[name]
        on: Platform = "ECS" if platform == "ecs" else "EKS" if node.on_aws else "GKE"
        assert shortfall(node, on, placement.gpus, placement.cpu, placement.memory_gib) is None


def test_waiting_for_the_canary_ends_when_it_fails(tmp_path: Path) -> None:
    (commands,) = re.findall(r"^ *```sh\n([^`]*?job/canary.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    fake = tmp_path / "kubectl"
    fake.write_text(
        '#!/bin/sh\necho "$@" >> calls\ncase "$1 $3" in\n'
        "wait*) exec sleep 60;;\n"
        '"get canary") echo "FailureTarget Failed";;\n'
        "*) ;;\nesac\n"
    )
    fake.chmod(0o755)
    (tmp_path / "deploy").symlink_to(FOLDER.parent)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REGISTRY": "registry.example", "VERSION": "0.1.0"}
    done = subprocess.run(
        ["bash", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20
    )
    assert "Failed" in done.stdout
    assert "logs job/canary" in (tmp_path / "calls").read_text()


def readme_yaml() -> dict[str, list[Any]]:
    """The README's blocks of YAML, by the place that their first line names."""
    found: dict[str, list[Any]] = {}
    for one in re.findall(r"^ *```yaml\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL):
        text = textwrap.dedent(one)
        found.setdefault(text.partition("\n")[0], []).append(yaml.safe_load(text))
    return found


def pools() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The node class of karpenter.yaml, and its pools by their label."""
    node_class, *found = yaml.safe_load_all((FOLDER / "karpenter.yaml").read_text())
    return node_class, {one["spec"]["template"]["metadata"]["labels"]["census-tf/pool"]: one for one in found}


def test_karpenter_s_pools_are_those_of_the_placement() -> None:
    placement = read_placement(FOLDER)
    assert placement is not None
    assert placement.kubernetes is not None
    node_class, found = pools()
    kinds = placement.kubernetes.nodes
    assert list(found) == [one.node_selector["census-tf/pool"] for one in kinds.values()]
    for (purchase, kind), pool in zip(kinds.items(), found.values(), strict=True):
        spec = pool["spec"]["template"]["spec"]
        assert pool["spec"]["template"]["metadata"]["labels"] == kind.node_selector
        assert [(one["key"], one["effect"]) for one in spec["taints"]] == [
            (one.key, one.effect) for one in kind.tolerations
        ]
        wanted = {one["key"]: one["values"] for one in spec["requirements"]}
        assert {one["operator"] for one in spec["requirements"]} == {"In"}
        assert wanted["karpenter.sh/capacity-type"] == [purchase.replace("_", "-")]
        assert wanted["kubernetes.io/arch"] == ["amd64"]
        for name in wanted["node.kubernetes.io/instance-type"]:
            assert shortfall(NODE_TYPES[name], "EKS", placement.gpus, placement.cpu, placement.memory_gib) is None
        assert spec["nodeClassRef"] == {
            "group": node_class["apiVersion"].partition("/")[0],
            "kind": node_class["kind"],
            "name": node_class["metadata"]["name"],
        }
        assert spec["expireAfter"] == "Never"
        assert pool["spec"]["disruption"]["consolidationPolicy"] == "WhenEmpty"
    (disk,) = node_class["spec"]["blockDeviceMappings"]
    assert disk["ebs"]["volumeSize"] == "100Gi"


def test_karpenter_knows_every_name() -> None:
    """The names in Karpenter's own schemas of v1 (pkg/apis/crds in aws/karpenter-provider-aws)."""
    node_class, found = pools()
    assert (node_class["apiVersion"], node_class["kind"]) == ("karpenter.k8s.aws/v1", "EC2NodeClass")
    assert node_class["spec"].keys() <= {
        *("amiFamily", "amiSelectorTerms", "blockDeviceMappings", "instanceProfile", "metadataOptions", "role"),
        *("securityGroupSelectorTerms", "subnetSelectorTerms", "tags", "userData"),
    }
    for pool in found.values():
        assert (pool["apiVersion"], pool["kind"]) == ("karpenter.sh/v1", "NodePool")
        assert pool["spec"].keys() <= {"disruption", "limits", "template", "weight"}
        assert pool["spec"]["template"].keys() == {"metadata", "spec"}
        assert pool["spec"]["template"]["spec"].keys() <= {
            *("expireAfter", "nodeClassRef", "requirements", "startupTaints", "taints", "terminationGracePeriod"),
        }
        assert pool["spec"]["disruption"].keys() <= {"budgets", "consolidateAfter", "consolidationPolicy"}


def proxy_objects() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "oauth2-proxy.yaml").read_text())}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_login_s_objects_are_valid(version: str) -> None:
    found = proxy_objects()
    assert list(found) == ["Deployment", "Service", "Ingress", "NetworkPolicy"]
    for one in found.values():
        kubernetes_validate.validate(one, version, strict=True)
        assert one["metadata"]["namespace"] == NAMESPACE


def test_only_the_login_is_opened_and_only_to_the_ingress() -> None:
    found = proxy_objects()
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    assert found["Service"]["spec"]["selector"] == labels
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    (rule,) = found["Ingress"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"]["name"] == found["Service"]["metadata"]["name"]
    assert found["Ingress"]["spec"]["tls"][0]["hosts"] == [rule["host"]]
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == {"matchLabels": labels}
    (allowed,) = policy["ingress"]
    assert [one.keys() for one in allowed["from"]] == [{"namespaceSelector"}]
    assert allowed["ports"] == [{"port": port["containerPort"]}]
    # The webserver's own service, which stays closed.
    server = read_values()["dagsterWebserver"]["service"]
    assert f"--upstream=http://census-tf-dagster-webserver:{server['port']}" in container["args"]
    # Secrets come from a secret, which the README creates with these keys.
    assert all(one.keys() == {"name", "valueFrom"} for one in container["env"])
    references = [one["valueFrom"]["secretKeyRef"] for one in container["env"]]
    (name,) = {one["name"] for one in references}
    assert f"create secret generic {name} " in README
    assert {one["key"] for one in references} <= set(re.findall(r"--from-file=([\w-]+)=", README))
    # The README replaces every placeholder.
    text = (FOLDER / "oauth2-proxy.yaml").read_text() + (FOLDER / "karpenter.yaml").read_text()
    assert set(re.findall(r"MY_[A-Z_]+", text)) <= set(re.findall(r"s[/#](MY_[A-Z_]+)[/#]", README))


def test_the_placement_takes_the_runtime_class_of_the_readme(tmp_path: Path) -> None:
    (changed,) = readme_yaml()["# in placement.yaml"]
    text = yaml.safe_load((FOLDER / "placement.yaml").read_text())
    text["kubernetes"] |= changed["kubernetes"]
    (tmp_path / "placement.yaml").write_text(yaml.safe_dump(text))
    placement = read_placement(tmp_path)
    assert placement is not None
    pod = json.loads(placement.tags()["dagster-k8s/config"])["pod_spec_config"]
    assert pod["runtime_class_name"] == "nvidia"


def test_the_chart_takes_the_secret_of_the_readme() -> None:
    ((key, secrets),) = readme_yaml()["# in values.yaml, dagster-user-deployments.deployments[0]"][0].items()
    values = read_values()
    values["dagster-user-deployments"]["deployments"][0][key] = secrets
    helm_chart.check(values)
    assert f"create secret generic {secrets[0]['name']} --from-file=SLACK_WEBHOOK=" in README


def test_the_caches_of_the_readme_are_valid_volumes() -> None:
    kinds = set()
    blocks = readme_yaml()["# in values.yaml, runLauncher.config.customRunLauncher.config"]
    for volumes in (one["volumes"] for one in blocks):
        container = {"name": "one", "image": "two"}
        spec = {"containers": [container], "volumes": volumes}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": spec}
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)
        assert [one["name"] for one in volumes] == ["cache"]
        kinds |= volumes[0].keys() - {"name"}
    assert kinds == {"hostPath", "persistentVolumeClaim"}


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
