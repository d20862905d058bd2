"""A local HTTP server in the role of the Census release directory, and its possible answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from tests.support.http_server import QuietHandler, served


def entry(build: str, uri: str = "", *, lts: bool = True, **more: Any) -> dict[str, Any]:
    """An entry in the form of the real directory."""
    uri = uri or f"s3://cellxgene-data-public/cell-census/{build}/soma/"
    return {
        "release_date": None,
        "release_build": build,
        "soma": {"uri": uri, "relative_uri": f"/cell-census/{build}/soma/", "s3_region": "us-west-2"},
        "h5ads": {"uri": f"{uri}h5ads/", "relative_uri": f"/cell-census/{build}/h5ads/", "s3_region": "us-west-2"},
        "flags": {"lts": lts, "retracted": False},
        **more,
    }


def retracted(build: str, **more: Any) -> dict[str, Any]:
    """An entry of a release that was withdrawn."""
    why = {"date": "2025-12-01", "reason": "wrong counts", "info_url": None, "replaced_by": "2025-12-08"}
    return {**entry(build), "flags": {"lts": True, "retracted": True}, "retraction": why, **more}


@dataclass
class DirectoryServer:
    """What the server answers; a test changes it."""

    port: int = 0
    body: bytes = b"{}"
    status: int = 200
    silent: bool = False
    looks: int = 0
    pause: float = 0.0
    """Seconds between two bytes."""
    over: Event = field(default_factory=Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/cellxgene-census/v1/release.json"

    def lists(self, **entries: Any) -> None:
        """Answer with entries, named as arguments are: r2025_11_08, stable."""
        names = {name.removeprefix("r").replace("_", "-") if name[1:2].isdigit() else name: name for name in entries}
        self.body = json.dumps({name: entries[given] for name, given in names.items()}).encode()


@contextmanager
def directory_server() -> Iterator[DirectoryServer]:
    """Serve until the end of the block."""
    state = DirectoryServer()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            state.looks += 1
            if state.silent:
                state.over.wait(60)
                return
            self.send_response(state.status)
            self.end_headers()
            if not state.pause:
                self.wfile.write(state.body)
                return
            with suppress(OSError):
                for byte in state.body:
                    self.wfile.write(bytes([byte]))
                    state.over.wait(state.pause)

    with served(Handler) as state.port:
        try:
            yield state
        finally:
            state.over.set()
