"""The webserver's address as an operator types it."""

import pytest

from census_tf_dagster.cli import main
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.graphql import Deployment


@pytest.mark.parametrize(
    "url",
    [
        "http://ada:hunter2@host:3000",
        "http://hunter2@host",
        "http://ada:hunt@er2hunter2@host",
        "ada:hunter2@host",
        "http//ada:hunter2@host",
        "http://ada:hunter2/x@host",
        "http://ada:hunter2\n@host",
        "http://host?token=hunter2",
        "http://host#hunter2",
    ],
)
def test_a_refused_address_shows_no_password(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"expected http://HOST:PORT or https://HOST\[/PATH\]") as caught:
        Deployment.at(url)
    assert "hunter2" not in str(caught.value)
    assert main(["status", "x", "--url", url]) != 0
    assert "hunter2" not in "".join(capsys.readouterr())


def test_help_shows_no_password(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CENSUS_TF_DAGSTER_URL", "http://ada:hunter2@host")
    with pytest.raises(SystemExit):
        main(["status", "--help"])
    assert "hunter2" not in "".join(capsys.readouterr())


def test_addresses_that_are_right() -> None:
    assert Deployment.at("https://host.example/dagster/").url == "https://host.example/dagster"
    assert Deployment.at("http://[::1]:3000/graphql").url == "http://[::1]:3000"
