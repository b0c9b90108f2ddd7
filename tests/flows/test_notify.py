"""Telling people that a run failed."""

import logging
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.blocks.notifications import NotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows.notify import DEPLOYED_NOTIFY, NOTIFY, failure_message, notify

RUN = FlowRun(id=UUID(int=7), flow_id=UUID(int=1), name="quantize model · gptq w4 g64 · coverage@64")
STATE = State(type=StateType.FAILED, name="Failed", message="The pool is empty.")


@flow
def some_flow() -> None:
    """A flow."""


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NOTIFY, DEPLOYED_NOTIFY):
        monkeypatch.delenv(name, raising=False)


def test_a_message_is_a_sentence_and_its_parts() -> None:
    found = failure_message(RUN, STATE)
    assert found["text"].startswith("covercal: quantize model · gptq w4 g64 · coverage@64 failed. The pool is empty.")
    assert (found["run"], found["state"], found["message"]) == (RUN.name, "Failed", "The pool is empty.")
    assert not found["url"] or found["url"].endswith(str(RUN.id))


def test_without_a_block_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.notify._send", None)  # calling it would fail
    notify(some_flow, RUN, STATE)


def test_a_block_of_any_notification_gets_text_and_subject(
    monkeypatch: pytest.MonkeyPatch, prefect_server: None
) -> None:
    told: list[tuple[str, str | None]] = []

    class Mail(NotificationBlock):
        """Keeps what it is told."""

        async def notify(self, body: str, subject: str | None = None) -> None:
            told.append((body, subject))

    Mail().save("team", overwrite=True)
    monkeypatch.setenv("COVERCAL_NOTIFY", "mail/team")
    notify(some_flow, RUN, STATE)
    ((body, subject),) = told
    assert "The pool is empty." in body
    assert subject == f"covercal: {RUN.name}"


@pytest.mark.parametrize(
    ("own", "deployed", "told"),
    [("mail/own", "webhook/covercal", ["mail/own"]), ("", "webhook/covercal", ["webhook/covercal"]), ("", "", [])],
)
def test_what_a_worker_says_itself_goes_before_what_was_deployed(
    monkeypatch: pytest.MonkeyPatch, own: str, deployed: str, told: list[str]
) -> None:
    found: list[str] = []

    async def send(name: str, message: dict[str, Any]) -> None:
        found.append(name)

    monkeypatch.setattr("flows.notify._send", send)
    monkeypatch.setenv(NOTIFY, own)
    monkeypatch.setenv(DEPLOYED_NOTIFY, deployed)
    notify(some_flow, RUN, STATE)
    assert found == told


@pytest.mark.parametrize("name", ["webhook/nobody", "webhook/closed"])
def test_a_message_that_cannot_be_sent_is_said_in_the_log_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, prefect_server: None, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    Webhook(url="http://127.0.0.1:1/").save("closed", overwrite=True)
    monkeypatch.setenv("COVERCAL_NOTIFY", name)
    seen: list[Any] = []
    monkeypatch.setattr(logging.Logger, "error", lambda self, text, *values: seen.append(text % values))
    notify(some_flow, RUN, STATE)
    (text,) = seen
    assert f"Nobody was told that {RUN.name} failed: the block {name} did not take the message" in text
