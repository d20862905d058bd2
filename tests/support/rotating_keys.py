"""Hands out short-lived AWS keys, as ECS, EKS and STS do, and stands before an S3 server to refuse expired ones.

Run as a process of its own: ``python -m tests.support.rotating_keys SETTINGS``, with `Settings` as JSON. It prints
which client used which keys, as JSON, when it gets a SIGTERM.

The real keys live for at least 15 minutes, those of ECS for some hours. The keys of this server live for `LIFETIME`.
Everything else is as documented: S3 answers 400 ``ExpiredToken`` (without a body to a HEAD request), EKS Pod Identity
and STS expect a token of the service account that is still valid, and the same key is handed out until shortly before
its end.
"""

import json
import os
import signal
import ssl
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from urllib.parse import parse_qs

import boto3

from tests.support.s3_proxy import Handler as Forwarding

LIFETIME = 8
"""Seconds. TileDB asks for a new key from 5 s before the end on, boto3 from 15 minutes before."""
HANDOVER = 4.5
"""Seconds before its end from which a key is no longer handed out."""
TOKENS = 4
"""The number of tokens that are valid at a time. The kubelet renews a token long before its end."""
HELD_COMMITS = 4
"""Number of megabatches whose commit is answered when the next key can be had, so that each is signed by another."""
EXPIRED = (400, "ExpiredToken", "The provided token has expired.")


@dataclass(frozen=True)
class Settings:
    """What the server needs.

    Attributes
    ----------
    port, upstream
        Its port of 127.0.0.1, and the one of the S3 server.
    region, role, key, secret
        The role whose keys are handed out, and the key of a user who may assume it.
    token
        The file of the token that authorizes a client. The server renews it, as the kubelet does.
    container
        Another address, ``host:port``, for ECS's or EKS's endpoint; empty: none.
    sts
        Port of 127.0.0.1 for STS, over TLS with the file `certificate`; 0: none.
    """

    port: int
    upstream: int
    region: str
    role: str
    key: str
    secret: str
    token: str
    container: str = ""
    sts: int = 0
    certificate: str = ""


@dataclass
class Key:
    """Temporary credentials of a role."""

    id: str
    secret: str
    token: str
    expires: int

    @property
    def expiration(self) -> str:
        return datetime.fromtimestamp(self.expires, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def handover(self) -> float:
        return self.expires - HANDOVER


@dataclass
class Used:
    """What happened.

    Attributes
    ----------
    keys
        The keys that signed a request, in the order of their first use, by client.
    expired
        Number of requests that were signed with an expired key, by client.
    commits
        The key that signed each commit of a megabatch.
    asked
        Number of requests for keys, by the kind of endpoint.
    """

    keys: dict[str, list[str]] = field(default_factory=dict)
    expired: dict[str, int] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)


