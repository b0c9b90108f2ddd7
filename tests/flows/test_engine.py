"""Where the tasks of a flow run, and what becomes of settings that name nothing."""

import pickle
import sys

import pytest
from prefect.task_runners import ThreadPoolTaskRunner

from covercal.errors import InputError
from flows.engine import cells_at_once, task_runner
from tests.tasks.test_cached import every_step

VARIABLES = ("COVERCAL_TASK_RUNNER", "COVERCAL_CLUSTER", "COVERCAL_WORKERS")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_by_default_one_task_after_the_other_runs_in_this_process(settings: pytest.MonkeyPatch) -> None:
    found = task_runner()
    assert isinstance(found, ThreadPoolTaskRunner)
    assert found._max_workers == 1
    assert cells_at_once() == 1


def test_dask_uses_the_cluster_that_is_named(settings: pytest.MonkeyPatch) -> None:
    from prefect_dask import DaskTaskRunner

    settings.setenv("COVERCAL_TASK_RUNNER", "dask")
    settings.setenv("COVERCAL_CLUSTER", "tcp://there:8786")
    found = task_runner()
    assert isinstance(found, DaskTaskRunner)
    assert found.address == "tcp://there:8786"


def test_dask_starts_as_many_processes_as_it_is_told_each_with_one_thread(settings: pytest.MonkeyPatch) -> None:
    settings.setenv("COVERCAL_TASK_RUNNER", "dask")
    settings.setenv("COVERCAL_WORKERS", "3")
    found = task_runner()
    assert found.address is None
    assert found.cluster_kwargs["n_workers"] == 3
    assert found.cluster_kwargs["threads_per_worker"] == 1
    assert cells_at_once() == 3


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("COVERCAL_TASK_RUNNER", "dusk", "is 'dusk'; it is one of threads, dask, ray"),
        ("COVERCAL_WORKERS", "none", "is 'none'; it is a number of workers, at least 1"),
        ("COVERCAL_WORKERS", "0", "is '0'; it is a number of workers, at least 1"),
    ],
)
def test_a_wrong_setting_is_named(settings: pytest.MonkeyPatch, variable: str, value: str, words: str) -> None:
    settings.setenv("COVERCAL_TASK_RUNNER", "dask")
    settings.setenv(variable, value)
    with pytest.raises(InputError, match=words):
        task_runner()


@pytest.mark.parametrize("name", ["dask", "ray"])
def test_a_runner_that_is_not_installed_says_how_to_get_it(settings: pytest.MonkeyPatch, name: str) -> None:
    settings.setenv("COVERCAL_TASK_RUNNER", name)
    settings.setitem(sys.modules, f"prefect_{name}", None)
    with pytest.raises(InputError, match=rf"install covercal with the extra `{name}`"):
        task_runner()


def test_every_step_travels_as_its_name() -> None:
    steps = list(every_step())
    assert len(steps) > 10
    for step in steps:
        sent = pickle.dumps(step)
        assert pickle.loads(sent) is step
        assert len(sent) < 200
