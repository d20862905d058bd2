"""A shard outlives the keys that ECS and EKS gave to its worker.

TileDB has a client of its own beside boto3, and each of them must ask for the next key in time: `rotating_keys` refuses
requests with an expired one. Both ask at the addresses of AWS, which exist in a network of the test's own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import boto3
import numpy as np
import pytest
import requests

from census_tf_dagster.census.key_file import find_cells
from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.pipeline.plan_release import make_plan
from tests.support.builders import tiny
from tests.support.deployment import free_port
from tests.support.fork_server import SERVERS
from tests.support.moto_servers import REGION, client, moto_server, rotating_keys
from tests.support.on_s3 import on_s3, reader_config
from tests.support.project import RELEASE, REPOSITORY, Project, read_array
from tests.support.rotating_keys import HELD_COMMITS, Settings, Used
from tests.support.warm_processes import run_module

pytestmark = pytest.mark.takes(60)

MEGABATCHES = HELD_COMMITS + 2
CELLS = 10 * MEGABATCHES
ALL = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'
ANYONE = ALL.replace('"Resource": "*"', '"Principal": {"AWS": "*"}')
STS = f"sts.{REGION}.amazonaws.com"
CA_FILE = "/etc/ssl/certs/ca-certificates.crt"
"""The certificates that TileDB trusts on Debian."""

NETWORK = """
set -e
ip link set lo up
ip addr add 169.254.170.2/32 dev lo
ip addr add 169.254.170.23/32 dev lo
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/certificate {ca_file}
exec {python} -W ignore -m tests.store.test_credentials {folder} {kind}
"""


def as_given(kind: str, settings: Settings) -> dict[str, str]:
    """Return the variables that a container finds."""
    if kind == "ecs":
        return {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/credentials/d3b07384-d9a0-4c9e-8f9e-1c1f2b7d6a11"}
    if kind == "eks":
        return {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://169.254.170.23/v1/credentials",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": settings.token,
        }
    return {
        "AWS_ROLE_ARN": settings.role,
        "AWS_WEB_IDENTITY_TOKEN_FILE": settings.token,
        "AWS_STS_REGIONAL_ENDPOINTS": "regional",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CA_BUNDLE": CA_FILE,
    }


MORE = {
    "ecs": {"container": "169.254.170.2:80"},
    "eks": {"container": "169.254.170.23:80"},
    "irsa": {"sts": 443},
    "fixed": {},
}


STEPS = (("obs_id_plan", RELEASE), ("shard_embeddings", f"{RELEASE}|0"), ("embeddings_array", RELEASE))


@contextmanager
def store_of_a_role(project: Project, kind: str) -> Iterator[tuple[Settings, Used]]:
    """Run an S3 server that takes only the keys of a role, and the server that hands them out."""
    with moto_server() as s3:
        iam = client(s3, "iam")
        iam.create_user(UserName="agent")
        agent = iam.create_access_key(UserName="agent")["AccessKey"]
        iam.put_user_policy(UserName="agent", PolicyName="all", PolicyDocument=ALL)
        role = iam.create_role(RoleName="worker", AssumeRolePolicyDocument=ANYONE)["Role"]["Arn"]
        iam.put_role_policy(RoleName="worker", PolicyName="all", PolicyDocument=ALL)
        client(s3).create_bucket(Bucket="the-store")
        # From here on, the server refuses requests that are not signed with one of their keys.
        requests.post(f"{s3}/moto-api/reset-auth", data=b"0", timeout=10).raise_for_status()
        settings = Settings(
            port=free_port(),
            upstream=int(s3.rpartition(":")[2]),
            region=REGION,
            role=role,
            key=agent["AccessKeyId"],
            secret=agent["SecretAccessKey"],
            token=str(project.folder / "token"),
            certificate=str(project.folder / "certificate"),
            **MORE[kind],  # type: ignore[arg-type]
        )
        with rotating_keys(settings) as used:
            yield settings, used


def outlive_keys(folder: Path, kind: str) -> None:
    """Plan, embed, finish and read back a release while its keys rotate; print what the keys were used for."""
    project = tiny(Project(folder), cells=CELLS, shards=1, megabatch_size=CELLS // MEGABATCHES)
    with store_of_a_role(project, kind) as (settings, used):
        os.environ |= {"AWS_ACCESS_KEY_ID": settings.key, "AWS_SECRET_ACCESS_KEY": settings.secret}
        endpoint = f"http://127.0.0.1:{settings.port}"
        on_s3(project, endpoint)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del project.env[name]
        project.env |= as_given(kind, settings)
        added = project.command("release", "add", RELEASE)
        assert added.returncode == 0, added.stderr[-3000:]
        for asset, partition in STEPS:
            done = project.materialize(f"tiny/{asset}", partition)
            assert done.returncode == 0, (asset, done.stdout[-3000:], done.stderr[-6000:])
        with project.context("tiny") as context:
            stored = read_array(context.folder.array, folder, reader_config(endpoint))
        assert np.array_equal(stored.ids, np.arange(CELLS))
        assert stored.stored_values == CELLS * 16
        assert np.isfinite(stored.values).all()
    print(json.dumps(vars(used)))


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root")
@pytest.mark.soak
@pytest.mark.parametrize("kind", ["ecs", "eks", "irsa"])
def test_a_shard_outlives_its_keys(tmp_path: Path, kind: str) -> None:
    make_certificate(tmp_path)
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost {STS}\n")
    script = NETWORK.format(folder=tmp_path, ca_file=CA_FILE, python=sys.executable, kind=kind)
    # Processes of the servers that are there would see another network.
    env = {name: value for name, value in os.environ.items() if name != SERVERS}
    done = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", script], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )
    if "unshare failed" in done.stderr or "not permitted" in done.stderr:
        pytest.skip("a network of its own is not allowed here")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    used = json.loads(done.stdout.splitlines()[-1])
    print(used)
    # Each of the first commits was signed by another key, and nobody used a key beyond its end.
    assert len(set(used["commits"])) > HELD_COMMITS
    assert used["expired"] == {}
    assert "" not in used["keys"]["tiledb"], "a request was not signed"
    assert used["keys"].keys() == {"boto3", "tiledb"}
    assert used["asked"].keys() == {"sts" if kind == "irsa" else kind}


def use_keys(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the keys of a user in the variables. boto3 keeps those that it found first in a process."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", settings.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", settings.secret)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)


def expired_keys(settings: Settings) -> dict[str, str]:
    """Get keys, wait for their end, and return them as variables."""
    given = requests.get(f"http://127.0.0.1:{settings.port}/v2/credentials/some-id", timeout=10).json()
    time.sleep(max((datetime.fromisoformat(given["Expiration"]) - datetime.now(UTC)).total_seconds(), 0))
    return {
        "AWS_ACCESS_KEY_ID": given["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": given["SecretAccessKey"],
        "AWS_SESSION_TOKEN": given["Token"],
    }


def test_keys_that_nobody_renews_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(project, cells=CELLS, shards=1, megabatch_size=CELLS // MEGABATCHES)
    with store_of_a_role(project, "fixed") as (settings, used):
        use_keys(settings, monkeypatch)
        on_s3(project, f"http://127.0.0.1:{settings.port}")
        with project.context("tiny") as context:
            make_plan(context)
        # Keys in variables are the first that every client takes, and it cannot know when they expire.
        project.env |= expired_keys(settings)
        arguments = [str(project.folder), "tiny", "0"]
        failed = run_module("tests.support.s3_driver", arguments, REPOSITORY, project.env)
        again = project.command("inspect")
    assert failed.returncode != 0
    assert "expired" in failed.stderr, failed.stderr[-3000:]
    assert sum(used.expired.values()) > 0
    assert "S3 refuses the AWS keys of this environment at s3://the-store/some/prefix" in again.stdout + again.stderr


def test_a_plan_that_expired_keys_cannot_read_is_not_called_damaged(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(project, cells=CELLS, shards=1, reuse=True)
    with store_of_a_role(project, "fixed") as (settings, _):
        use_keys(settings, monkeypatch)
        on_s3(project, f"http://127.0.0.1:{settings.port}")
        with project.context("tiny") as context:
            make_plan(context)
            plan = read_plan(context.store, context.folder.plan)
        for name, value in expired_keys(settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
        late = Storage(S3Settings(REGION, f"http://127.0.0.1:{settings.port}"))
        with pytest.raises(UserError, match="S3 refuses the AWS keys of this environment"):
            plan.read_ids(late, plan.megabatches)
        with pytest.raises(UserError, match="S3 refuses the AWS keys of this environment"):
            find_cells(late, plan.keys, np.zeros((1, 2), np.uint64))


def make_certificate(folder: Path) -> None:
    """Make a certificate for STS that a client trusts which trusts only this certificate."""
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={STS}"]
    command += ["-addext", f"subjectAltName=DNS:{STS}", "-keyout", "key", "-out", "certificate"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with (folder / "certificate").open("a") as file:
        file.write((folder / "key").read_text())


if __name__ == "__main__":
    outlive_keys(Path(sys.argv[1]), sys.argv[2])
