"""The cache on the command line: what each command says and leaves behind, exit codes, and what a remote changes."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flows.run
from flows import cli
from flows.chain import run_chain
from flows.execution import Direct
from flows.inputs import identify
from flows.record import Finished, Running
from flows.report import conclude
from storage.artifacts import ArtifactStore
from storage.durable import file_names
from storage.manifest import MANIFEST, Ref
from storage.remote import MARKER, open_remote
from storage.runs import RunRecord, StageRecord, read_runs, write_run
from tasks.cached import open_store
from tests.storage.faults import snapshot
from tests.storage.s3 import closed_port
from tests.storage.test_transfer import RUN, RealRun, make_real_run
from tests.tasks.test_cached import every_step

SHARDS = 8
Command = Callable[..., tuple[int, str, str]]
Json = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> RealRun:
    """One real run for all tests here, with so many shards that a tree shows them as one branch."""
    return make_real_run(tmp_path_factory.mktemp("ran"), statistics={"shard_samples": 2})


@pytest.fixture(autouse=True)
def _nothing_is_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about a power cut, and flushing is as slow as the disk of the day."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def cache(ran: RealRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """A copy of that run's store, which the command line uses."""
    for name in ("REMOTE", "REMOTE_WRITE", "REMOTE_TIMEOUT", "OFFLINE"):
        monkeypatch.delenv(f"COVERCAL_{name}", raising=False)
    monkeypatch.setenv("COVERCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "250")
    return ran.store(tmp_path / "cache")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: ArtifactStore) -> Command:
    """Return a function that runs a command line and returns exit code, stdout, and stderr on one line."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["covercal", *map(str, arguments)])
        before = dict(os.environ)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            os.environ.clear()
            os.environ.update(before)  # `--offline` holds for a whole process, and each of these stands for one
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, " ".join(err.split())

    return call


@pytest.fixture
def json_of(command: Command) -> Json:
    """Return a function that runs a command with --json and returns what it printed, which is one line."""

    def call(*arguments: object, code: int = 0) -> dict[str, Any]:
        found, out, err = command(*arguments, "--json")
        assert found == code, err
        (line,) = out.splitlines()
        return json.loads(line)

    return call


def refs_of(store: ArtifactStore, stage: str) -> list[Ref]:
    return [manifest.ref for manifest in store.manifests(stage)]


def delete(store: ArtifactStore, ref: Ref) -> None:
    shutil.rmtree(store.folder(ref.stage, ref.key))


def outside_locks(store: ArtifactStore) -> dict[str, tuple[int, int, int]]:
    return {name: status for name, status in snapshot(store.root).items() if name.split("/")[0] not in ("locks", ".")}


def flip_a_bit(store: ArtifactStore, ref: Ref) -> str:
    """Change a file of an artifact without changing its size; return its name."""
    folder = store.folder(ref.stage, ref.key)
    name = next(iter(store.look_up(ref.stage, ref.key).manifest.files))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    return name


def add_run(store: ArtifactStore, name: str, *stages: StageRecord, state: str = "completed") -> None:
    """Write the record of a run that used nothing, or got to some stages."""
    record = RunRecord(name, "covercal run x", "2026-01-01T00:00:00+00:00", 61.0, state, {}, list(stages))
    write_run(store.root, record)


# --- ls --------------------------------------------------------------------------------------------------------------


def test_ls_lists_every_artifact_and_their_sum(command: Command, cache: ArtifactStore) -> None:
    code, out, _ = command("cache", "ls")
    manifests = list(cache.manifests())
    rows = [line.split() for line in out.splitlines()[1:-1]]
    assert code == 0
    assert [row[:2] for row in rows] == [[m.stage, m.key[:12]] for m in manifests]
    total = f"{sum(manifest.size for manifest in manifests) / 1e6:.1f} MB"
    assert out.splitlines()[-1] == f"{len(rows)} artifacts, {total} in {cache.root}. Next: covercal cache show KEY"


def test_ls_json_lists_bytes_and_times_of_every_artifact(json_of: Json, cache: ArtifactStore) -> None:
    found = json_of("cache", "ls")
    assert found["store"] == str(cache.root)
    assert found["artifacts"] == [
        {"stage": m.stage, "key": m.key, "bytes": m.size, "created": m.created, "seconds": m.seconds}
        for m in cache.manifests()
    ]


@pytest.mark.parametrize(("stage", "count"), [("statistics", SHARDS), ("outliers", 1), ("nothing", 0)])
def test_ls_of_one_stage_lists_that_alone(command: Command, json_of: Json, stage: str, count: int) -> None:
    assert [row["stage"] for row in json_of("cache", "ls", stage)["artifacts"]] == [stage] * count
    code, out, _ = command("cache", "ls", stage)
    assert (code, out.splitlines()[-1].startswith(f"{count} artifacts,")) == (0, True)


def test_ls_of_a_stage_that_is_misspelt_names_the_nearest(command: Command) -> None:
    code, out, err = command("cache", "ls", "statistcs")
    assert (code, out) == (1, "")
    assert "No artifact here is of a stage 'statistcs'; did you mean 'statistics'?" in err


# --- show ------------------------------------------------------------------------------------------------------------


def lineage(store: ArtifactStore, ref: Ref) -> tuple[set[str], set[str], set[str]]:
    """Return what an artifact was made from, what reads it, and all that was made from it, as people read them."""
    reads = {m.ref.short: {Ref(**each).short for each in m.inputs} for m in store.manifests()}

    def above(name: str) -> set[str]:
        return {each for read in reads[name] for each in {read, *above(read)}}

    name = ref.short
    return above(name), {each for each in reads if name in reads[each]}, {each for each in reads if name in above(each)}


def test_show_draws_where_an_artifact_comes_from_and_what_was_made_from_it(
    command: Command, ran: RealRun, cache: ArtifactStore
) -> None:
    ref = ran.chain.outliers
    code, out, _ = command("cache", "show", f"outliers/{ref.key[:8]}")
    lines = out.splitlines()
    above = lines[lines.index("made from") + 1 : lines.index("what was made from it")]
    below = lines[lines.index("what was made from it") + 1 : lines.index(f"runs         {RUN}")]
    inputs = cache.manifest(ref).inputs
    _, readers, descendants = lineage(cache, ref)
    assert code == 0
    assert lines[:2] == [f"outliers/{ref.key}", str(cache.folder("outliers", ref.key))]
    branch = f"└── statistics x {SHARDS}: {inputs[0]['key'][:12]} … {inputs[-1]['key'][:12]}"
    assert above == [branch, f"    └── {ran.chain.pool.short}"]
    assert {line.lstrip("├└─ ") for line in below if line[0] in "├└"} == readers
    assert {line.lstrip("│├└─ \u00a0") for line in below} == descendants


def test_show_lists_every_file_with_size_and_hash(command: Command, ran: RealRun, cache: ArtifactStore) -> None:
    _, out, _ = command("cache", "show", ran.chain.outliers.key)
    files = cache.manifest(ran.chain.outliers).files
    rows = [line.split() for line in out.splitlines()[-len(files) :]]
    assert rows == [[f"{each['size']:,}", each["sha256"][:12], name] for name, each in files.items()]


def test_show_json_has_the_manifest_and_the_lineage_both_ways(
    json_of: Json, ran: RealRun, cache: ArtifactStore
) -> None:
    ref = ran.chain.outliers
    manifest = cache.manifest(ref)
    ancestors, readers, descendants = lineage(cache, ref)
    found = json_of("cache", "show", ref.key[:12])
    assert (found["path"], found["key"]) == (str(cache.folder("outliers", ref.key)), ref.key)
    assert (found["inputs"], found["files"], found["runs"]) == (manifest.inputs, manifest.files, [RUN])
    assert {Ref(**each).short for each in found["read_by"]} == readers
    assert (found["ancestors"], found["descendants"]) == (sorted(ancestors), sorted(descendants))
    assert {ran.chain.pool.short} < ancestors


def test_show_of_the_first_artifact_has_everything_below_it(json_of: Json, ran: RealRun, cache: ArtifactStore) -> None:
    found = json_of("cache", "show", ran.chain.pool.key)
    assert found["ancestors"] == found["inputs"] == []
    assert found["descendants"] == sorted(lineage(cache, ran.chain.pool)[2])
    assert {ran.chain.outliers.short, ran.chain.checkpoint.short} < set(found["descendants"])


def test_show_names_inputs_that_are_no_longer_here(
    command: Command, json_of: Json, ran: RealRun, cache: ArtifactStore
) -> None:
    lost = refs_of(cache, "statistics")[0]
    delete(cache, lost)
    delete(cache, ran.chain.pool)
    _, out, _ = command("cache", "show", ran.chain.outliers.key)
    assert f"statistics x {SHARDS}: " in out
    assert ", 1 no longer here" in out
    assert f"{ran.chain.pool.short} (no longer here)" in out
    found = json_of("cache", "show", ran.chain.outliers.key)
    assert {lost.short, ran.chain.pool.short} <= set(found["ancestors"])


def test_show_ends_when_manifests_of_strangers_lead_in_a_circle(
    command: Command, json_of: Json, ran: RealRun, cache: ArtifactStore
) -> None:
    pool = cache.manifest(ran.chain.pool)
    circle = dataclasses.replace(pool, inputs=[dataclasses.asdict(ran.chain.outliers)])
    (cache.folder("pool", pool.key) / MANIFEST).write_bytes(circle.to_bytes())
    code, out, _ = command("cache", "show", ran.chain.outliers.key)
    assert (code, ran.chain.pool.short in out) == (0, True)
    assert ran.chain.outliers.short in json_of("cache", "show", ran.chain.outliers.key)["ancestors"]


def test_show_says_so_when_there_is_nothing_above_below_or_no_run(
    command: Command, ran: RealRun, cache: ArtifactStore
) -> None:
    (cache.root / "runs" / f"{RUN}.json").unlink()
    _, first, _ = command("cache", "show", ran.chain.pool.key)
    _, last, _ = command("cache", "show", refs_of(cache, "report")[0].key)
    assert "made from: nothing" in first.splitlines()
    assert "what was made from it: nothing" in last.splitlines()
    assert "runs         none" in first.splitlines()


@pytest.mark.parametrize("key", ["feed" * 3, "pool/feed", "no-stage/ab", "../ab"])
def test_show_of_a_key_that_is_not_there_says_how_to_find_one(command: Command, key: str) -> None:
    code, out, err = command("cache", "show", key)
    assert (code, out) == (1, "")
    assert f"0 artifacts have a key that begins with '{key}'; `covercal cache ls` lists them." in err


def test_show_of_several_names_them_and_asks_for_more_digits(command: Command, cache: ArtifactStore) -> None:
    code, _, err = command("cache", "show", "statistics/")
    assert code == 1
    assert f"{SHARDS} artifacts have a key that begins with 'statistics/' (" in err
    assert all(ref.short in err for ref in refs_of(cache, "statistics")[:5])
    assert "give more digits" in err


# --- verify ----------------------------------------------------------------------------------------------------------


def test_verify_of_a_whole_store_counts_what_it_checked(command: Command, json_of: Json, ran: RealRun) -> None:
    count = len(ran.refs)
    assert command("cache", "verify") == (0, f"{count} artifacts checked, 0 damaged.\n", "")
    assert json_of("cache", "verify") == {"checked": count, "faults": {}, "strangers": {}}


def test_verify_names_what_is_damaged_and_exits_with_1(
    command: Command, json_of: Json, ran: RealRun, cache: ArtifactStore
) -> None:
    ref = ran.chain.selection
    fault = f"file {ref.short}/{flip_a_bit(cache, ref)} does not match its sha256"
    code, out, _ = command("cache", "verify")
    assert code == 1
    assert out.splitlines() == [
        f"selection/{ref.key}: {fault}",
        f"{len(ran.refs)} artifacts checked, 1 damaged; the next run that needs one makes it again.",
    ]
    assert json_of("cache", "verify", code=1)["faults"] == {f"selection/{ref.key}": [fault]}


def test_verify_names_a_stranger_as_what_may_be_deleted(
    command: Command, json_of: Json, ran: RealRun, cache: ArtifactStore
) -> None:
    ref = ran.chain.selection
    (cache.folder(ref.stage, ref.key) / ".DS_Store").touch()
    said = f"file {ref.short}/.DS_Store is not in the manifest"
    code, out, _ = command("cache", "verify")
    assert (code, out.splitlines()) == (
        0,
        [
            f"selection/{ref.key}: {said} (no damage; it may be deleted)",
            f"{len(ran.refs)} artifacts checked, 0 damaged.",
        ],
    )
    assert json_of("cache", "verify")["strangers"] == {f"selection/{ref.key}": [said]}


def test_verify_does_not_miss_what_is_deleted_meanwhile(
    command: Command, ran: RealRun, cache: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage = ArtifactStore.damage

    def of_what_just_went(store: ArtifactStore, stage: str, key: str) -> list[str]:
        delete(store, Ref(stage, key))
        return damage(store, stage, key)

    monkeypatch.setattr(ArtifactStore, "damage", of_what_just_went)
    assert command("cache", "verify") == (0, f"{len(ran.refs)} artifacts checked, 0 damaged.\n", "")


def test_verify_of_one_key_checks_that_alone(
    command: Command, json_of: Json, ran: RealRun, cache: ArtifactStore
) -> None:
    flip_a_bit(cache, ran.chain.selection)
    assert json_of("cache", "verify", f"pool/{ran.chain.pool.key[:10]}") == {
        "checked": 1,
        "faults": {},
        "strangers": {},
    }
    assert json_of("cache", "verify", ran.chain.selection.key, code=1)["checked"] == 1
    assert command("cache", "verify", "statistics/")[1] == f"{SHARDS} artifacts checked, 0 damaged.\n"


def test_verify_names_a_folder_without_a_manifest(json_of: Json, ran: RealRun, cache: ArtifactStore) -> None:
    (cache.folder("pool", ran.chain.pool.key) / MANIFEST).unlink()
    (fault,) = json_of("cache", "verify", code=1)["faults"].values()
    assert fault == [f"file {ran.chain.pool.short}/{MANIFEST} is missing"]


def test_verify_of_a_key_that_is_not_there_is_no_success(command: Command) -> None:
    code, out, err = command("cache", "verify", "pool/feed")
    assert (code, out) == (1, "")
    assert "No artifact has a key that begins with 'pool/feed'; `covercal cache ls` lists them." in err


# --- runs, pin, unpin ------------------------------------------------------------------------------------------------


def test_runs_lists_when_how_and_what(command: Command, ran: RealRun, cache: ArtifactStore) -> None:
    add_run(cache, "20270101-failed", state="failed")
    code, out, _ = command("cache", "runs")
    first, second, last = out.splitlines()[1:]
    assert code == 0
    assert first.split()[:5] == [RUN, "completed", "2", "s", str(len(ran.refs))]
    assert f"pool, texts, {SHARDS} statistics and 13 more" in first
    assert first.rstrip().endswith(ran.record.command)
    assert second.split() == ["20270101-failed", "failed", "61", "s", "0", "nothing", "covercal", "run", "x"]
    assert last == "2 runs, 0 pinned. Next: covercal cache pin RUN, or push RUN"


def test_runs_json_has_a_row_for_every_run(json_of: Json, ran: RealRun, cache: ArtifactStore) -> None:
    waiting = StageRecord("pool", "pool", "", "failed", "", 0.0)
    add_run(cache, "20270101-failed", waiting, state="failed")
    first, second = json_of("cache", "runs")["runs"]
    assert (first["run"], first["state"], first["started"], first["seconds"], first["pinned"]) == (
        *(RUN, "completed", "2026-01-01T00:00:00+00:00", 1.5),
        False,
    )
    assert (first["artifacts"], first["command"]) == (len(ran.refs), ran.record.command)
    assert (second["run"], second["made"], second["artifacts"]) == ("20270101-failed", "nothing", 0)


def test_names_of_runs_are_whole_on_a_narrow_terminal(
    command: Command, cache: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = command("cache", "runs")
    assert RUN in out


def test_a_pinned_run_is_marked_until_it_is_unpinned(command: Command, json_of: Json, cache: ArtifactStore) -> None:
    code, out, _ = command("cache", "pin", RUN[:6])
    assert (code, f"Run {RUN} is pinned" in out, f"Undo: covercal cache unpin {RUN}" in out) == (0, True, True)
    assert [row["pinned"] for row in json_of("cache", "runs")["runs"]] == [True]
    assert f"{RUN} pinned" in command("cache", "runs")[1]
    assert command("cache", "unpin", RUN) == (0, f"Run {RUN} is no longer pinned.\n", "")
    assert [row["pinned"] for row in json_of("cache", "runs")["runs"]] == [False]


def test_latest_is_the_last_run_that_was_completed(command: Command, cache: ArtifactStore) -> None:
    add_run(cache, "20260601-later")
    add_run(cache, "20270101-failed", state="failed")
    assert "Run 20260601-later is pinned" in command("cache", "pin", "latest")[1]


@pytest.mark.parametrize("verb", ["pin", "unpin"])
@pytest.mark.parametrize(("name", "count"), [("1999", 0), ("2026", 2)])
def test_a_name_that_is_not_that_of_one_run_is_a_sentence(
    command: Command, cache: ArtifactStore, verb: str, name: str, count: int
) -> None:
    add_run(cache, "20260601-later")
    before = outside_locks(cache)
    code, out, err = command("cache", verb, name)
    assert (code, out) == (1, "")
    assert f"{count} runs have a name that begins with '{name}'; `covercal cache runs` lists them." in err
    assert outside_locks(cache) == before


# --- gc --------------------------------------------------------------------------------------------------------------


def put_leftover(store: ArtifactStore) -> Path:
    folder = store.root / "staging" / f"{'f' * 64}-0123"
    folder.mkdir(parents=True)
    (folder / "half").write_text("half")
    return folder


def test_gc_dry_run_deletes_nothing_and_says_what_would_go(
    command: Command, ran: RealRun, cache: ArtifactStore
) -> None:
    put_leftover(cache)
    before = outside_locks(cache)
    code, out, _ = command("cache", "gc", "--dry-run", "--keep-days", 0)
    lines = out.splitlines()
    assert code == 0
    assert outside_locks(cache) == before
    assert {ref.short for ref in ran.refs} < {line.split()[0] for line in lines}
    assert any(line.startswith(f"staging/{'f' * 12}… (staging folder of a build that was cut short)") for line in lines)
    assert lines[-2].startswith(f"{len(ran.refs)} artifacts and 1 leftovers would go, ")
    assert lines[-2].endswith("; 0 artifacts stay (pinned runs, and 0 days).")
    assert lines[-1] == "Next: covercal cache gc --keep-days 0"


def test_gc_deletes_what_the_dry_run_said(command: Command, json_of: Json, ran: RealRun, cache: ArtifactStore) -> None:
    leftover = put_leftover(cache)
    planned = json_of("cache", "gc", "--dry-run", "--keep-days", 0)
    assert sorted(each["key"] for each in planned["artifacts"]) == sorted(ref.key for ref in ran.refs)
    assert [each["path"] for each in planned["leftovers"]] == [str(leftover)]
    assert planned["bytes"] == sum(each["bytes"] for each in (*planned["artifacts"], *planned["leftovers"]))
    assert json_of("cache", "gc", "--keep-days", 0) == {**planned, "dry_run": False}
    assert (list(cache.folders()), leftover.exists()) == ([], False)


def test_gc_says_what_it_deleted(command: Command, ran: RealRun, cache: ArtifactStore) -> None:
    code, out, _ = command("cache", "gc", "--keep-days", 0)
    assert code == 0
    assert out.splitlines()[-1].startswith(f"{len(ran.refs)} artifacts and 0 leftovers deleted, ")


def test_gc_keeps_pinned_runs(command: Command, json_of: Json, ran: RealRun, cache: ArtifactStore) -> None:
    command("cache", "pin", "latest")
    assert json_of("cache", "gc", "--keep-days", 0)["kept"] == len(ran.refs)
    command("cache", "unpin", "latest")
    assert json_of("cache", "gc", "--keep-days", 0)["kept"] == 0


def test_gc_by_default_keeps_a_month(command: Command, cache: ArtifactStore, ran: RealRun) -> None:
    code, out, _ = command("cache", "gc")
    assert code == 0
    assert out == (
        f"0 artifacts and 0 leftovers deleted, 0.0 MB; {len(ran.refs)} artifacts stay (pinned runs, and 30 days).\n"
    )


def test_gc_says_what_stays_only_because_it_is_in_use(
    command: Command, json_of: Json, ran: RealRun, cache: ArtifactStore
) -> None:
    cache.path(ran.chain.pool)
    _, out, _ = command("cache", "gc", "--keep-days", 0)
    assert "1 artifacts stay (pinned runs, and 0 days), 1 of them only because a running process uses them." in out
    assert json_of("cache", "gc", "--keep-days", 0)["in_use"] == 1


@pytest.mark.parametrize("days", ["-1", "soon", "nan"])
def test_gc_with_days_that_are_none_exits_with_2_and_deletes_nothing(
    command: Command, cache: ArtifactStore, days: str
) -> None:
    before = outside_locks(cache)
    code, _, err = command("cache", "gc", "--keep-days", days)
    assert (code, "--keep-days" in err) == (2, True)
    assert outside_locks(cache) == before


@pytest.mark.parametrize("arguments", [["gc"], ["runs"], ["pin", "latest"], ["show", "pool/"]], ids=lambda a: a[0])
def test_a_run_record_that_cannot_be_read_is_named(
    command: Command, cache: ArtifactStore, arguments: list[str]
) -> None:
    path = cache.root / "runs" / "20260201.json"
    path.write_text("{")
    before = outside_locks(cache)
    code, out, err = command("cache", *arguments)
    assert (code, out) == (1, "")
    assert str(path) in err
    assert outside_locks(cache) == before


# --- a remote --------------------------------------------------------------------------------------------------------


@pytest.fixture
def team(cache: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty remote cache in a folder, which the command line may write to."""
    folder = tmp_path / "team"
    folder.mkdir()
    open_remote(str(folder), writable=True).create()
    monkeypatch.setenv("COVERCAL_REMOTE", str(folder))
    monkeypatch.setenv("COVERCAL_REMOTE_WRITE", "1")
    return folder


