"""The command line: exit codes, sentences, JSON, and what each command leaves behind."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from covercal.errors import CovercalError
from covercal.recipe import load_recipe
from flows import cli
from storage.artifacts import ArtifactStore
from tests import tiny
from tests.flows.test_run import run_here
from tests.tasks.report.reading import read

WriteRecipe = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: ArtifactStore) -> Command:
    """Return a function that runs a command line and returns exit code, stdout and stderr on one line each."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["covercal", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, " ".join(err.split())

    return call


def test_an_unknown_field_exits_with_2_and_names_the_nearest(command: Command, write_recipe: WriteRecipe) -> None:
    code, _, err = command("run", write_recipe(selection={"budgte": 3}))
    assert code == 2
    assert "there is no field `selection.budgte`; did you mean `selection.budget`?" in err


def test_verbose_shows_the_traceback_and_keeps_the_exit_code(command: Command, write_recipe: WriteRecipe) -> None:
    code, _, err = command("run", write_recipe(selection={"budgte": 3}), "--verbose")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.rpartition("error ")[2].startswith("Recipe ")


def test_an_override_of_an_unknown_field_exits_with_2(command: Command, write_recipe: WriteRecipe) -> None:
    code, _, err = command("plan", write_recipe(), "--set", "quantization.bit=3")
    assert code == 2
    assert "did you mean `quantization.bits`?" in err


