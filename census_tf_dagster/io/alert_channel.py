"""Sends a short message to a topic of Amazon SNS, or to Slack.

What is worth a message belongs in the sensor `alerts`.
"""

import html
import json
import os
import re
from http import HTTPStatus
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

TOPIC = re.compile(r"arn:aws[a-z-]*:sns:([a-z0-9-]+):[0-9]{12}:[A-Za-z0-9_-]{1,256}")
"""The ARN of a topic. The name of a FIFO topic ends in ``.fifo``; its messages would need a group."""
WEBHOOK = re.compile(r"https://|http://127\.0\.0\.1:")
"""The beginning of a webhook's address; without TLS only on this machine."""
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,99}")
CONNECT_SECONDS, ANSWER_SECONDS = 3, 5
SUBJECT_CHARACTERS = 99
"""SNS takes fewer than 100 characters of ASCII (docs.aws.amazon.com/sns/latest/api/API_Publish.html)."""


class AlertError(Exception):
    """A message was not delivered. The text contains no secret."""


def is_channel(text: str) -> bool:
    """Tell whether a text is the ARN of a topic, or can be the name of an environment variable."""
    return bool(TOPIC.fullmatch(text) or VARIABLE.fullmatch(text))


def send(channel: str, subject: str, text: str) -> None:
    """Send one message, in one try of a few seconds.

    Parameters
    ----------
    channel
        The ARN of an SNS topic, or the name of the environment variable that holds the address of a Slack webhook.
        Whoever knows that address can write to Slack, so it is a secret: it is read here and shown nowhere.
    subject
        One line. SNS shows it as the subject of an e-mail.
    text
        The message.

    Raises
    ------
    AlertError
        When the message was not delivered.
    """
    if found := TOPIC.fullmatch(channel):
        _publish(channel, found[1], subject, text)
    else:
        _post(channel, f"*{html.escape(subject, quote=False)}*\n{html.escape(text, quote=False)}")


def _publish(topic: str, region: str, subject: str, text: str) -> None:
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=ANSWER_SECONDS, retries={"total_max_attempts": 1})
    plain = re.sub(r"[^ -~]", "?", subject)[:SUBJECT_CHARACTERS]
    try:
        client = boto3.client("sns", region_name=region, config=config)
        client.publish(TopicArn=topic, Subject=plain, Message=text)
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise AlertError(f"SNS did not take the message for {topic}: {error}") from error


def _post(variable: str, text: str) -> None:
    address = os.environ.get(variable, "").strip()
    if not WEBHOOK.match(address):
        raise AlertError(
            f"the environment variable {variable} of the code server does not hold the https:// address of a Slack "
            "webhook. Set it from a secret, and start the code server again"
        )
    # Texts of errors contain the address, and other HTTP clients log its path.
    try:
        body, kind = json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
        request = Request(address, body, kind)  # noqa: S310 - WEBHOOK allows http(s) only.
        with build_opener(_NoRedirect).open(request, timeout=ANSWER_SECONDS) as answer:
            status = answer.status
    except HTTPError as error:
        status = error.code
        error.close()
    except (OSError, HTTPException, ValueError) as error:
        why = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        raise AlertError(f"Slack did not take the message: {type(why).__name__}") from None
    if status != HTTPStatus.OK:
        raise AlertError(f"Slack did not take the message: HTTP {status}")


class _NoRedirect(HTTPRedirectHandler):
    """Leaves a redirect as it is: following it would send no message."""

    def redirect_request(self, *_: object) -> None:
        return None
