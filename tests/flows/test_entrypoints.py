"""The flows as deployments run them: their names, the command that repeats them, and when they give up."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.runtime import deployment, flow_run

from covercal.errors import CovercalError
from flows import entrypoints
from storage.artifacts import ArtifactStore
from storage.runs import read_runs

WriteRecipe = Callable[..., Path]


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that says which flow run this is."""

    def say(flow: str = "quantize", name: str | None = None, count: int = 1, **parameters: Any) -> None:
        monkeypatch.setattr(flow_run, "get_flow_name", lambda: flow)
        monkeypatch.setattr(flow_run, "get_parameters", lambda: parameters)
        monkeypatch.setattr(flow_run, "get_run_count", lambda: count)
        monkeypatch.setattr(deployment, "get_name", lambda: name)
        monkeypatch.setattr(deployment, "get_id", lambda: name)

    return say


def test_a_run_is_called_by_what_it_does(write_recipe: WriteRecipe, inside: Callable[..., None]) -> None:
    path = str(write_recipe(sweep={"selection.budget": [2, 4]}))
    inside("quantize", recipe=path, budget=2, method="gptq", changes=["quantization.bits=3"])
    assert entrypoints.quantize.flow_run_name() == "quantize model · gptq w3 g16 · coverage@2"
    inside("sweep", recipe=path)
    assert entrypoints.sweep.flow_run_name() == "sweep model · budget"
    inside("audit", recipe=path, calibration="/data/mine.jsonl")
    assert entrypoints.audit.flow_run_name() == "audit model · /data/mine.jsonl"


@pytest.mark.parametrize("name", ["quantize", "sweep", "audit"])
def test_a_run_of_a_recipe_that_is_wrong_has_a_name_too(inside: Callable[..., None], name: str) -> None:
    inside(name, recipe="/nowhere.yaml", calibration="/data/mine.jsonl")
    assert getattr(entrypoints, name).flow_run_name() == f"{name} · /nowhere.yaml"


def test_the_command_of_a_deployment_repeats_it_with_its_parameters(inside: Callable[..., None]) -> None:
    inside("quantize", "covercal", recipe="/recipes/a.yaml", budget=None, changes=[], method="gptq")
    words = shlex.split(entrypoints._command())
    assert words[:4] == ["prefect", "deployment", "run", "quantize/covercal"]
    assert json.loads(words[5]) == {"recipe": "/recipes/a.yaml", "method": "gptq"}


@pytest.mark.parametrize(
    ("name", "count", "gives_up"), [("covercal", 5, False), ("covercal", 6, True), (None, 6, False)]
)
def test_a_deployed_run_that_was_lost_five_times_gives_up(
    inside: Callable[..., None], name: str | None, count: int, gives_up: bool
) -> None:
    inside("quantize", name, count)
    if not gives_up:
        entrypoints._check_begun()
        return
    with pytest.raises(CovercalError, match="has begun 5 times, and its worker was lost each time"):
        entrypoints._check_begun()


def test_a_flow_that_nobody_typed_keeps_its_record_and_its_page(
    write_recipe: WriteRecipe, store: ArtifactStore, prefect_server: None
) -> None:
    state = entrypoints.quantize(str(write_recipe(evaluation={"divergence": []})), budget=2, return_state=True)
    found = state.result()
    (record,) = read_runs(store.root)
    assert record.state == "completed"
    assert record.recipe["selection"]["budget"] == 2
    assert record.command == "prefect flow quantize"
    assert found.report.read_text(encoding="utf-8").count("prefect flow quantize") >= 1


def test_a_flow_that_fails_keeps_its_record_with_the_reason(
    write_recipe: WriteRecipe, store: ArtifactStore, prefect_server: None
) -> None:
    state = entrypoints.quantize(str(write_recipe(quantization={"group_size": 7})), return_state=True)
    assert state.is_failed()
    (record,) = read_runs(store.root)
    assert record.state == "failed"
    assert "group_size 7 does not divide" in record.error
    assert not (store.root / "objects" / "statistics").exists()
