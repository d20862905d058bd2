"""Options and the few fixtures that several test modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from census_tf_dagster.pipeline.upstream import find_upstream
from tests.support.moto_servers import moto_server
from tests.support.project import SHARED_DATA, Project, UpstreamCommand
from tests.support.warm_devices import REAL_DEVICES

os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "yes")
# The workers of a test run share the cores. A second thread would make each operation wait until both have a core.
# Device processes have all threads, as outside of tests.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--upstream", type=Path, help="upstream's `transcriptformer` command, in another environment")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, so that no worker is left alone with one at the end."""

    def seconds(item: pytest.Item) -> int:
        marker = item.get_closest_marker("takes")
        return marker.args[0] if marker else 0

    items.sort(key=seconds, reverse=True)


@pytest.fixture(scope="session")
def upstream_command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UpstreamCommand:
    command = request.config.getoption("--upstream") or find_upstream()
    if command is None:
        pytest.skip(
            "transcriptformer is not installed here; `make test` installs it, or name it with --upstream=COMMAND"
        )
    assert command.exists(), (
        f"--upstream: no such file: {command}; `make test` makes .venv-upstream, or leave the option out"
    )
    return UpstreamCommand(command.absolute(), tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def real_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device processes are started as outside of tests: by a Python of their own, as children of their worker."""
    monkeypatch.setenv(REAL_DEVICES, "yes")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(params=["mouse_merfish_500", "human_10x_chr21"])
def real_file(request: pytest.FixtureRequest) -> Path:
    path = SHARED_DATA / f"{request.param}.h5ad"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    return path


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The endpoint of an S3 server."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with moto_server() as endpoint:
        yield endpoint
