"""Sends GraphQL queries to a deployment's webserver over HTTP, and turns every kind of failure into a `UserError`."""

import re
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import requests

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import without_secrets
from census_tf_dagster.io.proxies import is_loopback, proxy_for

SHOWN = 80
"""How many characters of a wrong address an error shows."""

TIMEOUT_SECONDS = (5.0, 60.0)
"""The time to connect, and the time to wait for an answer."""


class NoAnswerError(UserError):
    """The webserver does not answer now. It may answer later."""


@dataclass(frozen=True)
class Deployment:
    """A running deployment: the address of its webserver, without a trailing slash."""

    url: str

    @classmethod
    def at(cls, url: str) -> Self:
        """Make a deployment from the address that an operator typed.

        Raises
        ------
        UserError
            When it is not an http(s) address, or has a user. The message shows no password.
        """
        if not re.fullmatch(r"https?://([^/?#\s:@]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[^?#\s]*)?", url, re.ASCII):
            raise UserError(
                f"the webserver's address is {without_secrets(url)[:SHOWN]!r}; expected http://HOST:PORT or "
                "https://HOST[/PATH], without user and password. Correct --url or CENSUS_TF_DAGSTER_URL."
            )
        return cls(url.rstrip("/").removesuffix("/graphql"))

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """Send one query or mutation, and return its data.

        Raises
        ------
        NoAnswerError
            When nothing answers, or a proxy answers that the webserver is not up.
        UserError
            When the answer is not GraphQL, or reports that the query failed.
        """
        proxy = proxy_for(self.url)
        through = f" through the proxy {without_secrets(proxy)}" if proxy else ""
        hint = " Or name the host in NO_PROXY, if it needs no proxy." if proxy else ""
        try:
            response = requests.post(
                f"{self.url}/graphql",
                json={"query": query, "variables": variables},
                timeout=TIMEOUT_SECONDS,
                # Requests to this host do not use a proxy.
                proxies={"no_proxy": str(urlsplit(self.url).hostname)} if is_loopback(self.url) else None,
            )
        except requests.RequestException as error:
            raise NoAnswerError(
                f"no answer from the webserver at {self.url}{through} ({type(error).__name__}): start it "
                "(`dagster-webserver -w workspace.yaml`, or `dagster dev`), or give the address of another one with "
                f"--url or CENSUS_TF_DAGSTER_URL.{hint}"
            ) from error
        code = f"HTTP {response.status_code}{through}"
        if response.status_code in (502, 503, 504):
            raise NoAnswerError(f"the webserver at {self.url} is not up: {code}. Try again.{hint}")
        try:
            answer = response.json()
        except requests.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {"data", "errors"}:
            raise UserError(
                f"{self.url}/graphql answers {code} without GraphQL; expected the address of a dagster-webserver. Give "
                f"it with --url or CENSUS_TF_DAGSTER_URL.{hint}"
            )
        if answer.get("errors"):
            messages = "; ".join(str(error.get("message", error)) for error in answer["errors"][:3])
            raise UserError(
                f"the webserver at {self.url} refuses a query: {messages}. Expected Dagster 1.13. Check its version."
            )
        data: dict[str, Any] = answer["data"]
        return data


def expect(answer: Any, kind: str, doing: str) -> dict[str, Any]:
    """Return a member of a GraphQL union if it is of the kind that means success.

    Raises
    ------
    UserError
        When it is another kind, such as ``PythonError``. The message includes Dagster's own.
    """
    if isinstance(answer, dict) and answer.get("__typename") == kind:
        return answer
    found = answer.get("__typename") if isinstance(answer, dict) else answer
    message = answer.get("message") if isinstance(answer, dict) else None
    raise UserError(f"{doing}: Dagster answers {found}, expected {kind}. {message or ''}".rstrip())
