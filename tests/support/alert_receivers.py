"""Receivers of alerts: an SNS topic with a subscriber on moto, and a server that answers like Slack's webhooks."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.http_server import QuietHandler, served
from tests.support.moto_servers import client, moto_server

WEBHOOK = "TEST_SLACK_WEBHOOK"


@dataclass(frozen=True)
class Topic:
    """An SNS topic whose messages go to a queue."""

    endpoint: str
    arn: str
    queue: str

    def received(self) -> list[tuple[str, str]]:
        """Take the subjects and texts that came since the last call."""
        sqs, found = client(self.endpoint, "sqs"), []
        while messages := sqs.receive_message(QueueUrl=self.queue, MaxNumberOfMessages=10).get("Messages", []):
            for one in messages:
                body = json.loads(one["Body"])
                found.append((body["Subject"], body["Message"]))
                sqs.delete_message(QueueUrl=self.queue, ReceiptHandle=one["ReceiptHandle"])
        return found


@contextmanager
def topic() -> Iterator[Topic]:
    with moto_server() as endpoint:
        sns, sqs = client(endpoint, "sns"), client(endpoint, "sqs")
        arn = sns.create_topic(Name="alerts")["TopicArn"]
        queue = sqs.create_queue(QueueName="alerts")["QueueUrl"]
        attributes = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]
        sns.subscribe(TopicArn=arn, Protocol="sqs", Endpoint=attributes["QueueArn"])
        yield Topic(endpoint, arn, queue)


@dataclass
class Slack:
    """A webhook. `status` is its answer; while `silent` is not set, it answers."""

    address: str = ""
    status: int = 200
    silent: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    texts: list[str] = field(default_factory=list)


@contextmanager
def slack() -> Iterator[Slack]:
    found = Slack()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if found.silent.is_set():
                found.ended.wait()
            elif found.status == 200:
                found.texts.append(body["text"])
            self.reply(found.status, "text/plain", b"ok" if found.status == 200 else b"no_service")

    with served(Handler) as port:
        found.address = f"http://127.0.0.1:{port}/services/T000/B000/a-secret"
        try:
            yield found
        finally:
            found.ended.set()


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slack]:
    """A webhook whose address is in the variable `WEBHOOK`."""
    with slack() as found:
        monkeypatch.setenv(WEBHOOK, found.address)
        yield found
