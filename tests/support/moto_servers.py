"""A server of AWS services and a proxy before it. Both are processes, because TileDB holds the interpreter's lock."""

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import boto3

from tests.support.fork_server import ForkServer
from tests.support.project import REPOSITORY
from tests.support.rotating_keys import Settings, Used
from tests.support.warm_processes import WarmProcess

MOTO = ForkServer("moto", ("moto.cloudformation.models", "moto.server"))
REGION = "us-east-1"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(server: WarmProcess, port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None, "the server did not start"
        assert time.monotonic() < deadline, "the server does not answer"
        time.sleep(0.05)


@contextmanager
def _running(port: int, module: str, *arguments: str) -> Iterator[WarmProcess]:
    server = WarmProcess(module, [*arguments], REPOSITORY, os.environ, server=MOTO)
    try:
        _wait_for(server, port)
        yield server
    finally:
        server.kill()
        server.communicate()


@contextmanager
def moto_server() -> Iterator[str]:
    """Run an AWS server in memory, and return its endpoint."""
    port = _free_port()
    with _running(port, "tests.support.moto_mended", "-H", "127.0.0.1", "-p", str(port)):
        yield f"http://127.0.0.1:{port}"


@dataclass
class Proxy:
    """A running proxy.

    Attributes
    ----------
    endpoint
        Where it listens.
    outage
        A file that makes every request fail while it exists, in the way that it names.
    counts
        Requests, and each kind of fault; once it has ended.
    """

    endpoint: str
    outage: Path
    counts: Counter[str] = field(default_factory=Counter)


@contextmanager
def s3_proxy(endpoint: str, folder: Path, *, seed: int = 0, share: float = 0.0) -> Iterator[Proxy]:
    """Run a proxy before an S3 server that fails a share of the requests."""
    port, outage = _free_port(), folder / f"outage-{os.urandom(4).hex()}"
    upstream = endpoint.rpartition(":")[2]
    with _running(port, "tests.support.s3_proxy", str(port), upstream, str(seed), str(share), str(outage)) as server:
        proxy = Proxy(f"http://127.0.0.1:{port}", outage)
        yield proxy
        server.send_signal(signal.SIGTERM)
        proxy.counts.update(json.loads(server.stdout.readline()))


@contextmanager
def rotating_keys(settings: Settings) -> Iterator[Used]:
    """Run the server of short-lived keys before an S3 server. What happened is known once it has ended."""
    used = Used()
    with _running(settings.port, "tests.support.rotating_keys", json.dumps(asdict(settings))) as server:
        yield used
        server.send_signal(signal.SIGTERM)
        vars(used).update(json.loads(server.stdout.readline()))


def client(endpoint: str, service: str = "s3") -> Any:
    """Return a boto3 client of a test server."""
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client(service, endpoint_url=endpoint, region_name=REGION, **keys)


def upload(folder: Path, endpoint: str, bucket: str, prefix: str) -> None:
    """Create a bucket that everybody can read, and copy a folder to it."""
    s3 = client(endpoint)
    s3.create_bucket(Bucket=bucket, ACL="public-read")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            s3.put_object(
                Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes(), ACL="public-read"
            )
