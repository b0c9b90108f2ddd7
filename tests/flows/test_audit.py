"""`covercal audit`: a user's own calibration file on a tiny model, what is said of it, and what is computed for it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covercal.errors import InputError
from covercal.recipe import TextSource, load_recipe
from flows.audit import audit, audit_lines, calibration_source
from flows.chain import Chain, run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from flows.summary import stage_rows
from storage.arrays import read_array
from storage.artifacts import ArtifactStore
from storage.manifest import Ref
from storage.tables import read_table
from tasks.capture import PEAK
from tasks.thresholds import OUTLIERS
from tests import tiny
from tests.flows import test_cli as command_line
from tests.flows.test_run import counted_sequences

WriteRecipe = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]
command = command_line.command  # the fixture
FEW = {"k": 4.0}  # channels above mean + 4 sigma: a short text misses most of them


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A calibration file of two short texts."""
    return write_rows(tmp_path / "mine.jsonl", [tiny.text(500, "animals", 24), tiny.text(500, "code", 24)])


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": each, "kind": "own"}) + "\n" for each in texts), encoding="utf-8")
    return path


def audit_here(path: Path, calibration: Path, store: ArtifactStore) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Audit in this process; return what was found and the rows by stage."""
    recorder = Recorder()
    source = calibration_source(calibration, "text", None)
    found = audit(load_recipe(path, ()), source, Direct(store, recorder))
    return found, {row["stage"]: row for row in stage_rows(recorder.events)}


def pool_chain(path: Path, store: ArtifactStore) -> Chain:
    recipe = load_recipe(path, ())
    return run_chain(recipe, identify(recipe, store), Direct(store, Recorder()), until="outliers")


def peaks(store: ArtifactStore, refs: tuple[Ref, ...]) -> np.ndarray:
    return np.concatenate([read_array(store.path(ref) / PEAK) for ref in refs]).astype(np.float64)


# --- what it finds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2.0, 4.0])
def test_the_pools_own_texts_cover_everything(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path, k: float
) -> None:
    texts = tiny.write_texts(tmp_path / "texts.jsonl", range(3))
    sources = [{"path": str(texts), "domain": "domain"}]
    recipe = load_recipe(write_recipe(pool={"sources": sources, "samples": 16}, outliers={"k": k}), ())
    recorder = Recorder()
    found = audit(recipe, TextSource(path=str(texts), domain="domain"), Direct(store, recorder))
    assert found["outlier_channels"] > 0
    assert (found["coverage"], found["weighted_coverage"], found["surrogate_bound"]) == (1, 1, 0)
    assert (found["heaviest_missed"], found["would_help"]) == ([], [])
    rows = {row["stage"]: row for row in stage_rows(recorder.events)}
    assert rows["measured"]["counts"]["hit"] == 2  # the pool's samples come first, and are measured already


def test_the_numbers_of_an_audit_are_those_of_the_stored_arrays(
    write_recipe: WriteRecipe, store: ArtifactStore, mine: Path
) -> None:
    path = write_recipe(outliers=FEW)
    recorder = Recorder()
    found = audit(load_recipe(path, ()), calibration_source(mine, "text", None), Direct(store, recorder))
    chain = pool_chain(path, store)
    rows = read_table(store.path(chain.outliers) / OUTLIERS).to_pylist()
    keys = [event.key for event in recorder.events if event.label == "measured"]
    refs = tuple(manifest.ref for key in keys for manifest in store.manifests("statistics") if manifest.key == key)
    weights = {row["position"]: row["weight"] for row in rows}
    covered = {row["position"] for row in rows if (peaks(store, refs)[:, row["position"]] > row["threshold"]).any()}
    assert 0 < len(covered) < len(rows) == found["outlier_channels"]
    assert found["samples"] == len(peaks(store, refs))
    assert found["coverage"] == pytest.approx(len(covered) / len(rows), rel=1e-12)
    missed = sum(weight for position, weight in weights.items() if position not in covered)
    assert found["surrogate_bound"] == pytest.approx(missed, rel=1e-12)
    assert found["weighted_coverage"] == pytest.approx(1 - missed / sum(weights.values()), rel=1e-12)
    fired = [
        {p["position"] for p in rows if peak[p["position"]] > p["threshold"]} for peak in peaks(store, chain.statistics)
    ]
    for each in found["would_help"]:
        gains = [sum(weights[p] for p in sample - covered) for sample in fired]
        assert each["adds"] == pytest.approx(max(gains) / sum(weights.values()), rel=1e-12)
        assert gains[each["sample"]] == pytest.approx(max(gains), rel=1e-12)
        covered |= fired[each["sample"]]


def test_one_text_is_the_same_set_in_every_form(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    words = tiny.text(500, "animals", 80)
    (tmp_path / "mine").mkdir()
    for path in (tmp_path / "mine.txt", tmp_path / "mine" / "part.md"):
        path.write_text(words, encoding="utf-8")
    pq.write_table(pa.table({"text": [words]}), tmp_path / "mine.parquet")
    write_rows(tmp_path / "mine.jsonl", [words])
    path = write_recipe(outliers=FEW)
    first, _ = audit_here(path, tmp_path / "mine.jsonl", store)
    assert set(first["domains"]) == {"mine"}
    for name in ("mine.txt", "mine.parquet", "mine"):
        found, rows = audit_here(path, tmp_path / name, store)
        assert found == first
        assert rows["measured"]["decision"] == "hit"


def test_a_text_twice_in_a_set_counts_once(write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path) -> None:
    words = tiny.text(500, "animals", 80)
    path = write_recipe(outliers=FEW)
    once, _ = audit_here(path, write_rows(tmp_path / "set.jsonl", [words]), store)
    twice, _ = audit_here(path, write_rows(tmp_path / "set.jsonl", [words, words]), store)
    assert twice == {**once, "dropped": "1 duplicate"}


def test_a_domain_too_small_for_a_sample_is_told(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    texts = write_rows(tmp_path / "set.jsonl", [tiny.text(500, "animals", 80)])
    with texts.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"text": "a small text", "kind": "small"}) + "\n")
    source = calibration_source(texts, "text", "kind")
    found = audit(load_recipe(write_recipe(outliers=FEW), ()), source, Direct(store, Recorder()))
    assert set(found["domains"]) == {"own"}
    assert "Left out     1 text that fills no sample (small)" in audit_lines(found)


# --- what it computes ----------------------------------------------------------------------------------------------


def test_a_second_audit_rebuilds_nothing_and_finds_the_same(
    write_recipe: WriteRecipe, store: ArtifactStore, mine: Path
) -> None:
    path = write_recipe(outliers=FEW)
    first, rows = audit_here(path, mine, store)
    assert list(rows) == ["calibration", "pool", "statistics", "outliers", "measured"]
    assert {row["decision"] for row in rows.values()} == {"built"}
    with counted_sequences(32) as seen:
        second, rows = audit_here(path, mine, store)
    assert {row["decision"] for row in rows.values()} == {"hit"}
    assert (seen, second) == ([], first)


def test_only_the_set_is_measured_when_the_pool_is_there(
    write_recipe: WriteRecipe, store: ArtifactStore, mine: Path
) -> None:
    path = write_recipe(outliers=FEW)
    pool_chain(path, store)
    with counted_sequences(32) as seen:
        found, rows = audit_here(path, mine, store)
    assert [name for name, row in rows.items() if row["decision"] != "hit"] == ["calibration", "measured"]
    assert sum(seen) == found["samples"]


def test_what_comes_after_the_outliers_changes_no_audit(
    write_recipe: WriteRecipe, store: ArtifactStore, mine: Path
) -> None:
    first, _ = audit_here(write_recipe(outliers=FEW), mine, store)
    other = write_recipe(outliers=FEW, selection={"budget": 2, "selector": "random"}, quantization={"bits": 3})
    second, rows = audit_here(other, mine, store)
    assert {row["decision"] for row in rows.values()} == {"hit"}
    assert second == first


# --- what it says --------------------------------------------------------------------------------------------------


def test_json_is_one_plain_object_with_every_stage_and_number(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, mine: Path
) -> None:
    path = write_recipe(outliers=FEW)
    code, out, err = command("audit", path, "--calibration", mine, "--json")
    value = json.loads(out, parse_constant=pytest.fail)  # no NaN, no Infinity
    assert code == 0
    assert out.count("\n") == 1
    assert [row["stage"] for row in value["stages"]] == ["calibration", "pool", "statistics", "outliers", "measured"]
    expected, _ = audit_here(path, mine, store)
    assert value["audit"] == json.loads(json.dumps(expected))
    assert "Heaviest missed" in err


def test_the_table_has_the_numbers_of_the_json(
    command: Command, write_recipe: WriteRecipe, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    path = write_recipe(outliers=FEW)
    found = json.loads(command("audit", path, "--calibration", mine, "--json")[1])["audit"]
    code, out, _ = command("audit", path, "--calibration", mine)
    assert code == 0
    top, missed, helping = re.split("Heaviest missed|Would add most", out)
    words = " ".join(top.split())
    assert f"Set {found['samples']} samples: {found['domains']['mine']} mine" in words
    assert f"Coverage {found['coverage']:.1%} of {found['outlier_channels']} outlier channels" in words
    assert f"as many random samples of the pool: {found['random_coverage']:.1%}" in words
    assert f"{found['weighted_coverage']:.1%} of their weight; random: {found['random_weighted_coverage']:.1%}" in words
    assert f"chosen by coverage: {found['chosen_weighted_coverage']:.1%}" in words
    assert f"share {found['jaccard']:.1%}" in words
    assert f"Gram diagonals {found['gram_distance']:.1%} off" in words
    for line, each in zip(missed.strip().splitlines()[1:], found["heaviest_missed"], strict=True):
        shown = f"{each['block']} {each['linears']} {each['channel']} {each['peak_over_threshold']:.2f}"
        assert " ".join(line.split()) == f"{shown} {each['weight_share']:.3%}"
    lines = helping.strip().splitlines()
    assert len(lines) == len(found["would_help"]) + 2
    for line, each in zip(lines[1:-1], found["would_help"], strict=True):
        start = " ".join(f"{each['sample']} {each['adds']:.2%} {each['domain']} {each['text']}".split())
        assert start.startswith(" ".join(line.split()).removesuffix("…")[:40])
    assert lines[-1].split() == ["Next", "covercal", "select", str(path), "--output", "chosen.jsonl"]


def test_the_weakest_block_is_the_one_least_covered() -> None:
    shares = {0: 0.5, 3: 0.125, 7: 0.25}
    numbers = dict.fromkeys(("coverage", "random_coverage", "weighted_coverage", "random_weighted_coverage"), 0.5)
    numbers |= dict.fromkeys(("chosen_weighted_coverage", "jaccard", "gram_distance"), 0.5)
    found = {
        "samples": 3,
        "pool_samples": 16,
        "dropped": "",
        "outlier_channels": 9,
        "domains": {"b": 1, "a": 1, "c": 2},
        **numbers,
    }
    lines = audit_lines({**found, "coverage_by_block": shares})
    assert "block 3: 12.5%" in lines[-1]
    assert "3 samples: 2 c, 1 a, 1 b" in lines[0]
    assert len(audit_lines({**found, "coverage_by_block": {}})) == len(lines) - 1


def test_a_set_larger_than_the_pool_is_held_against_all_of_the_pool(
    write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    many = write_rows(tmp_path / "many.jsonl", [tiny.text(seed, "animals", 80) for seed in range(500, 510)])
    recipe = write_recipe(outliers=FEW, pool={"samples": 4}, selection={"budget": 2})
    found, _ = audit_here(recipe, many, store)
    assert found["samples"] > found["pool_samples"] == 4
    words = " ".join(" ".join(audit_lines(found)).split())
    assert "all 4 samples of the pool: 100.0%" in words
    assert "of their weight; all of the pool: 100.0%" in words
    assert "random" not in words
    assert "chosen" not in words


def test_a_set_that_misses_nothing_shows_no_table(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, mine: Path
) -> None:
    code, out, _ = command("audit", write_recipe(outliers={"k": 1e6}), "--calibration", mine)
    assert code == 0
    assert "0.0% of 0 outlier channels" in out
    assert not re.search("Heaviest missed|Would add most|Weakest", out)


def test_the_fields_of_text_and_domain_can_be_named(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    rows = [{"content": tiny.text(500, name), "topic": f"my {name}"} for name in ("animals", "code")]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = ("--text", "content", "--domain", "topic", "--set", "outliers.k=4")
    code, out, _ = command("audit", write_recipe(), "--calibration", path, *fields, "--json")
    assert code == 0
    assert set(json.loads(out)["audit"]["domains"]) == {"my animals", "my code"}


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_calibration_file_that_is_not_there_exits_with_2_before_anything_is_built(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, tmp_path: Path
) -> None:
    missing = tmp_path / "missing.jsonl"
    code, out, err = command("audit", write_recipe(), "--calibration", missing)
    sentence = f"--calibration {missing} is not there; give a JSONL, Parquet or text file, or a folder."
    assert (code, out, err) == (2, "", f"error {sentence}")
    assert not list(store.manifests())
    with pytest.raises(InputError, match=re.escape(sentence)):
        calibration_source(missing, "text", None)


EMPTY = [
    ("", r"mine.jsonl gives no sample of 32 tokens: no text in it"),
    ('{"text": " "}\n', r"mine.jsonl gives no sample of 32 tokens: no text in it"),
    ('{"text": "cat"}\n', r"mine.jsonl gives no sample of 32 tokens: 1 texts read"),
    ('{"words": "cat"}\n', r"mine.jsonl, row 0: there is no field `text`; the row has: words\."),
    ("{cat\n", r"mine.jsonl, line 1: not valid JSON"),
]
every_empty_set = pytest.mark.parametrize(("content", "sentence"), EMPTY)


@every_empty_set
def test_a_set_without_a_sample_exits_with_2_and_says_why(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, mine: Path, content: str, sentence: str
) -> None:
    mine.write_text(content, encoding="utf-8")
    code, _, err = command("audit", write_recipe(), "--calibration", mine)
    assert code == 2
    assert re.search(sentence, err)


@every_empty_set
def test_a_set_without_a_sample_is_refused_before_any_heavy_work(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, mine: Path, content: str, sentence: str
) -> None:
    mine.write_text(content, encoding="utf-8")
    assert command("audit", write_recipe(), "--calibration", mine)[0] == 2
    assert not list(store.manifests("statistics"))


@pytest.mark.parametrize("content", [content for content, _ in EMPTY[:3]])
def test_the_sentence_about_an_empty_set_speaks_of_the_set(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, mine: Path, content: str
) -> None:
    mine.write_text(content, encoding="utf-8")
    _, _, err = command("audit", write_recipe(), "--calibration", mine)
    assert str(mine) in err
    assert not re.search(r"pool is empty|pool\.sources|pool\.samples", err)


# --- texts that are hard to show -----------------------------------------------------------------------------------


def test_brackets_in_texts_and_domains_are_shown_as_they_are_and_control_characters_are_not(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, mine: Path, tmp_path: Path
) -> None:
    said = [f"[/INST]\x1b[2J {tiny.text(s, 'animals', 8)}" for s in range(200)]
    texts = write_rows(tmp_path / "chat.jsonl", said)
    for file in (texts, mine):
        rows = [{**json.loads(line), "kind": "[/r/\x1b]0;code]"} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = mine.rename(tmp_path / "my texts.jsonl")
    path = write_recipe(outliers=FEW, pool={"sources": [{"path": str(texts), "domain": "kind"}]})
    code, out, _ = command("audit", path, "--calibration", own, "--domain", "kind")
    assert (code, "\x1b" in out) == (0, False)
    assert out.startswith(f"covercal audit {path} --calibration '{own}' --domain kind\n")
    top, helping = out.split("Would add most")
    assert "[/r/ ]0;code]" in top
    assert "[/r/ ]0;code]" in helping
    assert "[/INST]" in helping


def test_what_a_sample_adds_is_shown_whole_where_stdout_is_no_terminal(
    command: Command, write_recipe: WriteRecipe, store: ArtifactStore, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    path = write_recipe(outliers=FEW)
    found, _ = audit_here(path, mine, store)
    _, out, _ = command("audit", path, "--calibration", mine)
    shown = out.split("Would add most")[1]
    for each in found["would_help"]:
        assert f"{each['adds']:.2%}" in shown
