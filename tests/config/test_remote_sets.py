"""Sets on S3: which objects are fetched, which are refused, and how a running code server sees a changed YAML."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from census_tf_dagster.config.remote_sets import LARGEST
from census_tf_dagster.definitions import load_settings, sets_folder
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.graphql import Deployment
from tests.support.deployment import Operator, free_port, until
from tests.support.moto_servers import REGION, client
from tests.support.project import Project

BUCKET = "deployment"


def environment(s3: str, sets: str) -> dict[str, str]:
    return {"CENSUS_TF_SETS": sets, "CENSUS_TF_STORE_S3_ENDPOINT": s3, "CENSUS_TF_STORE_S3_REGION": REGION}


def put(s3: str, *names: str, content: bytes = b"") -> None:
    there = client(s3)
    if BUCKET not in [one["Name"] for one in there.list_buckets()["Buckets"]]:
        there.create_bucket(Bucket=BUCKET)
    for name in names:
        there.put_object(Bucket=BUCKET, Key=name, Body=content)


def put_set(s3: str, project: Project, name: str, prefix: str, **attributes: str) -> None:
    project.add_set(name, **{"organism": "homo_sapiens", **attributes})
    put(s3, f"{prefix}/{name}/defs.yaml", content=(project.folder / "sets" / name / "defs.yaml").read_bytes())


def test_what_is_fetched(s3: str, project: Project) -> None:
    put_set(s3, project, "one", "a/sets")
    put(s3, "a/sets/README.md", "a/sets/one/more/defs.yaml", "a/sets/../defs.yaml", "a/other/two/defs.yaml")
    put(s3, "a/sets/placement.yaml", content=b"gpus: 2\n")
    folder = sets_folder(environment(s3, f"s3://{BUCKET}/a/sets/"))
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["one/defs.yaml", "placement.yaml"]
    assert list(load_settings(folder)) == ["one"]


def test_more_sets_than_a_page_lists(s3: str) -> None:
    put(s3, *[f"many/sets/set_{i}/defs.yaml" for i in range(1001)])
    folder = sets_folder(environment(s3, f"s3://{BUCKET}/many/sets"))
    assert len(list(folder.glob("*/defs.yaml"))) == 1001


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (["b/sets/placement.yaml"], b"", r"no sets below s3://deployment/b/sets: expected objects such as "),
        (["b/sets/one/defs.yaml"], b"x" * (LARGEST + 1), r"b/sets/one/defs.yaml has 65537 bytes"),
    ],
    ids=["none", "large"],
)
def test_what_is_refused(s3: str, names: list[str], content: bytes, message: str) -> None:
    put(s3, *names, content=content)
    with pytest.raises(UserError, match=message):
        sets_folder(environment(s3, f"s3://{BUCKET}/b/sets"))


def test_a_bucket_that_is_not_there(s3: str) -> None:
    with pytest.raises(UserError, match="no sets below s3://nowhere/sets"):
        sets_folder(environment(s3, "s3://nowhere/sets"))


@contextmanager
def code_server(project: Project) -> Iterator[int]:
    """Run the code server as deploy/ecs/template.yaml does."""
    port = free_port()
    dagster = str(Path(sys.executable).with_name("dagster"))
    command = [
        dagster,
        "code-server",
        "start",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-m",
        "census_tf_dagster.definitions",
    ]
    with (project.folder / "code.log").open("w") as log:
        server = subprocess.Popen(command, cwd=project.folder, env=project.env, stdout=log, stderr=log)
    health = [dagster, "api", "grpc-health-check", "-p", str(port)]
    try:
        deadline = time.monotonic() + 120
        while subprocess.run(health, env=project.env, capture_output=True).returncode:
            assert server.poll() is None, (project.folder / "code.log").read_text()[-3000:]
            assert time.monotonic() < deadline
        yield port
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            # Dagster's server may wait for ever for a process of its own.
            server.kill()
            server.wait()


RELOAD = """mutation Reload($name: String!) { reloadRepositoryLocation(repositoryLocationName: $name) {
  __typename ... on WorkspaceLocationEntry { loadStatus locationOrLoadError { __typename } }
} }"""
NODES = "{ assetNodes { assetKey { path } } }"
LOCATIONS = """{ workspaceOrError { ... on Workspace { locationEntries {
  name locationOrLoadError { __typename ... on PythonError { cause { message } } }
} } } }"""


def test_sets_are_there_after_reload(s3: str, project: Project) -> None:
    """A stack may start before its bucket has any set: the server is healthy, and reports what is missing."""
    put(s3, "live/other")
    project.env |= environment(s3, f"s3://{BUCKET}/live/sets")
    project.env |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    with code_server(project) as port:
        operator = Operator(project, free_port())
        operator.serve("dagster-webserver", "--grpc-port", str(port))
        try:
            until(operator.answers, "the webserver")
            deployment = Deployment.at(operator.url)

            def sets() -> set[str]:
                return {node["assetKey"]["path"][0] for node in deployment.ask(NODES)["assetNodes"]}

            (location,) = deployment.ask(LOCATIONS)["workspaceOrError"]["locationEntries"]
            assert "no sets below s3://deployment/live/sets" in location["locationOrLoadError"]["cause"]["message"]
            for names in (["first"], ["first", "second"]):
                put_set(s3, project, names[-1], "live/sets")
                deployment.ask(RELOAD, name=location["name"])
                until(lambda names=names: sets() == set(names), f"the sets {names}")
        finally:
            operator.stop("dagster-webserver")