def test_a_missing_model_exits_with_2_before_anything_is_built(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    code, _, err = command("run", write_recipe(model={"source": "/no/such/model"}))
    assert code == 2
    assert "/no/such/model" in err
    assert not list(store.manifests())


def test_a_cache_folder_that_is_not_writable_is_an_error_that_names_it(
    command: Command, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COVERCAL_CACHE", str(tmp_path / "file" / "cache"))
    code, _, err = command("run", write_recipe())
    assert code == 2
    assert str(tmp_path / "file" / "cache") in err
    assert "COVERCAL_CACHE" in err


def test_run_json_is_one_object_with_everything(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    path = write_recipe()
    chain, _ = run_here(path, store)
    code, out, _ = command("run", path, "--json")
    value = json.loads(out)
    assert code == 0
    assert {row["decision"] for row in value["stages"]} == {"hit"}
    assert set(value["stages"][0]) >= {"stage", "key", "decision", "reason", "seconds"}
    assert value["selection"]["budget"] == 4
    assert len(value["selection"]["samples"]) == 4
    assert 0 < value["selection"]["weighted_coverage"] <= 1
    assert value["checkpoint"] == str(store.path(chain.checkpoint))
    scores = value["evaluation"][0]
    assert scores["original"]["all"]["divergence"] == 0
    assert scores["run"]["all"]["divergence"] > 0
    assert set(scores["run"]["domains"]) == {"animals", "numbers", "code"}


def test_every_recipe_that_is_shown_takes_another_method_as_the_users_own_would(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    path = write_recipe(sweep={"selection.budget": [4]})
    run_here(path, store)
    _, out, _ = command("run", path, "--json")
    told = json.loads(out)
    _, out, _ = command("sweep", path, "--json")
    page = read(Path(told["report"]).read_text(encoding="utf-8"))
    (details,) = [each for each in page.all("details") if each.all("summary")[0].text == "The whole recipe"]
    on_page = "".join(each for each in details.all("pre")[0].children if isinstance(each, str))
    record = json.loads(Path(told["record"]).read_text(encoding="utf-8"))
    expected = load_recipe(path, ["quantization.method=rtn"])
    for shown in (told["recipe"], json.loads(out)["recipe"], record["recipe"], yaml.safe_load(on_page)):
        saved = tmp_path / "saved.yaml"
        saved.write_text(yaml.safe_dump(shown), encoding="utf-8")
        assert load_recipe(saved, ["quantization.method=rtn"]) == expected


def test_run_shows_a_table_that_names_original_nearest_and_this_run(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    path = write_recipe()
    run_here(path, store)
    code, out, _ = command("run", path)
    assert code == 0
    models = ("original", "round to nearest", "4 random samples", "this run")
    for wanted in (*models, "KL, nats per token", "size on disk"):
        assert wanted in out
    assert "Chosen" in out
    assert "random choice of that size" in out


def test_plan_json_says_what_is_cached_and_why_not(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    path = write_recipe()
    run_here(path, store)
    code, out, _ = command("plan", path, "--set", "quantization.bits=2", "--json")
    rows = {row["stage"]: row for row in json.loads(out)["stages"]}
    assert code == 0
    assert rows["selection"]["decision"] == "hit"
    assert (rows["checkpoint"]["decision"], rows["checkpoint"]["reason"]) == ("build", "quantization.bits: 4 -> 2")


def test_run_output_is_a_checkpoint_that_loads(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_recipe()
    run_here(path, store)
    code, _, _ = command("run", path, "--output", tmp_path / "checkpoint")
    assert code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint").encode("cat")
    record = json.loads((tmp_path / "checkpoint" / "covercal.json").read_text())
    assert record["quantization"]["bits"] == 4
    assert len(record["calibration"]["samples"]) == 4
    code, _, err = command("run", path, "--output", tmp_path / "checkpoint")
    assert (code, "exists already" in err) == (2, True)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("select", ".", "is a folder; name a file"),
        ("select", "file/chosen.jsonl", "is a file, not a folder"),
        ("run", "file/new/checkpoint", "is a file, not a folder"),
        ("sweep", "file", "is a file, not a folder"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_any_work(
    command: Command,
    write_recipe: WriteRecipe,
    store: ArtifactStore,
    tmp_path: Path,
    name: str,
    place: str,
    message: str,
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = command(name, write_recipe(sweep={"selection.budget": [2]}), "--output", tmp_path / place)
    assert (code, message in err) == (2, True)
    assert not list(store.manifests())


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, shutil.Error([("a", "b", str(FULL)), ("c", "d", "another")])])
def test_a_checkpoint_that_cannot_be_copied_leaves_no_half_of_it_and_may_be_copied_again(
    command: Command,
    write_recipe: WriteRecipe,
    store: ArtifactStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
) -> None:
    def copy(source: Path, target: Path, **_: Any) -> None:
        target.mkdir(exist_ok=True)
        (target / "model.safetensors").touch()
        raise error

    path, output = write_recipe(evaluation={"divergence": []}), tmp_path / "checkpoint"
    run_here(path, store)
    with monkeypatch.context() as disk:
        disk.setattr(cli.shutil, "copytree", copy)
        code, _, err = command("run", path, "--output", output)
    assert (code, output.exists()) == (1, False)
    assert f"--output {output} could not be written: [Errno {errno.ENOSPC}] No space left on device. All that" in err
    assert command("run", path, "--output", output)[0] == 0


def test_chosen_samples_that_cannot_be_written_are_told_with_the_cause(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    path = write_recipe(evaluation={"divergence": []})
    run_here(path, store)
    code, _, err = command("select", path, "--output", "/dev/full")
    assert code == 1
    assert "--output /dev/full could not be written: [Errno 28] No space left on device. All that" in err


@pytest.mark.parametrize("name", ["run", "select"])
def test_domains_are_shown_as_they_are_but_for_control_characters(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path, name: str
) -> None:
    domains = ("[/r/code]", "[numbers]", ":car: \x1b[2J")
    texts = tmp_path / "texts.jsonl"
    said = [{"text": tiny.text(s, "code"), "domain": domains[s % 3]} for s in range(60)]
    texts.write_text("".join(json.dumps(each) + "\n" for each in said), encoding="utf-8")
    sources = [{"path": str(texts), "domain": "domain"}]
    path = write_recipe(pool={"sources": sources}, selection={"budget": 16}, evaluation={"divergence": []})
    run_here(path, store)
    code, out, _ = command(name, path)
    assert (code, "\x1b" in out) == (0, False)
    assert all(each in out for each in (" [/r/code]", " [numbers]", " :car:  [2J"))


@pytest.mark.parametrize(
    ("field", "sentence"),
    [("device=foo", "device 'foo' is not available here"), ("quantization.group_size=24", "24 does not divide the 32")],
)
def test_a_plan_refuses_what_a_run_refuses_before_its_work(
    command: Command, write_recipe: WriteRecipe, field: str, sentence: str
) -> None:
    code, out, err = command("plan", write_recipe(evaluation={"divergence": []}), "--set", field)
    assert code == 2
    assert sentence in err
    assert "checkpoint" in out


def test_a_plan_may_be_made_where_the_device_is_not(command: Command, write_recipe: WriteRecipe) -> None:
    assert command("plan", write_recipe(evaluation={"divergence": []}), "--set", "device=cuda:7")[0] == 0


def test_a_checkpoint_is_not_put_where_another_has_made_a_folder_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("of another")
    (tmp_path / "made").mkdir()
    with pytest.raises(CovercalError, match="could not be written"):
        cli._export(tmp_path / "made", tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "of another"


def test_an_error_shows_control_characters_and_does_not_send_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli._fail("two\nlines\x1b[2J", 1)
    assert capsys.readouterr().err == "error two\nlines [2J\n"


def test_a_plan_unpacks_no_model(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    path = write_recipe(model={"source": str(tiny.save_gguf(tmp_path / "tiny.gguf"))}, evaluation={"divergence": []})
    assert command("plan", path, "--set", "quantization.group_size=24")[0] == 0
    assert not list(store.manifests())


def test_what_another_process_built_is_not_to_do(
    command: Command, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.plan.show_plan", lambda *_: ([{"decision": "waited"}, {"decision": "waits"}], None))
    assert "1 of 2 stages to do" in command("plan", write_recipe())[1]


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_port_that_there_is_not_is_refused(
    command: Command, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    monkeypatch.setattr("flows.serve.serve", None)  # calling it would fail
    code, _, err = command("serve", write_recipe(), "--port", port)
    assert (code, "Invalid value for '--port'" in err) == (2, True)


def test_the_next_run_that_is_offered_is_of_the_same_recipe(write_recipe: WriteRecipe) -> None:
    path = write_recipe()
    given = ["quantization.method=gptq", "pool.sequence_length=[16, 32]", "selection.budget=6"]
    kept = "--set quantization.method=gptq --set 'pool.sequence_length=[16, 32]' --set selection.budget=3"
    typed = load_recipe(path, given)
    assert cli._next_run(typed, path, given) == (
        f"covercal run {path} {kept}",
        "reuses all but selection, quantisation and evaluation",
    )
    for fields in (["quantization.method=cached"], ["selection.budget=1"]):  # reads no chosen samples; no half of one
        offered, _ = cli._next_run(load_recipe(path, fields), path, None)
        assert offered == f"covercal run {path} --set quantization.bits=3"


def test_what_is_measured_on_the_pools_own_texts_is_refused(command: Command, write_recipe: WriteRecipe) -> None:
    path = write_recipe()
    recipe = load_recipe(path)
    text = recipe.pool.sources[0].path
    code, _, err = command("plan", path, "--set", f"evaluation.divergence=[{{path: {text}}}]")
    assert code == 2
    assert "is a source of the pool, too: what is measured on it is not held out" in err


def test_select_writes_the_chosen_samples_with_text_tokens_domain_rank_and_gain(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    path = write_recipe()
    run_here(path, store)
    code, out, _ = command("select", path, "--output", tmp_path / "chosen.jsonl", "--json")
    rows = [json.loads(line) for line in (tmp_path / "chosen.jsonl").read_text().splitlines()]
    assert code == 0
    assert [row["rank"] for row in rows] == [0, 1, 2, 3]
    assert [row["sample"] for row in rows] == json.loads(out)["selection"]["samples"]
    assert all(len(row["tokens"]) == 32 and row["text"] and row["domain"] for row in rows)
    assert rows[0]["gain"] >= rows[1]["gain"] > 0


def test_cache_ls_show_and_verify_agree_on_what_is_there(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    chain, _ = run_here(write_recipe(), store)
    _, out, _ = command("cache", "ls", "--json")
    listed: list[dict[str, Any]] = json.loads(out)["artifacts"]
    assert {row["key"] for row in listed} == {manifest.key for manifest in store.manifests()}
    _, out, _ = command("cache", "show", chain.outliers.key[:16], "--json")
    shown = json.loads(out)
    assert [each["stage"] for each in shown["inputs"]] == ["statistics", "statistics"]
    assert {each["stage"] for each in shown["read_by"]} == {"measures", "selection", "overview", "report"}
    code, out, _ = command("cache", "verify", "--json")
    assert (code, json.loads(out)) == (0, {"checked": len(listed), "faults": {}, "strangers": {}})


def test_cache_verify_names_a_flipped_bit_and_exits_with_1(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore
) -> None:
    chain, _ = run_here(write_recipe(), store)
    file = store.path(chain.outliers) / "outliers.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    code, out, _ = command("cache", "verify")
    assert code == 1
    assert f"outliers/{chain.outliers.key}: file {chain.outliers.short}/outliers.parquet does not match its" in out


def test_cache_show_of_an_unknown_key_is_a_sentence(command: Command) -> None:
    code, _, err = command("cache", "show", "feed")
    assert code == 1
    assert "0 artifacts have a key that begins with 'feed'" in err
