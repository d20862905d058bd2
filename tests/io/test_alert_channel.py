"""Messages to SNS and Slack: what arrives, and what an error shows."""

import logging
from collections.abc import Iterator

import pytest

from census_tf_dagster.config.variables import alert_channel, share
from census_tf_dagster.errors import UserError
from census_tf_dagster.io import alert_channel as channel
from census_tf_dagster.io.alert_channel import AlertError, send
from tests.support.alert_receivers import WEBHOOK, Slack, Topic, topic, webhook

__all__ = ["webhook"]

ARN = "arn:aws:sns:us-west-2:123456789012:alerts"


@pytest.fixture(scope="module")
def sns() -> Iterator[Topic]:
    with topic() as made:
        yield made


@pytest.fixture(autouse=True)
def account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


def test_a_message_to_sns(sns: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", sns.endpoint)
    send(sns.arn, "1 shard failed", "Why: ünknown & <odd>")
    send(sns.arn, "\u00fcber\n" + "x" * 200, "y")
    assert sns.received() == [("1 shard failed", "Why: ünknown & <odd>"), ("?ber?" + "x" * 94, "y")]


def test_sns_refuses(sns: Topic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", sns.endpoint)
    with pytest.raises(AlertError, match=r"SNS did not take the message for \S+:gone: .*does not exist"):
        send(sns.arn.replace("alerts", "gone"), "a", "b")


def test_sns_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(AlertError, match="SNS did not take the message"):
        send(ARN, "a", "b")


def test_a_message_to_slack(webhook: Slack) -> None:
    send(WEBHOOK, "1 shard <failed>", "a & b")
    assert webhook.texts == ["*1 shard &lt;failed&gt;*\na &amp; b"]


def test_a_secret_from_a_file_ends_in_a_line_break(webhook: Slack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WEBHOOK, webhook.address + "\n")
    send(WEBHOOK, "a", "b")
    assert len(webhook.texts) == 1


@pytest.mark.parametrize("status", [302, 403, 404, 500])
def test_slack_refuses(webhook: Slack, status: int) -> None:
    webhook.status = status
    with pytest.raises(AlertError, match=f"^Slack did not take the message: HTTP {status}$"):
        send(WEBHOOK, "a", "b")


def test_slack_does_not_answer(webhook: Slack, monkeypatch: pytest.MonkeyPatch) -> None:
    webhook.silent.set()
    monkeypatch.setattr(channel, "ANSWER_SECONDS", 0.2)
    with pytest.raises(AlertError, match=r"^Slack did not take the message: TimeoutError$"):
        send(WEBHOOK, "a", "b")


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "http://hooks.slack.com/services/T000/B000/a-secret",
        "https://hooks.slack.com:notaport/services/T000/B000/a-secret",
        "https://no-such-host.invalid/services/T000/B000/a-secret",
        "https://[a-secret",
        "ftp://127.0.0.1/a-secret",
        "a-secret",
    ],
)
def test_no_error_shows_the_webhook(
    value: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(WEBHOOK, raising=False)
    if value is not None:
        monkeypatch.setenv(WEBHOOK, value)
    caplog.set_level(logging.DEBUG)
    with pytest.raises(AlertError) as caught:
        send(WEBHOOK, "a", "b")
    assert caught.value.__cause__ is None
    for shown in (str(caught.value), caplog.text):
        assert "secret" not in shown.replace("from a secret", "")
        assert "T000" not in shown


# The variables.


@pytest.mark.parametrize("text", ["", ARN, "arn:aws-us-gov:sns:us-gov-west-1:123456789012:a_b-C", "SLACK_WEBHOOK"])
def test_a_right_channel(text: str) -> None:
    assert alert_channel({"X": text}, "X") == text
    assert alert_channel({}, "X") == ""


@pytest.mark.parametrize(
    "text",
    [
        "https://hooks.slack.com/services/T000/B000/a-secret",
        "arn:aws:sqs:us-west-2:123456789012:a-secret",
        f"{ARN}-a-secret.fifo",
        "a-secret",
        "NAME a-secret",
    ],
)
def test_a_wrong_channel_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(UserError, match=r"^CENSUS_TF_ALERTS has a value that is not shown") as caught:
        alert_channel({"CENSUS_TF_ALERTS": text}, "CENSUS_TF_ALERTS")
    assert "a-secret" not in str(caught.value)


def test_shares() -> None:
    assert [share({"X": text}, "X", 0.5) for text in ("0", "0.25", "1", "1.0", "")] == [0.0, 0.25, 1.0, 1.0, 0.5]
    for text in ("1.1", "-0.1", "50%", "nan", "50", "0,5"):
        with pytest.raises(UserError, match=r"^X is '.*'\. Expected a number between 0 and 1"):
            share({"X": text}, "X", 0.5)
