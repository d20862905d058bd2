"""Proxies of the environment work for the webserver, TileDB and boto3, but not for this machine itself."""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
import tiledb

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.proxies import is_loopback, proxy_for, tiledb_proxy
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.operate.graphql import Deployment
from tests.support.deployment import free_port
from tests.support.http_server import QuietHandler, served
from tests.support.moto_servers import client, s3_proxy
from tests.support.project import REPOSITORY

VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Webserver(BaseHTTPRequestHandler):
    """Answers like a webserver; answers requests to a proxy with its own error."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        asked_as_proxy = self.path.startswith("http://")
        self.send_response(int(self.path.rsplit("/", 2)[1]) if asked_as_proxy else 200)
        self.end_headers()
        self.wfile.write(b"" if asked_as_proxy else b'{"data": {"version": "1.13"}}')

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_webserver_on_this_machine_is_asked_without_a_proxy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with HTTPServer(("127.0.0.1", 0), Webserver) as server:
        Thread(target=server.handle_request, daemon=True).start()
        assert Deployment.at(f"http://{name}:{server.server_port}").ask("{ version }") == {"version": "1.13"}


def test_a_proxy_that_does_not_answer_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("http_proxy", f"http://me:secret@{proxy}")
    with pytest.raises(UserError, match=rf"through the proxy http://\*\*\*@{proxy} ") as told:
        Deployment.at("http://dagster.example.test:3000").ask("{ version }")
    assert "Or name the host in NO_PROXY" in str(told.value)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("code", [403, 407, 503])
def test_what_a_proxy_answers_is_told_as_its_answer(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with HTTPServer(("127.0.0.1", 0), Webserver) as server:
        Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match=rf"HTTP {code} through the proxy http://\*\*\*@127\.0\.0\.1:") as told:
            Deployment.at(f"http://dagster.example.test/{code}").ask("{ version }")
    assert "secret" not in str(told.value)


def test_a_refused_address_does_not_show_its_password() -> None:
    with pytest.raises(UserError, match=r"'http://\*\*\*@dagster\.example\.test:3000'") as told:
        Deployment.at("http://me:secret@dagster.example.test:3000")
    assert "secret" not in str(told.value)


def test_tiledb_and_boto3_go_through_the_proxy(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(s3).create_bucket(Bucket="store")
    with s3_proxy(s3, tmp_path) as proxy:
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        # Only the proxy finds this host.
        storage = Storage(S3Settings("us-east-1", "http://s3.example.test"))
        storage.write("s3://store/whole", b"content")
        assert storage.read("s3://store/whole") == b"content"
        with tiledb.scope_ctx(storage.tiledb_ctx):
            tiledb.from_numpy("s3://store/array", np.arange(5)).close()
            with tiledb.open("s3://store/array") as array:
                assert array[:].tolist() == list(range(5))
    assert proxy.counts["requests"] > 5


KEYS = """
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
storage = Storage(S3Settings("us-east-1", "http://s3.example.test"))
storage._vfs.is_file("s3://store/whole")
storage.exists("s3://store/whole")
"""


class Keys(QuietHandler):
    """Gives out keys; as a proxy, too, which the real agent cannot be asked through."""

    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        keys = {"AccessKeyId": "id", "SecretAccessKey": "secret", "Token": "token"}
        self.reply(200, "application/json", json.dumps(keys | {"Expiration": "2099-01-01T00:00:00Z"}).encode())

    do_HEAD = do_GET


def test_only_tiledb_asks_a_container_s_agent_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """TileDB 2.30 ignores NO_PROXY here (docs/operate.md). When it no longer does, take the warning out."""
    Keys.asked = []
    with served(Keys) as port:
        agent = f"http://127.0.0.1:{port}/v2/credentials/some-id"
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", agent)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        subprocess.run([sys.executable, "-W", "ignore", "-c", KEYS], cwd=REPOSITORY, check=True)
    s3 = "http://s3.example.test/store/whole"
    assert Keys.asked == [agent, s3, "/v2/credentials/some-id", s3]


def test_s3_on_this_machine_is_asked_without_a_proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client(s3).create_bucket(Bucket="store")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    storage = Storage(S3Settings("us-east-1", s3))
    storage.write("s3://store/folder/whole", b"content")
    assert storage.size("s3://store/folder") == len(b"content")


def test_a_proxy_as_tiledb_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    aws = S3Settings("us-west-2")
    assert not any("proxy" in key for key in aws.tiledb_config())
    monkeypatch.setenv("HTTPS_PROXY", "http://me:p%40ss@proxy.example.test:3128")
    assert tiledb_proxy(aws.address) == {
        "vfs.s3.proxy_scheme": "http",
        "vfs.s3.proxy_host": "proxy.example.test",
        "vfs.s3.proxy_port": "3128",
        "vfs.s3.proxy_username": "me",
        "vfs.s3.proxy_password": "p@ss",
    }
    assert aws.proxies() == {"https": "http://me:p%40ss@proxy.example.test:3128"}
    assert proxy_for("http://only-https.example.test") is None
    monkeypatch.setenv("NO_PROXY", ".amazonaws.com")
    assert tiledb_proxy(aws.address) == aws.proxies() == {}
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example.test")
    assert tiledb_proxy(aws.address)["vfs.s3.proxy_port"] == "80"


def test_addresses_of_this_machine() -> None:
    for url in (
        "http://127.0.0.1:3000",
        "http://localhost/x",
        "https://[::1]:3000",
        "http://127.3.2.1",
        "http://a.localhost",
    ):
        assert is_loopback(url)
    for url in ("http://10.0.0.1:3000", "http://localhost.example.test", "https://s3.us-west-2.amazonaws.com"):
        assert not is_loopback(url)