@pytest.fixture
def elsewhere(team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> ArtifactStore:
    """The run is in the remote, and the command line works on an empty store from now on."""
    assert command("cache", "push")[0] == 0
    monkeypatch.setenv("COVERCAL_CACHE", str(tmp_path / "elsewhere"))
    return ArtifactStore(tmp_path / "elsewhere")


def test_push_and_pull_say_what_they_moved(
    command: Command, ran: RealRun, team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(ran.refs)
    assert command("cache", "push") == (
        0,
        f"Run {RUN}: {count} artifacts sent, 0 were there already.\n"
        f"Next: covercal cache pull {RUN}, on another machine with the same COVERCAL_REMOTE.\n",
        "",
    )
    monkeypatch.setenv("COVERCAL_CACHE", str(tmp_path / "elsewhere"))
    assert command("cache", "pull", RUN) == (
        0,
        f"Run {RUN}: {count} artifacts pulled, 0 were there already.\n"
        "Next: covercal cache show KEY, or run the recipe: it finds them here.\n",
        "",
    )
    assert command("cache", "verify")[1] == f"{count} artifacts checked, 0 damaged.\n"
    assert RUN in command("cache", "runs")[1]


def test_push_and_pull_json_count_what_they_moved(json_of: Json, ran: RealRun, elsewhere: ArtifactStore) -> None:
    count = len(ran.refs)
    assert json_of("cache", "pull") == {"runs": [{"run": RUN, "moved": count, "there": 0}]}
    assert json_of("cache", "pull", RUN[:8]) == {"runs": [{"run": RUN, "moved": 0, "there": count}]}
    assert json_of("cache", "push") == {"runs": [{"run": RUN, "moved": 0, "there": count}]}


def test_several_runs_are_moved_at_once(json_of: Json, cache: ArtifactStore, team: Path) -> None:
    add_run(cache, "20270101-later")
    assert [each["run"] for each in json_of("cache", "push", RUN, "20270101")["runs"]] == [RUN, "20270101-later"]
    assert [each["run"] for each in json_of("cache", "runs", "--remote")["runs"]] == [RUN, "20270101-later"]


def test_runs_of_the_remote_are_listed_apart(command: Command, json_of: Json, elsewhere: ArtifactStore) -> None:
    assert json_of("cache", "runs") == {"runs": []}
    assert [row["run"] for row in json_of("cache", "runs", "--remote")["runs"]] == [RUN]
    assert RUN in command("cache", "runs", "--remote")[1]


def test_remote_says_where_it_is_what_it_holds_and_what_is_allowed(
    command: Command, json_of: Json, ran: RealRun, elsewhere: ArtifactStore, team: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(ran.refs)
    assert command("cache", "remote") == (0, f"Remote {team} answers: {count} artifacts, read and write.\n", "")
    assert json_of("cache", "remote") == {"remote": str(team), "created": False, "artifacts": count, "writable": True}
    monkeypatch.setenv("COVERCAL_REMOTE_WRITE", "0")
    assert command("cache", "remote") == (
        0,
        f"Remote {team} answers: {count} artifacts, read-only.\n"
        "COVERCAL_REMOTE_WRITE=1 lets runs send what they build.\n",
        "",
    )


def test_remote_create_sets_a_cache_up_once(
    command: Command, json_of: Json, team: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    monkeypatch.setenv("COVERCAL_REMOTE", str(tmp_path / "new"))
    code, _, err = command("cache", "remote")
    assert (code, f"Remote {tmp_path / 'new'} holds no covercal cache" in err) == (2, True)
    assert "`covercal cache remote --create` sets one up" in err
    assert "was set up: 0 artifacts, read and write" in command("cache", "remote", "--create")[1]
    assert file_names(tmp_path / "new") == [MARKER]
    assert json_of("cache", "remote", "--create")["created"] is False


def test_push_of_a_run_whose_artifacts_are_gone_names_them_and_sends_nothing(
    command: Command, ran: RealRun, cache: ArtifactStore, team: Path
) -> None:
    delete(cache, ran.chain.selection)
    code, out, err = command("cache", "push")
    assert (code, out) == (1, "")
    assert (
        f"Run {RUN} cannot be pushed: {ran.chain.selection.short} is not here (any more); run its recipe again." in err
    )
    assert file_names(team) == [MARKER]


@pytest.mark.parametrize(
    ("verb", "place"), [("push", "covercal cache runs`"), ("pull", "covercal cache runs --remote`")]
)
def test_a_run_that_is_not_there_is_not_moved(command: Command, team: Path, verb: str, place: str) -> None:
    code, out, err = command("cache", verb, "1999")
    assert (code, out) == (1, "")
    assert "0 runs " in err
    assert f"have a name that begins with '1999'; `{place} lists them." in err


@pytest.mark.parametrize("arguments", [["push"], ["remote", "--create"]], ids=lambda a: a[0])
def test_a_remote_that_may_only_be_read_is_not_written_to(
    command: Command, team: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("COVERCAL_REMOTE_WRITE", "")
    code, out, err = command("cache", *arguments)
    assert (code, out) == (2, "")
    assert f"Remote {team} is read-only here; COVERCAL_REMOTE_WRITE=1 lets this user send to it." in err
    assert file_names(team) == [MARKER]


# --- settings --------------------------------------------------------------------------------------------------------

WITH_REMOTE = [["push"], ["pull"], ["remote"], ["runs", "--remote"]]
WITHOUT_REMOTE = [["ls"], ["show", "pool/"], ["verify"], ["runs"], ["pin", "latest"], ["unpin", "latest"], ["gc"]]


def test_what_needs_a_remote_says_that_none_is_set(command: Command) -> None:
    for arguments in WITH_REMOTE:
        code, out, err = command("cache", *arguments)
        assert (code, out) == (2, "")
        assert "No remote is set: COVERCAL_REMOTE is not set, or --offline was given." in err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REMOTE_WRITE", "maybe", "COVERCAL_REMOTE_WRITE is 'maybe'; it is 1 or 0."),
        ("OFFLINE", "perhaps", "COVERCAL_OFFLINE is 'perhaps'; it is 1 or 0."),
        ("REMOTE_TIMEOUT", "soon", "COVERCAL_REMOTE_TIMEOUT 'soon' is no number of seconds"),
        ("REMOTE", "ftp://there/x", "it begins with s3://, gs://, az://, file:// or is a folder"),
        ("REMOTE", "s3://me:secret@bucket/x", "COVERCAL_REMOTE must hold no credentials"),
        ("REMOTE", "/no/such/folder", "Remote folder /no/such/folder is not there; is it mounted?"),
    ],
)
def test_a_wrong_setting_exits_with_2_and_says_what_would_be_right(
    command: Command, team: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(f"COVERCAL_{name}", value)
    for arguments in WITH_REMOTE:
        code, out, err = command("cache", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert "secret" not in err


@pytest.mark.parametrize("timeout", ["-1", "inf", "nan", "0"])
def test_a_timeout_that_is_no_time_exits_with_2_and_is_named(
    command: Command, cache: ArtifactStore, monkeypatch: pytest.MonkeyPatch, timeout: str
) -> None:
    use_unreachable_s3(monkeypatch)
    monkeypatch.setenv("COVERCAL_REMOTE_TIMEOUT", timeout)
    code, _, err = command("cache", "remote")
    assert (code, "COVERCAL_REMOTE_TIMEOUT" in err) == (2, True)


def test_what_needs_no_remote_asks_none(
    command: Command, cache: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVERCAL_REMOTE", "/no/such/folder")
    for arguments in WITHOUT_REMOTE:
        code, out, _ = command("cache", *arguments)
        assert (arguments, code, bool(out)) == (arguments, 0, True)


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["ls", "--no-such-option"], ["pin"], ["show"]])
def test_what_is_no_command_exits_with_2(command: Command, arguments: list[str]) -> None:
    assert command("cache", *arguments)[0] == 2


# --- running and planning with a remote that has everything ----------------------------------------------------------


def run_without_prefect(running: Running, *_: Any, **__: Any) -> Finished:
    """Run the flow's chain in this process; stands in for `flows.run._run_flow`."""
    recipe, recorder = running.recipe, running.recorder
    execution = Direct(open_store(), recorder)
    chain = run_chain(recipe, identify(recipe, execution.store), execution, until="report")
    return running.finish(conclude(recipe, chain, execution, recorder.events, until="report"))


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run flows without Prefect, which other tests are about."""
    monkeypatch.setattr(flows.run, "_run_flow", run_without_prefect)
    monkeypatch.setattr(flows.run, "configured_server", lambda: "")


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch, direct: None) -> None:
    """Fail when any step builds anything."""

    def build(*_: Any, **inputs: Any) -> None:
        raise AssertionError(f"something is computed from {', '.join(inputs)}")

    for step in every_step():
        monkeypatch.setattr(step, "build", build)


def decisions(rows: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Return what was decided, by stage."""
    return {row["stage"]: set(row["counts"]) for row in rows}


def test_a_plan_says_that_everything_will_be_pulled(
    json_of: Json, ran: RealRun, elsewhere: ArtifactStore, team: Path, nothing_is_computed: None
) -> None:
    *rows, report = json_of("plan", ran.recipe)["stages"]
    assert (report["stage"], report["decision"]) == ("report", "waits")  # for the numbers that it shows
    light = {"pool", "texts"}  # what they hold decides what else there is to do
    assert decisions(rows) == {row["stage"]: {"pulled" if row["stage"] in light else "pull"} for row in rows}
    assert {row["reason"] for row in rows} == {f"in {team}", f"from {team}"}
    assert light < {row["stage"] for row in rows}


def test_a_plan_pulls_no_more_than_it_must_know(
    command: Command, ran: RealRun, elsewhere: ArtifactStore, nothing_is_computed: None
) -> None:
    code, out, _ = command("plan", ran.recipe)
    assert code == 0
    assert f"{SHARDS} to pull" in out
    pulled = {manifest.stage for manifest in elsewhere.manifests()}
    assert pulled >= {"pool", "texts"}
    assert pulled.isdisjoint({"statistics", "reference", "checkpoint", "evaluation"})


def test_a_plan_does_not_count_what_it_has_pulled_as_still_to_do(
    command: Command, ran: RealRun, elsewhere: ArtifactStore, nothing_is_computed: None
) -> None:
    stages = {stage.label for stage in ran.record.stages}
    assert f"{len(stages - {'pool', 'texts'})} of {len(stages)} stages to do" in command("plan", ran.recipe)[1]


def test_a_run_pulls_everything_and_computes_nothing(
    json_of: Json, ran: RealRun, elsewhere: ArtifactStore, team: Path, nothing_is_computed: None
) -> None:
    found = json_of("run", ran.recipe)
    here = {manifest.key: manifest.digest for manifest in elsewhere.manifests()}
    assert here == {ref.key: ArtifactStore(ran.root).manifest(ref).digest for ref in ran.refs}
    assert Path(found["checkpoint"]) == elsewhere.folder("checkpoint", ran.chain.checkpoint.key)
    (record,) = read_runs(elsewhere.root)
    assert {stage.reason for stage in record.stages if stage.decision == "pulled"} == {f"from {team}"}
    assert {stage.decision for stage in record.stages} <= {"pulled", "hit"}
    assert {stage.stage for stage in record.stages if stage.decision == "pulled"} >= {
        "pool",
        "checkpoint",
        "evaluation",
    }
    assert json_of("cache", "runs")["runs"][0]["made"] == "nothing"


def test_a_run_says_pulled_of_everything_it_pulled(
    json_of: Json, ran: RealRun, elsewhere: ArtifactStore, nothing_is_computed: None
) -> None:
    rows = json_of("run", ran.recipe)["stages"]
    assert decisions(rows) == {row["stage"]: {"pulled"} for row in rows}


def test_after_that_a_run_needs_no_remote(
    command: Command,
    json_of: Json,
    ran: RealRun,
    elsewhere: ArtifactStore,
    nothing_is_computed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command("cache", "pull")
    monkeypatch.setenv("COVERCAL_REMOTE", "/no/such/folder")
    code, _, err = command("run", ran.recipe)
    assert (code, "Remote folder /no/such/folder is not there" in err) == (2, True)
    assert {row["decision"] for row in json_of("run", ran.recipe, "--offline")["stages"]} == {"hit"}


def test_offline_a_plan_asks_no_remote(json_of: Json, ran: RealRun, elsewhere: ArtifactStore) -> None:
    found = decisions(json_of("plan", ran.recipe, "--offline")["stages"])
    assert (found["pool"], found["statistics"], found["checkpoint"]) == ({"built"}, {"build"}, {"waits"})


@pytest.mark.parametrize("verb", ["plan", "run", "select"])
def test_a_remote_that_does_not_answer_exits_with_1_and_offline_goes_on(
    command: Command, ran: RealRun, direct: None, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    shutil.rmtree(open_store().folder("selection", ran.chain.selection.key))
    use_unreachable_s3(monkeypatch)
    code, _, err = command(verb, ran.recipe)
    assert (code, "--offline goes on without the remote" in err) == (1, True)
    assert "s3://nowhere/cache" in err
    assert command(verb, ran.recipe, "--offline")[0] == 0


def use_unreachable_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name a remote at which nothing listens."""
    monkeypatch.setattr("storage.remote.RETRIES", 0)
    for name, value in (
        ("COVERCAL_REMOTE", "s3://nowhere/cache"),
        ("AWS_ENDPOINT_URL", closed_port()),
        ("AWS_ACCESS_KEY_ID", "user"),
        ("AWS_SECRET_ACCESS_KEY", "not-so-secret"),
        ("AWS_REGION", "us-east-1"),
        ("NO_PROXY", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)


def test_what_the_remote_lacks_is_built_and_sent(
    json_of: Json, ran: RealRun, elsewhere: ArtifactStore, team: Path, direct: None
) -> None:
    key = ran.chain.checkpoint.key
    shutil.rmtree(team / "objects" / "checkpoint" / key[:2] / key)
    planned = {row["stage"]: row["decision"] for row in json_of("plan", ran.recipe)["stages"]}
    assert (planned["checkpoint"], planned["nearest"], planned["statistics"]) == ("build", "pull", "pull")
    done = {row["stage"]: row for row in json_of("run", ran.recipe)["stages"]}
    assert (done["checkpoint"]["decision"], done["nearest"]["decision"]) == ("built", "pulled")
    assert (team / "objects" / "checkpoint" / key[:2] / key / MANIFEST).is_file()
    assert (
        json_of("cache", "runs")["runs"][0]["made"] == "checkpoint, report"
    )  # whose figure of times has the new one's


def test_a_run_with_a_remote_that_may_only_be_read_sends_nothing(
    json_of: Json, ran: RealRun, cache: ArtifactStore, team: Path, direct: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVERCAL_REMOTE_WRITE", "no")
    delete(cache, ran.chain.checkpoint)
    done = {row["stage"]: row["decision"] for row in json_of("run", ran.recipe)["stages"]}
    assert (done["checkpoint"], done["pool"]) == ("built", "hit")
    assert file_names(team) == [MARKER]


def test_a_write_permission_that_is_neither_yes_nor_no_stops_a_run(
    command: Command, ran: RealRun, team: Path, nothing_is_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COVERCAL_REMOTE_WRITE", "maybe")
    for verb in ("plan", "run", "select"):
        code, _, err = command(verb, ran.recipe)
        assert (code, "COVERCAL_REMOTE_WRITE is 'maybe'; it is 1 or 0." in err) == (2, True)
