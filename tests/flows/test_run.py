"""The whole chain on a tiny model: what is computed, what is cached, and what a user is told."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from covercal.errors import ActivationError, InputError
from covercal.recipe import load_recipe, plain
from flows import entrypoints
from flows.chain import Chain, run_chain
from flows.choosing import shown_selectors
from flows.display import Display, row_details
from flows.execution import Direct, Event, Recorder
from flows.inputs import identify
from flows.plan import plan
from flows.record import Finished, Running
from flows.report import build_times, conclude
from flows.run import execute, execute_sweep
from flows.summary import checkpoint_lines, stage_rows
from storage.artifacts import ArtifactStore
from storage.errors import StorageError
from storage.runs import read_runs
from tests import tiny

WriteRecipe = Callable[..., Path]


def run_here(path: Path, store: ArtifactStore, *overrides: str) -> tuple[Chain, dict[str, dict[str, Any]]]:
    """Run a recipe in this process without Prefect; return its artifacts and its rows by stage."""
    recipe = load_recipe(path, overrides)
    recorder = Recorder()
    execution = Direct(store, recorder)
    chain = run_chain(recipe, identify(recipe, store), execution, until="report")
    conclude(recipe, chain, execution, recorder.events, until="report")
    return chain, {row["stage"]: row for row in stage_rows(recorder.events)}


def plan_here(path: Path, store: ArtifactStore, *overrides: str) -> dict[str, dict[str, Any]]:
    """Plan a recipe; return its rows by stage."""
    recipe = load_recipe(path, overrides)
    recorder = Recorder()
    plan(recipe, store, recorder)
    return {row["stage"]: row for row in stage_rows(recorder.events)}


def run_through_prefect(path: Path, store: ArtifactStore, *overrides: str) -> Finished:
    """Run a recipe the way the command line does."""
    console = Console(stderr=True)
    return execute(load_recipe(path, overrides), store, console, command="covercal run recipe.yaml")


@contextmanager
def counted_sequences(length: int) -> Iterator[list[int]]:
    """Count the sequences of `length` tokens that go through a whole model body while this is open."""
    seen: list[int] = []
    inside: list[int] = []

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if type(module).__name__ == "LlamaModel":
            inside.append(kwargs["input_ids"].shape[1])
        is_block = type(module).__name__ == "LlamaDecoderLayer" and "forward" not in vars(module)
        if is_block and inside == [length] and module.self_attn.layer_idx == 0:
            seen.append(args[0].shape[0])

    def leave(module: nn.Module) -> None:
        if type(module).__name__ == "LlamaModel":
            inside.pop()

    original = nn.Module.__call__

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        enter(module, args, kwargs)
        try:
            return original(module, *args, **kwargs)
        finally:
            leave(module)

    nn.Module.__call__ = called
    try:
        yield seen
    finally:
        nn.Module.__call__ = original


def test_a_first_run_builds_every_stage_and_its_checkpoint_loads(
    write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    chain, rows = run_here(write_recipe(), store)
    assert {row["decision"] for row in rows.values()} == {"built"}
    assert list(rows) == [
        *("pool", "texts", "statistics", "outliers", "selection", "measures", "rivals", "overview", "reference"),
        *("nearest", "checkpoint", "random choice", "random", "evaluation", "layers", "report"),
    ]
    model = AutoModelForCausalLM.from_pretrained(store.path(chain.checkpoint))
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()


def test_what_a_checkpoint_is_not_is_told_below_its_place() -> None:
    told = {
        "loader": "AutoModelForImageTextToText",
        "own_code": False,
        "why_dense": "salient weights have a grid of their own",
        "left_out": "of a model that sees [..] only words",
    }
    lines = checkpoint_lines({"checkpoint": "/cache/[a]", "quantization": told})
    assert [Text.from_markup(line).plain.strip() for line in lines] == [
        "Checkpoint   /cache/[a]",
        "loads with AutoModelForImageTextToText.from_pretrained(that folder)",
        "dense, of the original's size: salient weights have a grid of their own",
        "of a model that sees [..] only words",
    ]
    told |= {"why_dense": "", "left_out": "", "own_code": True}
    assert checkpoint_lines({"checkpoint": "x", "quantization": told})[1:] == [
        f"{'':13}loads with AutoModelForImageTextToText.from_pretrained(that folder, trust_remote_code=True)"
    ]


def test_an_unchanged_recipe_hits_everywhere(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    path = write_recipe()
    run_here(path, store)
    assert {row["decision"] for row in plan_here(path, store).values()} == {"hit"}
    with counted_sequences(32) as seen:
        _, rows = run_here(path, store)
    assert {row["decision"] for row in rows.values()} == {"hit"}
    assert seen == []


def test_the_counter_of_forward_passes_sees_the_capture(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    with counted_sequences(32) as seen:
        run_here(write_recipe(evaluation={"divergence": []}), store)
    assert sum(seen) == 16


def test_another_budget_runs_nothing_over_the_pool(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    path = write_recipe(evaluation={"divergence": []})
    run_here(path, store)
    planned = plan_here(path, store, "selection.budget=2")
    with counted_sequences(32) as seen:
        _, rows = run_here(path, store, "selection.budget=2")
    assert seen == []
    new = ["measures", "rivals", "overview", "checkpoint", "report"]
    assert [name for name, row in rows.items() if row["decision"] != "hit"] == new
    assert [name for name, row in planned.items() if row["decision"] != "hit"] == new
    assert rows["rivals"]["counts"]["built"] == 1  # cola alone has no one order for all budgets
    assert "calibration.tokens" in planned["checkpoint"]["reason"]


def test_twice_the_samples_captures_only_the_new_shards(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    path = write_recipe(evaluation={"divergence": []})
    run_here(path, store)
    planned = plan_here(path, store, "pool.samples=32")
    with counted_sequences(32) as seen:
        _, rows = run_here(path, store, "pool.samples=32")
    assert planned["statistics"]["counts"] == {"build": 2, "hit": 2}
    assert rows["statistics"]["counts"] == {"built": 2, "hit": 2}
    assert sum(seen) == 16


def test_the_plan_names_the_field_that_makes_a_stage_run(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    path = write_recipe()
    run_here(path, store)
    assert plan_here(path, store, "outliers.k=3")["outliers"]["reason"] == "outliers.k: 2.0 -> 3.0"
    assert plan_here(path, store, "outliers.weighting=magnitude")["outliers"]["reason"] == (
        "outliers.weighting: full -> magnitude"
    )
    bits = plan_here(path, store, "quantization.bits=3")
    assert bits["nearest"]["reason"] == "quantization.bits: 4 -> 3"
    assert bits["checkpoint"]["reason"] == "quantization.bits: 4 -> 3"
    assert bits["statistics"]["decision"] == "hit"


def test_only_a_plan_that_is_shown_says_why(
    write_recipe: WriteRecipe, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(sweep={"selection.budget": [2, 4]})
    plan_here(path, store)
    for name, meant in (("run._run_flow", "run"), ("run._run_sweep", "swept")):
        monkeypatch.setattr(f"flows.{name}", lambda *_, meant=meant, **__: meant)
    monkeypatch.setattr(ArtifactStore, "explain", None)  # calling it would fail
    recipe, console = load_recipe(path), Console(stderr=True)
    assert execute(recipe, store, console, command="run") == "run"
    assert execute_sweep(recipe, store, console, command="sweep") == "swept"
    entrypoints._check(recipe, identify(recipe, store), store, "report")
    with pytest.raises(TypeError):
        plan_here(path, store)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_is_shown_as_it_is_but_for_control_characters(write_recipe: WriteRecipe, terminal: bool) -> None:
    console = Console(file=StringIO(), force_terminal=terminal, width=160)
    with Display(load_recipe(write_recipe()), console) as display:
        display.start("tasks", 1)
        display.event(Event("tasks", "tasks", "", "failed", "ValueError: in [/x]\x1b[2J of [b]"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "ValueError: in [/x] [2J of [b])" in shown
    assert "\x1b[2J" not in shown


def test_a_plan_of_a_new_recipe_builds_only_token_sequences(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    rows = plan_here(write_recipe(), store)
    assert {m.stage for m in store.manifests()} == {"pool", "texts"}
    assert rows["statistics"]["decision"] == "build"
    assert rows["checkpoint"]["decision"] == "waits"
    assert rows["checkpoint"]["reason"] == "depends on selection, which is not there yet"


def test_two_stores_come_to_the_same_bytes(write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path) -> None:
    path = write_recipe()
    first, _ = run_here(path, store)
    second, _ = run_here(path, ArtifactStore(tmp_path / "other"))
    assert first == second  # references hold digests over every file


def test_selectors_that_choose_the_same_samples_share_a_checkpoint(
    write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    everything = {"budget": 16}
    path = write_recipe(selection=everything, evaluation={"divergence": []})
    first, _ = run_here(path, store)
    second, rows = run_here(path, store, "selection.selector=random")
    assert rows["selection"]["decision"] == "built"
    assert rows["checkpoint"]["decision"] == "hit"
    assert first.checkpoint == second.checkpoint


def test_a_damaged_artifact_is_rebuilt_with_the_reason_named(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    path = write_recipe()
    chain, _ = run_here(path, store)
    (store.path(chain.outliers) / "outliers.parquet").unlink()
    assert plan_here(path, store)["outliers"]["decision"] == "rebuild"
    again, rows = run_here(path, store)
    assert rows["outliers"]["decision"] == "rebuilt"
    assert rows["outliers"]["reason"] == f"file outliers/{chain.outliers.key[:12]}/outliers.parquet is missing"
    assert rows["selection"]["decision"] == "hit"
    assert again == chain


def test_mixed_lengths_and_perplexity_texts_go_through_the_chain(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text(" ".join(tiny.text(seed, "animals") for seed in range(10)), encoding="utf-8")
    path = write_recipe(
        pool={"sequence_length": [16, 32], "samples": 12},
        evaluation={"perplexity": [{"path": str(tmp_path / "long.txt"), "window": 64, "limit": 2}]},
    )
    recipe = load_recipe(path)
    chain, _ = run_here(path, store)
    from flows.summary import summarize

    summary = summarize(recipe, chain, store)
    kinds = [text["kind"] for text in summary["evaluation"]]
    assert kinds == ["perplexity", "divergence"]
    assert summary["evaluation"][0]["run"]["all"]["tokens"] == 2 * 63
    assert 0 < summary["evaluation"][1]["run"]["all"]["divergence"] < np.inf
    assert summary["evaluation"][1]["original"]["all"]["divergence"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_model_goes_through_the_chain(write_recipe: WriteRecipe, store: ArtifactStore, dtype: str) -> None:
    from flows.summary import summarize

    path = write_recipe(model={"dtype": dtype})
    chain, _ = run_here(path, store)
    scores = summarize(load_recipe(path), chain, store)["evaluation"][0]["run"]["all"]
    assert 0 < scores["divergence"] < 1


@pytest.mark.parametrize("bits", [3, 8])
def test_more_bits_diverge_less(write_recipe: WriteRecipe, store: ArtifactStore, bits: int) -> None:
    from flows.summary import summarize

    path = write_recipe()
    values = {}
    for each in (bits, 4):
        chain, _ = run_here(path, store, f"quantization.bits={each}")
        summary = summarize(load_recipe(path), chain, store)
        values[each] = summary["evaluation"][0]["run"]["all"]["divergence"]
    assert (values[bits] > values[4]) == (bits < 4)


def test_a_gguf_file_is_unpacked_once_and_gives_the_model_it_holds(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: str, *rest: Any) -> None:
            parsed.append(path)
            super().__init__(path, *rest)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    path = write_recipe(model={"source": str(tiny.save_gguf(tmp_path / "tiny.gguf"))}, evaluation={"divergence": []})
    _, rows = run_here(path, store)
    assert rows["model"]["decision"] == "built"
    (manifest,) = store.manifests("model")
    assert manifest.info == {"dequantised_from": "ALL_F32"}
    assert parsed == [str(tmp_path / "tiny.gguf")]
    assert gguf.GGUFReader is Counted
    unpacked = AutoModelForCausalLM.from_pretrained(store.path(manifest.ref))
    tokens = torch.from_numpy(np.stack(tiny.random_tokens(2, 16)).astype(np.int64))
    torch.testing.assert_close(unpacked(tokens).logits, tiny.tiny_model()(tokens).logits)
    _, again = run_here(path, store)
    assert {row["decision"] for row in again.values()} == {"hit"}


def test_a_model_from_the_hubs_cache_is_used_without_network(
    write_recipe: WriteRecipe, store: ArtifactStore, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--team--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(files / "model", cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    local, _ = run_here(write_recipe(evaluation={"divergence": []}), store)
    chain, rows = run_here(write_recipe(model={"source": "team/tiny"}, evaluation={"divergence": []}), store)
    assert {row["decision"] for row in rows.values()} == {"hit"}  # the same weights, wherever they lie
    assert chain.checkpoint == local.checkpoint


def task_states(flow_run: UUID, count: int) -> dict[str, str]:
    """Return the last state of a flow's tasks by name; the server takes in what a task tells it a little later."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
    last = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=chosen)
            ended = [run for run in runs if run.state is not None and run.state.is_final()]
            if len(ended) >= count or time.monotonic() > last:
                return {run.name: str(run.state_name) for run in runs}
            time.sleep(0.2)