class Keys:
    """The keys of one role, one after the other."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sts = boto3.client(
            "sts",
            endpoint_url=f"http://127.0.0.1:{settings.upstream}",
            region_name=settings.region,
            aws_access_key_id=settings.key,
            aws_secret_access_key=settings.secret,
        )
        self._lock = threading.Lock()
        self._issued: dict[str, Key] = {}
        self._newest: Key | None = None
        self._tokens: list[str] = []
        self.used = Used()
        self._renew_token()

    def current(self, kind: str) -> Key:
        """Return the key that is handed out now."""
        with self._lock:
            self.used.asked[kind] = self.used.asked.get(kind, 0) + 1
            if self._newest is None or time.time() >= self._newest.handover:
                found = self._sts.assume_role(RoleArn=self._settings.role, RoleSessionName="worker")["Credentials"]
                expires = int(time.time()) + LIFETIME
                self._newest = Key(found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"], expires)
                self._issued[self._newest.id] = self._newest
                self._renew_token()
            return self._newest

    def allows(self, token: str) -> bool:
        """Tell whether a client shows a token that is still valid."""
        with self._lock:
            return token in self._tokens[-TOKENS:]

    def is_refused(self, client: str, key: str) -> bool:
        """Note a request that was signed with a key, and tell whether the key is expired."""
        with self._lock:
            signed = self.used.keys.setdefault(client, [])
            if key not in signed:
                signed.append(key)
            if key not in self._issued or time.time() < self._issued[key].expires:
                return False
            self.used.expired[client] = self.used.expired.get(client, 0) + 1
            return True

    def hold(self, key: str) -> None:
        """Note a commit that was signed with a key. For the first ones, wait until another key can be had."""
        with self._lock:
            self.used.commits.append(key)
            if self._newest is None or len(self.used.commits) > HELD_COMMITS:
                return
            left = self._newest.handover - time.time()
        time.sleep(max(left, 0))

    def _renew_token(self) -> None:
        self._tokens.append(f"token-{os.urandom(8).hex()}")
        file = Path(self._settings.token)
        partial = file.with_suffix(".partial")
        partial.write_text(self._tokens[-1])
        partial.replace(file)


class Handler(Forwarding):
    """One connection."""

    server: "Server"  # type: ignore[assignment]

    def handle_any(self) -> None:
        body = self.read_body()
        if self.command == "GET" and self.path.startswith(("/v1/credentials", "/v2/credentials/")):
            self.answer_container()
        elif self.command == "POST" and b"Action=AssumeRoleWithWebIdentity" in body:
            self.answer_sts({name: values[0] for name, values in parse_qs(body.decode()).items()})
        else:
            self.answer_s3(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def answer_container(self) -> None:
        """Answer as the agent of ECS, or EKS Pod Identity, which expects a token."""
        is_eks = self.path.startswith("/v1/")
        if is_eks and not self.server.keys.allows(self.headers.get("Authorization", "")):
            self.answer(401, "application/json", b'{"message": "the token in the request is invalid"}')
            return
        key = self.server.keys.current("eks" if is_eks else "ecs")
        answer = {"AccessKeyId": key.id, "SecretAccessKey": key.secret, "Token": key.token}
        answer |= {"Expiration": key.expiration, **({} if is_eks else {"RoleArn": self.server.settings.role})}
        self.answer(200, "application/json", json.dumps(answer).encode())

    def answer_sts(self, asked: dict[str, str]) -> None:
        """Answer as STS, which expects the token of the service account."""
        if asked.get("RoleArn") != self.server.settings.role or not self.server.keys.allows(asked["WebIdentityToken"]):
            code, message = "InvalidIdentityToken", "The web identity token that was passed could not be validated"
            error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{message}</Message></Error>"
            self.answer(400, "text/xml", f"<ErrorResponse>{error}</ErrorResponse>".encode())
            return
        key = self.server.keys.current("sts")
        fields = {"AccessKeyId": key.id, "SecretAccessKey": key.secret}
        fields |= {"SessionToken": key.token, "Expiration": key.expiration}
        credentials = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
        operation = "AssumeRoleWithWebIdentity"
        result = f"<{operation}Result><Credentials>{credentials}</Credentials></{operation}Result>"
        namespace = 'xmlns="https://sts.amazonaws.com/doc/2011-06-15/"'
        self.answer(200, "text/xml", f"<{operation}Response {namespace}>{result}</{operation}Response>".encode())

    def answer_s3(self, body: bytes) -> None:
        """Answer as S3."""
        client = "boto3" if "Boto3/" in self.headers.get("User-Agent", "") else "tiledb"
        _, _, key = self.headers.get("Authorization", "").partition("Credential=")
        key = key.partition("/")[0]
        if self.server.keys.is_refused(client, key):
            self.answer_error(*EXPIRED)
            return
        if self.command == "PUT" and "/embeddings/__commits/" in self.path:
            self.server.keys.hold(key)
        self.forward(body, None)

    def answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    """Listens at one address."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, settings: Settings, keys: Keys) -> None:
        super().__init__((host, port), Handler)
        self.upstream = settings.upstream
        self.settings = settings
        self.keys = keys


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    keys = Keys(settings)
    servers = [Server("127.0.0.1", settings.port, settings, keys)]
    if settings.container:
        host, _, port = settings.container.partition(":")
        servers.append(Server(host, int(port), settings, keys))
    if settings.sts:
        secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        secure.load_cert_chain(settings.certificate)
        servers.append(Server("127.0.0.1", settings.sts, settings, keys))
        servers[-1].socket = secure.wrap_socket(servers[-1].socket, server_side=True)

    def stop(_signal: int, _frame: FrameType | None) -> None:
        print(json.dumps(asdict(keys.used)), flush=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].serve_forever()


if __name__ == "__main__":
    main()
