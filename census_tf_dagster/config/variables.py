"""Reads the environment variables of a deployment and checks them. An error is one line that names the variable.

`definitions` says which variables there are; this module knows only their kinds.
"""

import re
from collections.abc import Mapping

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.alert_channel import is_channel
from census_tf_dagster.io.names import CONTROL_CHARACTERS, check_location, without_secrets

RELEASE = "{release}"
"""The part of a Census location that is replaced by the name of a release."""

_ENDPOINT = re.compile(r"https?://([^/?#\s:@\[\]]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?/?")
_REGION = re.compile(r"[a-z0-9-]{0,63}")
SHOWN = 80
"""How many characters of a wrong value an error shows."""


def location(environment: Mapping[str, str], name: str, default: str) -> str:
    """Return a folder or S3 prefix.

    Raises
    ------
    UserError
        When it is neither.
    """
    text = environment.get(name, default)
    try:
        check_location(text)
    except ValueError as error:
        raise _refusal(name, text, str(error)) from None
    return text


def folder(environment: Mapping[str, str], name: str, default: str) -> str:
    """Return a folder of this machine.

    Raises
    ------
    UserError
        When it is not a local path.
    """
    text = location(environment, name, default)
    if text.startswith(("s3://", "file:")):
        raise _refusal(name, text, "Expected a folder of this machine, as a plain path")
    return text


def census_location(environment: Mapping[str, str], name: str, default: str) -> str:
    """Return ``public``, or a folder or S3 prefix with ``{release}`` in it.

    Raises
    ------
    UserError
        When it is neither, or has other braces.
    """
    text = location({name: environment.get(name, default).replace(RELEASE, "release")}, name, default)
    if "{" in text or "}" in text:
        expected = (
            f"Only {RELEASE} is replaced; no other braces are allowed. Expected, for example, s3://census/{RELEASE}"
        )
        raise _refusal(name, environment.get(name, default), expected)
    return environment.get(name, default)


def endpoint(environment: Mapping[str, str], name: str) -> str:
    """Return the address of an S3-compatible server; empty: AWS itself.

    Raises
    ------
    UserError
        When it is not such an address. The message shows no password.
    """
    text = environment.get(name, "")
    if text and not _ENDPOINT.fullmatch(text):
        expected = "Expected http://HOST:PORT or https://HOST[:PORT]; put credentials in AWS's own settings"
        raise _refusal(name, text, expected)
    return text


def web_address(environment: Mapping[str, str], name: str) -> str:
    """Return the http(s) address of a file; empty: the variable is not set.

    Raises
    ------
    UserError
        When it is not an http(s) address, or has a user. The message shows no password.
    """
    text = environment.get(name, "")
    if text and not re.fullmatch(r"https?://[^/\s@]+(/\S*)?", text):
        raise _refusal(name, text, "Expected http(s)://HOST/PATH without user and password")
    return text


def region(environment: Mapping[str, str], name: str, default: str) -> str:
    """Return an AWS region; empty: the one of AWS's own settings.

    Raises
    ------
    UserError
        When it cannot be the name of a region.
    """
    text = environment.get(name, default)
    if not _REGION.fullmatch(text):
        raise _refusal(name, text, "Expected an AWS region such as us-west-2")
    return text


def switch(environment: Mapping[str, str], name: str) -> bool:
    """Return whether a variable is 1 (on).

    Raises
    ------
    UserError
        When it is neither 0, 1 nor empty.
    """
    text = environment.get(name, "")
    if text not in ("", "0", "1"):
        raise _refusal(name, text, "Expected 1 or 0")
    return text == "1"


def share(environment: Mapping[str, str], name: str, default: float) -> float:
    """Return a share of a whole.

    Raises
    ------
    UserError
        When it is no number between 0 and 1.
    """
    text = environment.get(name, "") or str(default)
    if not re.fullmatch(r"0(\.[0-9]{1,6})?|1(\.0{1,6})?", text):
        raise _refusal(name, text, f"Expected a number between 0 and 1, such as {default}")
    return float(text)


def alert_channel(environment: Mapping[str, str], name: str) -> str:
    """Return the ARN of an SNS topic, or the name of a variable; empty: the variable is not set.

    Raises
    ------
    UserError
        When it is neither. The message does not show it, because it may be the address of a webhook.
    """
    text = environment.get(name, "")
    if text and not is_channel(text):
        raise UserError(
            f"{name} has a value that is not shown, because it may be a secret. Expected the ARN of an SNS topic, or "
            "the NAME of an environment variable that holds the address of a Slack webhook. Put the address there."
        )
    return text


def _refusal(name: str, text: str, why: str) -> UserError:
    shown = repr(CONTROL_CHARACTERS.sub("?", without_secrets(text)))
    return UserError(f"{name} is {shown if len(shown) <= SHOWN else f'{shown[:SHOWN]}...'}. {why}.")