def test_the_flow_ends_cached_tasks_in_state_cached(
    write_recipe: WriteRecipe, store: ArtifactStore, prefect_server: None
) -> None:
    from flows.entrypoints import quantize

    expected = {"pool", "texts", "statistics 1/2", "statistics 2/2", "outliers", "selection", "measures", "reference"}
    expected |= {"nearest", "checkpoint", "random choice", "random", "overview", "layers 1/2", "layers 2/2", "report"}
    expected |= {f"evaluation {i}/3" for i in (1, 2, 3)}
    recipe = load_recipe(write_recipe())
    rivals = len(shown_selectors(recipe)) - 1
    expected |= {f"rivals {i}/{rivals}" for i in range(1, rivals + 1)}
    value = recipe.model_dump(mode="json")
    for name in ("Completed", "Cached"):
        state = quantize(value, return_state=True)
        assert state.is_completed()
        assert task_states(state.state_details.flow_run_id, len(expected)) == dict.fromkeys(expected, name)


def test_the_command_line_runs_the_flow_then_answers_from_the_store(
    write_recipe: WriteRecipe, store: ArtifactStore, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.run.configured_server", lambda: "")
    path = write_recipe()
    first = run_through_prefect(path, store)
    assert {row["decision"] for row in first.stages} == {"built"}
    monkeypatch.setattr("flows.run._run_flow", None)  # calling it would fail
    second = run_through_prefect(path, store)
    assert {row["decision"] for row in second.stages} == {"hit"}
    assert second.summary == first.summary
    records = list(read_runs(store.root))
    assert [record.state for record in records] == ["completed", "completed"]
    assert {stage.decision for stage in records[1].stages} == {"hit"}
    assert all(stage.reason for record in records for stage in record.stages)


def test_an_artifact_that_stands_in_two_rows_took_its_time_once(
    store: ArtifactStore, write_recipe: WriteRecipe
) -> None:
    recorder = Recorder()
    recipe = load_recipe(write_recipe())
    run_chain(recipe, identify(recipe, store), Direct(store, recorder), until="selection")
    again = [replace(event, label=f"{event.label} again") for event in recorder.events if event.label == "selection"]
    found = build_times(store, [*recorder.events, *again])
    assert found == build_times(store, recorder.events)
    manifests = list(store.manifests())
    assert sum(found.values()) == pytest.approx(sum(each.seconds for each in manifests), abs=0.001 * len(manifests))


def test_the_flow_gets_of_the_quantisation_what_was_given(
    write_recipe: WriteRecipe, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe())
    handed: list[Any] = []
    ended = SimpleNamespace(result=lambda **_: InputError("enough"))
    monkeypatch.setattr("flows.entrypoints.quantize", lambda value, **_: handed.append(value) or ended)
    with pytest.raises(InputError, match="enough"):
        run_through_prefect(write_recipe(), store)
    assert handed == [plain(recipe)]


def test_with_a_server_configured_a_cached_run_still_goes_through_it(
    write_recipe: WriteRecipe, store: ArtifactStore, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe()
    run_here(path, store)
    monkeypatch.setattr("flows.run.configured_server", lambda: "the test server")
    ran = []
    import flows.entrypoints

    original = flows.entrypoints.run_chain
    monkeypatch.setattr(flows.entrypoints, "run_chain", lambda *a, **k: ran.append(1) or original(*a, **k))
    finished = run_through_prefect(path, store)
    assert {row["decision"] for row in finished.stages} == {"hit"}
    assert ran == [1]


def test_a_cached_run_imports_neither_torch_nor_prefect(write_recipe: WriteRecipe, store: ArtifactStore) -> None:
    path = write_recipe()
    run_here(path, store)
    code = (
        "import sys; from flows import cli; sys.argv = ['covercal', 'run', sys.argv[1], '--json']\n"
        "cli.app(standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'prefect') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert {row["decision"] for row in json.loads(done.stdout)["stages"]} == {"hit"}


def test_a_nan_activation_ends_the_run_with_site_and_sample_and_a_record(
    write_recipe: WriteRecipe, store: ArtifactStore, prefect_server: None, tmp_path: Path
) -> None:
    model = tiny.tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "bad")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "bad")
    path = write_recipe(model={"source": str(tmp_path / "bad")})
    with pytest.raises(ActivationError, match=r"block 2, input of self_attn.q_proj.* sample 0;"):
        run_through_prefect(path, store)
    (record,) = read_runs(store.root)
    assert record.state == "failed"
    assert "block 2" in record.error
    assert not list(store.manifests("statistics"))


def test_a_record_that_cannot_be_written_does_not_hide_why_a_run_failed(
    write_recipe: WriteRecipe, store: ArtifactStore, capsys: pytest.CaptureFixture[str]
) -> None:
    (store.prepare().root / "runs").touch()
    running = Running(load_recipe(write_recipe()), store, "covercal run recipe.yaml")
    with pytest.raises(StorageError, match=r"^the disk is full$"), running.kept():
        raise StorageError("the disk is full")
    assert f"This run leaves no record. The folder of run records {store.root / 'runs'}" in capsys.readouterr().err


def test_a_group_size_that_does_not_divide_is_refused_before_any_heavy_work(
    write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    path = write_recipe(quantization={"group_size": 24})
    with pytest.raises(InputError, match=r"group_size 24 does not divide the 32 inputs of model.layers.0"):
        run_through_prefect(path, store)
    assert not list(store.manifests("statistics"))


def test_texts_that_are_too_short_are_refused_before_any_heavy_work(
    write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    path = write_recipe(pool={"samples": 100_000})
    with pytest.raises(InputError, match=r"The texts give \d+ samples of 32 tokens, and pool.samples asks for 100000"):
        run_through_prefect(path, store)
    assert not list(store.manifests("statistics"))


def test_a_group_size_is_refused_before_any_heavy_work_for_a_gguf_file_that_is_new(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    path = write_recipe(model={"source": str(tiny.save_gguf(tmp_path / "tiny.gguf"))}, quantization={"group_size": 24})
    with pytest.raises(InputError, match=r"group_size 24 does not divide the 32 inputs"):
        run_through_prefect(path, store)
    assert {manifest.stage for manifest in store.manifests()} == {"model"}


def test_a_gguf_file_without_one_of_the_weights_is_refused_by_name(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    lost = "model.layers.1.mlp.down_proj.weight"
    path = write_recipe(model={"source": str(tiny.save_gguf(tmp_path / "tiny.gguf", without=lost))})
    with pytest.raises(InputError, match=rf"tiny\.gguf lacks the weight {re.escape(lost)}\."):
        run_through_prefect(path, store)
    assert not list(store.manifests())


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"pool": {"sequence_length": 65}}, "pool.sequence_length"),
        ({"evaluation": {"perplexity": [{"path": "long.txt", "window": 66}]}}, "evaluation.perplexity[0].window"),
    ],
)
def test_sequences_longer_than_a_table_of_positions_are_refused_before_any_heavy_work(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path, section: dict[str, Any], field: str
) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=300))
    model.save_pretrained(tmp_path / "gpt2")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "long.txt").write_text("one text " * 200)
    path = write_recipe(model={"source": str(tmp_path / "gpt2")}, **section)
    with pytest.raises(InputError, match=rf"{re.escape(field)}: 6\d tokens are more than the 64 positions"):
        run_through_prefect(path, store)
    assert not list(store.manifests("statistics"))


def test_a_gguf_file_that_is_unpacked_for_the_check_counts_as_built(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path, prefect_server: None
) -> None:
    path = write_recipe(model={"source": str(tiny.save_gguf(tmp_path / "tiny.gguf"))}, evaluation={"divergence": []})
    rows = {row["stage"]: row for row in run_through_prefect(path, store).stages}
    assert (rows["model"]["decision"], rows["model"]["artifacts"]) == ("built", 1)
    assert {row["decision"] for row in rows.values()} == {"built"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["selection.selector=max_perplexity", "outliers.adaptive=true", "outliers.adaptive_k=1"],
        ["quantization.method=cached", "quantization.shrinkage=validated"],
    ],
)
def test_every_row_of_a_plan_says_what_it_does(
    write_recipe: WriteRecipe, store: ArtifactStore, overrides: list[str]
) -> None:
    path = write_recipe()
    details = row_details(load_recipe(path, overrides))
    assert all(details.get(stage) for stage in plan_here(path, store, *overrides))
