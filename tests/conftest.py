"""Options and the few fixtures that several test modules share."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import SHARED_DATA, Oracle, Project

os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "yes")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--oracle", type=Path, help="upstream's `transcriptformer` command, in its own environment")


@pytest.fixture(scope="session")
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    command = request.config.getoption("--oracle")
    if command is None:
        pytest.skip("no --oracle given")
    assert command.exists(), f"--oracle {command} does not exist"
    return Oracle(command.absolute(), tmp_path_factory.mktemp("oracle"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(params=["mouse_merfish_500", "human_10x_chr21"])
def real_file(request: pytest.FixtureRequest) -> Path:
    path = SHARED_DATA / f"{request.param}.h5ad"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    return path


def _refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The endpoint of an S3 server in a process of its own: TileDB holds the interpreter while it asks."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while _refuses(port):
        assert server.poll() is None, "the S3 server did not start"
        assert time.monotonic() < deadline, "the S3 server does not answer"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()
