"""An HTTP proxy between TileDB or boto3 and an S3 server, which fails some requests on purpose, by a seed.

Run as a process of its own: ``python -m tests.support.s3_proxy PORT UPSTREAM_PORT SEED SHARE OUTAGE``. It prints its
counts as JSON when it gets a SIGTERM. While the file OUTAGE exists every request fails, in the way that it names. A
share of -1 lets everything through but signed requests, as a bucket of somebody else's does.
"""

import http.client
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any

SPENT = ("expect", "transfer-encoding", "content-length")
"""Headers of the client's connection. The proxy forwards the body in one piece."""
FAULTS = ("500", "503", "reset", "lost answer", "cut answer", "timeout", "slow")
TIMEOUT_SECONDS = 7.0
"""Longer than TileDB waits for an answer (vfs.s3.request_timeout_ms)."""
SLOW_SECONDS = 1.0
ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "403": (403, "AccessDenied", "Access Denied"),
    "503": (503, "SlowDown", "Please reduce your request rate."),
}


class Proxy(ThreadingHTTPServer):
    """Forwards to an S3 server and fails a share of the requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, upstream: int, seed: int, share: float, outage: Path) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.upstream = upstream
        self.share = share
        self.rng = random.Random(seed)
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.outage = outage

    def fault(self) -> str | None:
        """Choose what happens to the next request."""
        with self.lock:
            self.counts["requests"] += 1
            if self.outage.exists():
                return self.outage.read_text()
            if self.rng.random() >= self.share:
                return None
            chosen = self.rng.choice(FAULTS)
            self.counts[chosen] += 1
            return chosen


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_any(self) -> None:
        body = self.read_body()
        fault = self.server.fault()
        if self.server.share < 0 and "Authorization" in self.headers:
            fault = "403"
        if fault in ERRORS:
            self.answer_error(*ERRORS[fault])
        elif fault == "reset":
            self.reset()
        elif fault == "timeout":
            time.sleep(TIMEOUT_SECONDS)
            self.reset()
        else:
            if fault == "slow":
                time.sleep(SLOW_SECONDS)
            self.forward(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def forward(self, body: bytes, fault: str | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in SPENT}
        path = self.path
        if path.startswith("http://"):
            # As a forward proxy is asked, for a host that only it would find.
            path = f"/{path.split('/', 3)[3]}"
            headers["Host"] = f"127.0.0.1:{self.server.upstream}"
        connection.request(self.command, path, body=body or None, headers=headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if fault == "lost answer":
            self.reset()
            return
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if fault == "cut answer":
            self.wfile.write(content[: len(content) // 2])
            self.reset()
        elif self.command != "HEAD":
            self.wfile.write(content)

    def answer_error(self, status: int, code: str, message: str) -> None:
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reset(self) -> None:
        """End the connection as a dying server does: RST instead of FIN."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Send no answer."""


def main() -> None:
    port, upstream, seed, share, outage = sys.argv[1:]
    proxy = Proxy(int(port), int(upstream), int(seed), float(share), Path(outage))

    def stop(_signal: int, _frame: FrameType | None) -> None:
        print(json.dumps(proxy.counts), flush=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    proxy.serve_forever()


if __name__ == "__main__":
    main()
