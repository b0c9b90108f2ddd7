"""Telling people that a run failed, through a block on the Prefect server."""

import os
from typing import Any

from prefect import Flow
from prefect.blocks.core import Block
from prefect.blocks.webhook import Webhook
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging import get_logger
from prefect.settings import get_current_settings
from prefect.utilities.asyncutils import run_coro_as_sync

from tasks.settings import apply_settings

NOTIFY = "COVERCAL_NOTIFY"
DEPLOYED_NOTIFY = "COVERCAL_DEPLOYED_NOTIFY"  # what a deployment says, for workers that say nothing


def failure_message(flow_run: FlowRun, state: State[Any]) -> dict[str, Any]:
    """Return what a webhook is sent: a sentence (`text`, which chats show) and its parts."""
    ui = get_current_settings().ui_url
    link = f"{ui}/runs/flow-run/{flow_run.id}" if ui else ""
    sentence = (
        f"covercal: {flow_run.name} {state.name.lower() if state.name else 'failed'}. {state.message or ''}".strip()
    )
    return {
        "text": f"{sentence} {link}".strip(),
        "run": flow_run.name,
        "state": state.name,
        "message": state.message,
        "url": link,
    }


def notify(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Send a failed or crashed run's message to the block that the worker's `COVERCAL_NOTIFY` or the deployment names.

    Without one, nobody is told. A message that cannot be sent is an error in the log, and changes nothing of the run.
    """
    apply_settings()
    name = os.environ.get(NOTIFY) or os.environ.get(DEPLOYED_NOTIFY)
    if not name:
        return
    try:
        run_coro_as_sync(_send(name, failure_message(flow_run, state)))
    except Exception as error:  # the run has ended; what it says must stay its own failure
        get_logger("covercal.notify").error(
            "Nobody was told that %s failed: the block %s did not take the message (%s: %s). "
            "`covercal deploy --webhook URL` makes one.",
            *(flow_run.name, name, type(error).__name__, error),
        )


async def _send(name: str, message: dict[str, Any]) -> None:
    block: Any = await Block.aload(name)
    if isinstance(block, Webhook):
        response = await block.call(message)
        response.raise_for_status()
    else:  # Slack, Teams, mail …: every notification block has this
        await block.notify(message["text"], subject=f"covercal: {message['run']}")
