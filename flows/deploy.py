"""Registering covercal on a Prefect server."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covercal.errors import CovercalError, InputError
from flows.notify import NOTIFY
from flows.server import configured_server, set_prefect_defaults

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

POOL = "covercal"
TAG = "covercal"
WEBHOOK = "covercal"
DEPLOYMENTS = ("quantize/covercal", "sweep/covercal", "audit/covercal")
SCHEDULED = "quantize/covercal"
LOST_AFTER = timedelta(seconds=100)  # three heartbeats, whose frequency is set in deployments/prefect.yaml
REFUSED = (401, 403)


@dataclass(frozen=True, slots=True)
class Deployed:
    """What was registered.

    Attributes
    ----------
    deployments
        Names, each with its page on the dashboard.
    recipe
        What runs have unless they are given another; may be empty.
    at_once
        How many runs of the work pool go on at the same time; None: no limit.
    nightly
        Whether the nightly run is switched on.
    """

    deployments: dict[str, str]
    recipe: str
    at_once: int | None
    nightly: bool


def deploy(
    recipe: Path | None = None, *, at_once: int | None = None, webhook: str | None = None, nightly: bool | None = None
) -> Deployed:
    """Register work pool, deployments, and what begins lost runs again, on the server of `PREFECT_API_URL`.

    What is there already is brought up to date; a schedule that somebody switched on stays on.

    Parameters
    ----------
    recipe
        The recipe that runs have unless they are given another; a path on the workers' machines. None: as before.
    at_once
        How many runs of the pool go on at the same time. A new pool has 1.
    webhook
        Address that is told of runs that fail.
    nightly
        Switch the nightly run of `recipe` on or off; None leaves it.

    Raises
    ------
    InputError
        When no server is named, or there would be nothing to run at night.
    CovercalError
        When the server does not answer or refuses.
    """
    if not configured_server():
        raise InputError(
            "PREFECT_API_URL names no server to deploy to; set it, such as http://127.0.0.1:4200/api, "
            "or use `covercal serve` on this machine alone."
        )
    set_prefect_defaults()
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.utilities.asyncutils import run_coro_as_sync

    async def register() -> Deployed:
        async with get_client() as client:
            await _ensure_pool(client, at_once)
            notified = await _ensure_webhook(client, webhook)
            before = {name: await _read(client, name) for name in DEPLOYMENTS}
            on = _switched_on(before)
            _prefect_deploy(await _recipe(client, recipe), notified=notified)
            wanted = on | {SCHEDULED} if nightly else on - {SCHEDULED} if nightly is False else on
            await _keep_times(client, before)
            await _activate(client, wanted)
            await _ensure_automations(client)
            return await _deployed(client)

    try:
        found = run_coro_as_sync(register())
    except PrefectHTTPStatusError as cause:
        answer = f"{cause.response.status_code} {cause.response.reason_phrase}"
        hint = " PREFECT_API_AUTH_STRING holds `user:password`." if cause.response.status_code in REFUSED else ""
        raise CovercalError(f"The Prefect server at {configured_server()} refuses: {answer}.{hint}") from cause
    except httpx.HTTPError as cause:
        raise CovercalError(
            f"The Prefect server at {configured_server()} does not answer ({_first_line(cause)}); is it running?"
        ) from cause
    assert found is not None
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


async def _ensure_pool(client: "PrefectClient", at_once: int | None) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        await client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        words = "Runs of covercal. Its limit is how many models are worked on at the same time."
        pool = WorkPoolCreate(
            name=POOL,
            type=ProcessWorker.type,
            description=words,
            base_job_template=template,
            concurrency_limit=at_once or 1,
        )
        await client.create_work_pool(pool)
        return
    if at_once is not None:
        await client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=at_once))


async def _ensure_webhook(client: "PrefectClient", address: str | None) -> bool:
    """Return whether there is a block that is told of failed runs."""
    from prefect.blocks.webhook import Webhook
    from prefect.exceptions import ObjectNotFound

    if address:
        await Webhook(url=address).save(WEBHOOK, overwrite=True)
        return True
    with suppress(ObjectNotFound):
        await client.read_block_document_by_name(WEBHOOK, "webhook")
        return True
    return False


async def _read(client: "PrefectClient", name: str) -> "DeploymentResponse | None":
    from prefect.exceptions import ObjectNotFound

    with suppress(ObjectNotFound):
        return await client.read_deployment_by_name(name)
    return None


def _switched_on(deployments: Mapping[str, Any]) -> set[str]:
    """Return the deployments whose schedule somebody has switched on: to deploy again would switch it off."""
    return {name for name, each in deployments.items() if each and any(schedule.active for schedule in each.schedules)}


async def _keep_times(client: "PrefectClient", before: Mapping[str, Any]) -> None:
    """Put back the times that schedules had: to deploy again has set those of `prefect.yaml`."""
    for name, each in before.items():
        found = await _read(client, name)
        if each is None or found is None:
            continue
        times = {schedule.slug: schedule.schedule for schedule in each.schedules}
        for schedule in found.schedules:
            if times.get(schedule.slug, schedule.schedule) != schedule.schedule:
                await client.update_deployment_schedule(found.id, schedule.id, schedule=times[schedule.slug])


async def _recipe(client: "PrefectClient", given: Path | None) -> str:
    """Return the recipe that runs have by default: the one given, else the one they had."""
    if given is not None:
        return str(given.absolute())
    before = await _read(client, SCHEDULED)
    return str(before.parameters.get("recipe", "")) if before else ""


def _prefect_deploy(recipe: str, *, notified: bool) -> None:
    """Let Prefect read `deployments/prefect.yaml`."""
    given = {"COVERCAL_RECIPE": recipe} if recipe else {}
    if notified and not os.environ.get(NOTIFY):
        given[NOTIFY] = f"webhook/{WEBHOOK}"
    with as_file(files("deployments") / "prefect.yaml") as path:
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
        done = subprocess.run(
            command, env={**os.environ, **given}, capture_output=True, text=True, check=False, cwd=path.parent
        )
    if done.returncode:
        raise CovercalError(f"Prefect could not register the deployments:\n{done.stdout}{done.stderr}".rstrip())


async def _activate(client: "PrefectClient", wanted: set[str]) -> None:
    for name in wanted:
        found = await _read(client, name)
        if found is None:
            continue
        if not found.parameters.get("recipe"):
            raise InputError(f"{name} has no recipe to run at night: covercal deploy RECIPE --nightly")
        for schedule in found.schedules:
            await client.update_deployment_schedule(found.id, schedule.id, active=True)


async def _ensure_automations(client: "PrefectClient") -> None:
    """Let the server put lost runs back into the queue: another worker goes on from what is finished.

    A run is lost when it has crashed (its process is gone, and somebody was left to say so), or has fallen silent (its
    machine is gone).
    """
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    ended = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed", "Cached")}
    ours = {
        "match": ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        "match_related": ResourceSpecification(
            {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{TAG}"}
        ),
        "for_each": {"prefect.resource.id"},
        "threshold": 1,
    }
    crashed = EventTrigger(
        **ours, expect={"prefect.flow-run.Crashed"}, posture=Posture.Reactive, within=timedelta(seconds=0)
    )
    silent = EventTrigger(
        **ours,
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *ended},
        posture=Posture.Proactive,
        within=LOST_AFTER,
    )
    wanted = {
        "covercal: a crashed run begins again": (crashed, "The run's process was lost"),
        "covercal: a silent run begins again": (silent, f"Nothing was heard of the run for {LOST_AFTER.seconds} s"),
    }
    for name, (trigger, why) in wanted.items():
        words = f"{why}; the next worker goes on from what is finished."
        again = ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=words, force=True)
        automation = AutomationCore(name=name, description=words, trigger=trigger, actions=[again])
        found = await client.read_automations_by_name(name)
        if not found:
            await client.create_automation(automation)
        elif any(
            getattr(found[0], part) != getattr(automation, part) for part in ("trigger", "actions", "description")
        ):
            await client.update_automation(found[0].id, automation)  # it forgets which runs it waits for


async def _deployed(client: "PrefectClient") -> Deployed:
    from prefect.settings import get_current_settings

    pool = await client.read_work_pool(POOL)
    ui = get_current_settings().ui_url
    pages = {}
    for name in DEPLOYMENTS:
        found = await client.read_deployment_by_name(name)
        pages[name] = f"{ui}/deployments/deployment/{found.id}" if ui else ""
    recipe = await _recipe(client, None)
    return Deployed(
        pages, recipe, pool.concurrency_limit, SCHEDULED in _switched_on({SCHEDULED: await _read(client, SCHEDULED)})
    )
