"""Where the tasks of a flow run: in this process, or on the workers of a Dask or Ray cluster."""

import os
from typing import TYPE_CHECKING, Any

from covercal.errors import InputError
from tasks.settings import apply_settings

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

    Runner = TaskRunner[Any]

RUNNER = "COVERCAL_TASK_RUNNER"
CLUSTER = "COVERCAL_CLUSTER"
WORKERS = "COVERCAL_WORKERS"
RUNNERS = ("threads", "dask", "ray")
LOCAL_WORKERS = 2


def task_runner() -> "Runner":
    """Return the Prefect task runner that the settings name.

    `threads` runs one task after the other: one model on one device, and a second task would only wait for it. `dask`
    and `ray` use the cluster at `COVERCAL_CLUSTER`, or start `COVERCAL_WORKERS` processes on this machine. Tasks
    carry references; artifacts travel through the store, so that the workers need the same `COVERCAL_CACHE`, or
    one `COVERCAL_REMOTE` that all of them write to.

    Raises
    ------
    InputError
        When there is no such runner, or it is not installed.
    """
    apply_settings()
    name = _runner()
    if name == "dask":
        return _dask()
    if name == "ray":
        return _ray()
    from prefect.task_runners import ThreadPoolTaskRunner

    return ThreadPoolTaskRunner(max_workers=1)


def cells_at_once() -> int:
    """Return how many cells of a sweep go on at the same time: one for each worker."""
    apply_settings()
    return 1 if _runner() == "threads" else _workers()


def _runner() -> str:
    name = os.environ.get(RUNNER, RUNNERS[0])
    if name not in RUNNERS:
        raise InputError(f"{RUNNER} is {name!r}; it is one of {', '.join(RUNNERS)}.")
    return name


def _workers() -> int:
    text = os.environ.get(WORKERS, str(LOCAL_WORKERS))
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{WORKERS} is {text!r}; it is a number of workers, at least 1.")
    return int(text)


def _dask() -> "Runner":
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as cause:
        raise InputError(f"{RUNNER} is dask, which is missing; install covercal with the extra `dask`.") from cause
    address = os.environ.get(CLUSTER)
    local = {"n_workers": _workers(), "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    found: Runner = DaskTaskRunner(address=address) if address else DaskTaskRunner(cluster_kwargs=local)
    return found


def _ray() -> "Runner":
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as cause:
        raise InputError(f"{RUNNER} is ray, which is missing; install covercal with the extra `ray`.") from cause
    address = os.environ.get(CLUSTER)
    found: Runner = RayTaskRunner(address=address) if address else RayTaskRunner(init_kwargs={"num_cpus": _workers()})
    return found
