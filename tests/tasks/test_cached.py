import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import tasks
from covercal.errors import InputError
from covercal.quantization_settings import Quantization
from covercal.recipe import Outliers, Recipe
from storage.artifacts import ArtifactStore
from storage.errors import RemoteError, RemoteSettingsError, StorageError
from storage.keys import canonical_json
from storage.manifest import Decision, Ref
from storage.work import WorkFolder
from tasks.cached import Build, ByDigest, Step, cached, key_material, may_pass, open_store, references
from tasks.identities import ModelIdentity
from tasks.progress import Progress, listening
from tasks.quantize import PoolInputs

KEY, OTHER_KEY = "a" * 64, "b" * 64
REF = Ref("pool", KEY, "c" * 64)


@cached("words", version=1, ignored=("device",))
def write_words(build: Build, *, words: tuple[str, ...], source: Any = None, device: str = "cpu") -> dict[str, Any]:
    """Write words to a file, one a line."""
    advance = build.progress(len(words), "words")
    for word in words:
        if word == "bad":
            raise ValueError("a bad word")
        advance()
    (build.folder / "words.txt").write_text("\n".join(words))
    return {"count": len(words)}


def every_step() -> Iterator[Step]:
    """Yield all steps of the package."""
    for module in pkgutil.iter_modules(tasks.__path__):
        for value in vars(importlib.import_module(f"tasks.{module.name}")).values():
            if isinstance(value, Step):
                yield value


STEPS = {step.stage: step for step in every_step()}


# --- key material --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [Path("/data/pool.jsonl"), PurePosixPath("pool.jsonl"), {1, 2}, b"bytes", Decimal(1), np.float32(1), np.arange(2)],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"a": [v]}, lambda v: (1, (v,))], ids=["bare", "map", "row"])
def test_paths_and_what_is_no_plain_value_cannot_be_part_of_a_key(value: Any, wrap: Any) -> None:
    with pytest.raises(TypeError, match=f"{type(value).__name__} cannot be part of a key"):
        key_material(wrap(value))


def test_a_path_in_a_data_class_cannot_be_part_of_a_key() -> None:
    @dataclass
    class Place:
        folder: Path

    with pytest.raises(TypeError, match="cannot be part of a key"):
        key_material(Place(Path("/data")))


def test_a_settings_class_that_holds_a_path_cannot_be_part_of_a_key() -> None:
    class Place(BaseModel):
        folder: Path

    with pytest.raises(TypeError, match="cannot be part of a key"):
        key_material(Place(folder=Path("/data")))


def test_a_reference_stands_for_its_key() -> None:
    assert key_material(REF) == {"stage": "pool", "key": KEY}


def test_a_reference_by_digest_stands_for_its_content() -> None:
    assert key_material(ByDigest(REF)) == {"stage": "pool", "digest": "c" * 64}


def test_what_has_key_material_of_its_own_speaks_for_itself() -> None:
    @dataclass
    class Shard:
        start: int
        tokens: str

        def key_material(self) -> dict[str, Any]:
            return {"tokens": self.tokens, "made_of": REF}

    assert key_material(Shard(3, "abc")) == {"tokens": "abc", "made_of": {"stage": "pool", "key": KEY}}


def test_a_data_class_stands_for_its_fields() -> None:
    @dataclass
    class Window:
        size: int
        limits: tuple[int, ...]

    assert key_material(Window(3, (1, 2))) == {"size": 3, "limits": [1, 2]}


def test_a_section_of_the_recipe_stands_for_all_its_fields() -> None:
    assert key_material(Outliers()) == Outliers().model_dump(mode="json")
    assert set(key_material(Outliers())) == set(Outliers.model_fields)


def test_a_section_with_key_material_of_its_own_stands_for_that() -> None:
    assert key_material(Quantization()) == Quantization().key_material()


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(_json)
def test_plain_json_stands_for_itself(value: Any) -> None:
    assert key_material(value) == value


@given(st.dictionaries(st.text(), _json, max_size=5))
def test_the_order_of_inputs_does_not_matter(inputs: dict[str, Any]) -> None:
    turned = dict(reversed(inputs.items()))
    assert write_words.request(inputs).key == write_words.request(turned).key


@given(_json, _json)
def test_two_requests_share_a_key_only_when_their_inputs_are_the_same_json(a: Any, b: Any) -> None:
    same = canonical_json(a) == canonical_json(b)
    assert (write_words.request({"words": a}).key == write_words.request({"words": b}).key) == same


# --- requests ------------------------------------------------------------------------------------------------------


def test_ignored_inputs_do_not_change_the_key() -> None:
    on_cpu = write_words.request({"words": ("a",), "device": "cpu"})
    on_gpu = write_words.request({"words": ("a",), "device": "cuda"})
    assert on_cpu.key == on_gpu.key


def test_an_ignored_input_may_be_what_a_key_could_not_hold() -> None:
    assert write_words.request({"words": ("a",), "device": Path("/dev/gpu")}).material == {"words": ["a"]}


@pytest.mark.parametrize("changed", [{"words": ("a", "b")}, {"words": ("b",)}, {"source": 1}, {"source": REF}])
def test_every_other_input_changes_the_key(changed: Mapping[str, Any]) -> None:
    inputs = {"words": ("a",), "source": None}
    assert write_words.request(inputs).key != write_words.request({**inputs, **changed}).key


def test_a_version_and_a_stage_have_keys_of_their_own() -> None:
    steps = [
        Step(stage, version, write_words.build, frozenset(), {}) for stage in ("words", "lines") for version in (1, 2)
    ]
    assert len({step.request({"words": ("a",)}).key for step in steps}) == 4


def test_two_artifacts_of_one_content_share_a_key_by_digest_and_not_by_reference() -> None:
    same = dataclasses.replace(REF, key=OTHER_KEY)
    assert (
        write_words.request({"words": (), "source": ByDigest(REF)}).key
        == write_words.request({"words": (), "source": ByDigest(same)}).key
    )
    assert (
        write_words.request({"words": (), "source": REF}).key != write_words.request({"words": (), "source": same}).key
    )


def test_infinity_cannot_be_part_of_a_key() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        _ = write_words.request({"words": float("inf")}).key


def test_references_are_found_wherever_they_are() -> None:
    refs = [Ref("pool", digit * 64) for digit in "123456"]
    value = {"a": refs[0], "b": (refs[1], [ByDigest(refs[2])]), "c": {"d": {"e": refs[3]}}, "f": [(refs[4],)], "g": 3}
    assert list(references({**value, "h": ByDigest(refs[5])})) == refs


def test_inputs_count_in_a_key_as_the_step_says_and_are_given_to_it_as_they_are(tmp_path: Path) -> None:
    def as_words(inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"words": sorted(inputs["text"].split()), "place": inputs["place"]}

    @cached("sorted", version=1, ignored=("place",), keyed=as_words)
    def write(build: Build, *, text: str, place: str) -> dict[str, Any]:
        return {"text": text, "place": place}

    store = ArtifactStore(tmp_path)
    first = write.run(store, "x", {"text": "b a", "place": "here"})
    assert write.request({"text": "b a", "place": "here"}).material == {"words": ["a", "b"]}
    assert first.info == {"text": "b a", "place": "here"}
    assert write.run(store, "x", {"text": "a b", "place": "there"}).decision is Decision.HIT
    assert write.run(store, "x", {"text": "a c", "place": "here"}).decision is Decision.BUILT


def test_references_are_found_inside_data_classes() -> None:
    @dataclass(frozen=True, slots=True)
    class Inner:
        parts: tuple[Ref, ...]

    @dataclass
    class Outer:
        whole: Ref
        missing: Ref | None
        inner: Inner
        count: int = 3

    refs = [Ref("pool", digit * 64) for digit in "1234"]
    value = [Outer(refs[0], None, Inner((refs[1], refs[2]))), {"a": Inner((refs[3],))}]
    assert list(references(value)) == refs


def test_a_data_class_itself_holds_no_reference() -> None:
    @dataclass
    class Place:
        ref: Ref = REF

    assert list(references(Place)) == []
    assert list(references(Place())) == [REF]


@pytest.mark.parametrize(
    ("step", "given"),
    [(STEPS["block"], {"index": 0}), (STEPS["checkpoint"], {"blocks": (), "pool": None, "calibration": None})],
    ids=["block", "checkpoint"],
)
def test_what_is_cached_of_the_pool_is_in_the_key_and_among_the_inputs(step: Step, given: dict[str, Any]) -> None:
    gram, held_out, *statistics = (Ref("gram", digit * 64) for digit in "1234")
    model = ModelIdentity("m", "w", "t", "folder", "", "float32", trust_remote_code=False)
    inputs = {"model": model, "imported": None, "quantization": Quantization(), "dtype": "float32", "device": "cpu"}
    requests = [
        step.request({**inputs, **given, "cached_pool": pool})
        for pool in (PoolInputs(gram, held_out, tuple(statistics)), PoolInputs(gram, None, ()), PoolInputs())
    ]
    assert requests[0].inputs == (gram, held_out, *statistics)
    assert requests[2].inputs == ()
    assert len({request.key for request in requests}) == 3


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_every_ignored_input_is_an_input(step: Step) -> None:
    assert step.ignored <= set(inspect.signature(step.build).parameters)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_where_a_step_runs_is_never_in_its_key(step: Step) -> None:
    places = {"device", "imported"} & set(inspect.signature(step.build).parameters)
    assert places <= step.ignored


class Changing:
    """An input whose files are found changed after `good` looks."""

    def __init__(self, good: int) -> None:
        self.good = good
        self.asked: list[bool] = []

    def key_material(self) -> str:
        return "changing"

    def check_unchanged(self, store: ArtifactStore, *, unpacked: bool) -> None:
        self.asked.append(unpacked)
        if len(self.asked) > self.good:
            raise InputError("changed")


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: (value,)], ids=["alone", "among others"])
def test_what_changed_while_it_was_read_is_not_kept(store: ArtifactStore, wrap: Callable[[Any], Any]) -> None:
    def build(build: Build, *, imported: Ref | None, text: Any) -> None:
        (build.folder / "values").write_text("read")

    step = Step("pool", 1, build, frozenset(["imported"]), {})
    inputs = {"imported": None, "text": wrap(Changing(0))}
    with pytest.raises(InputError, match="changed"):
        step.run(store, "pool", inputs)
    assert list(store.manifests()) == []
    unchanged = Changing(1)
    assert step.run(store, "pool", {"imported": REF, "text": wrap(unchanged)}).decision is Decision.BUILT
    assert unchanged.asked == [True]


def test_a_part_of_a_build_is_kept_only_while_what_it_read_is_what_the_key_says(store: ArtifactStore) -> None:
    gone_on_from: list[bool] = []

    def build(build: Build, *, text: Any) -> None:
        work = WorkFolder(build.work, {}, build.check)
        for name in ("first", "second"):
            gone_on_from.append(work.whole(name, ["values"]) is not None)
            if not gone_on_from[-1]:
                with work.part(name) as folder:
                    (folder / "values").write_text("read")

    step = Step("pool", 1, build, frozenset(), {})
    with pytest.raises(InputError, match="changed"):
        step.run(store, "pool", {"text": Changing(1)})
    step.run(store, "pool", {"text": Changing(9)})
    assert gone_on_from == [False, False, True, False]


def keyed_inputs(step: Step) -> set[str]:
    _, *names = inspect.signature(step.build).parameters
    return set(names) - step.ignored


AS_GIVEN = {name: step for name, step in STEPS.items() if step.keyed is dict}


def test_two_steps_alone_say_themselves_how_their_inputs_count() -> None:
    assert set(STEPS) - set(AS_GIVEN) == {"task_scores", "checkpoint"}  # test_language_tasks.py holds the former's keys


def test_a_checkpoint_counts_the_tokenizer_that_is_written_into_it() -> None:
    step = STEPS["checkpoint"]
    _, *names = inspect.signature(step.build).parameters
    models = [ModelIdentity("m", "w", t, "folder", "", "float32", trust_remote_code=False) for t in ("t", "other")]
    materials = [step.request({**{name: name for name in names}, "model": model}).material for model in models]
    assert [material["tokenizer"] for material in materials] == [{"files": "t"}, {"files": "other"}]
    assert set(materials[0]) == {step.names.get(name, name) for name in keyed_inputs(step)} | {"tokenizer"}


@pytest.mark.parametrize("step", AS_GIVEN.values(), ids=AS_GIVEN)
def test_every_input_of_a_step_but_the_ignored_ones_is_in_its_key(step: Step) -> None:
    _, *names = inspect.signature(step.build).parameters
    material = step.request({name: name for name in names}).material
    assert sorted(material.values()) == sorted(keyed_inputs(step))


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_only_what_is_in_a_key_has_a_name_of_its_own(step: Step) -> None:
    assert set(step.names) <= keyed_inputs(step)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_names_of_inputs_are_those_of_a_recipe_or_plain_words(step: Step) -> None:
    for name in step.names.values():
        field = name.partition(" (")[0]  # `selection.budget (ordered)` is made from that field
        if " " in field and "." not in field:
            continue  # words, for what no recipe holds
        section, *rest = field.split(".")
        assert section in Recipe.model_fields, name
        fields = {*Recipe.model_fields[section].annotation.model_fields, "text"}  # of evaluation, any of its texts
        assert set(rest) <= fields, name


def test_an_input_stands_in_the_key_under_its_name() -> None:
    named = Step("words", 1, write_words.build, frozenset({"device"}), {"words": "pool.words"})
    inputs = {"words": ("a",), "source": REF, "device": "cpu"}
    assert named.request(inputs).material == {"pool.words": ["a"], "source": {"stage": "pool", "key": KEY}}


def test_a_changed_input_is_told_by_its_name(store: ArtifactStore) -> None:
    named = Step("words", 1, write_words.build, frozenset({"device"}), {"words": "pool.words"})
    named.run(store, "words", {"words": ("a",)})
    assert named.run(store, "words", {"words": ("b",)}).reason == "pool.words[0]: a -> b"


def test_every_stage_has_one_step() -> None:
    steps = {id(step): step.stage for step in every_step()}
    assert len(steps.values()) == len(set(steps.values()))


# --- running -------------------------------------------------------------------------------------------------------


def test_the_first_run_builds_and_the_second_hits(store: ArtifactStore) -> None:
    inputs = {"words": ("a", "b")}
    first = write_words.run(store, "words", inputs)
    second = write_words.run(store, "words", inputs)
    assert (first.decision, second.decision) == (Decision.BUILT, Decision.HIT)
    assert first.ref == second.ref


def test_a_hit_builds_nothing(store: ArtifactStore) -> None:
    heard: list[Progress] = []
    write_words.run(store, "words", {"words": ("a",)})
    with listening(heard.append):
        write_words.run(store, "words", {"words": ("a",)})
    assert heard == []


def test_a_hit_tells_what_the_build_noted(store: ArtifactStore) -> None:
    for _ in range(2):
        assert write_words.run(store, "words", {"words": ("a", "b")}).info == {"count": 2}


def test_the_artifact_holds_what_the_build_wrote(store: ArtifactStore) -> None:
    ref = write_words.run(store, "words", {"words": ("a", "b")}).ref
    assert (store.path(ref) / "words.txt").read_text() == "a\nb"


def test_the_manifest_lists_all_artifacts_that_were_given_even_ignored_ones(store: ArtifactStore) -> None:
    refs = [dataclasses.replace(REF, key=digit * 64) for digit in "123"]
    inputs = {"words": (), "source": {"a": (refs[0],), "b": ByDigest(refs[1])}, "device": refs[2]}
    manifest = store.manifest(write_words.run(store, "words", inputs).ref)
    assert manifest.inputs == [dataclasses.asdict(ref) for ref in refs]


def test_the_manifest_holds_the_key_material(store: ArtifactStore) -> None:
    inputs = {"words": ("a",), "source": REF, "device": "cuda"}
    manifest = store.manifest(write_words.run(store, "words", inputs).ref)
    assert manifest.material == {"words": ["a"], "source": {"stage": "pool", "key": KEY}}
    assert (manifest.stage, manifest.version) == ("words", 1)


def test_a_build_that_fails_commits_nothing_and_is_built_the_next_time(store: ArtifactStore) -> None:
    broken = {"words": ("a", "bad")}
    with pytest.raises(ValueError, match="a bad word"):
        write_words.run(store, "words", broken)
    assert store.look_up("words", write_words.request(broken).key).manifest is None
    assert list((store.root / "staging").iterdir()) == []


def test_a_build_finds_what_one_that_failed_has_kept(store: ArtifactStore) -> None:
    found: list[bool] = []

    def fail_once(build: Build, *, words: str) -> None:
        found.append((build.work / "kept").exists())
        build.work.mkdir(parents=True, exist_ok=True)
        (build.work / "kept").touch()
        if len(found) == 1:
            raise ZeroDivisionError

    step = Step("words", 1, fail_once, frozenset(), {})
    with pytest.raises(ZeroDivisionError):
        step.run(store, "words", {"words": "a"})
    step.run(store, "words", {"words": "b"})
    step.run(store, "words", {"words": "a"})
    assert found == [False, False, True]


def test_what_a_build_keeps_is_gone_once_its_artifact_is_there(store: ArtifactStore) -> None:
    def keep(build: Build, *, words: str) -> None:
        build.work.mkdir(parents=True)
        (build.work / "kept").touch()

    step = Step("words", 1, keep, frozenset(), {})
    step.run(store, "words", {"words": "a"})
    assert not store.work_folder(step.request({"words": "a"}).key).exists()


def test_a_build_reports_its_progress_under_its_label(store: ArtifactStore) -> None:
    heard: list[Progress] = []
    with listening(heard.append):
        write_words.run(store, "my words", {"words": ("a", "b")})
    assert heard == [Progress("my words", done, 2, "words") for done in range(3)]


def test_progress_reaches_nobody_after_listening_ends(store: ArtifactStore) -> None:
    heard: list[Progress] = []
    with pytest.raises(ValueError, match="a bad word"), listening(heard.append):
        write_words.run(store, "words", {"words": ("bad",)})
    before = len(heard)
    write_words.run(store, "words", {"words": ("a",)})
    assert len(heard) == before


def test_the_store_is_the_folder_in_the_environment(store: ArtifactStore) -> None:
    assert open_store().root == store.root


def test_without_a_folder_in_the_environment_the_store_is_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COVERCAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_store().root == tmp_path / "covercal"


# --- the remote in the environment ---------------------------------------------------------------------------------


@pytest.fixture
def shared(store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the environment names as the remote."""
    for name in ("COVERCAL_REMOTE_WRITE", "COVERCAL_REMOTE_TIMEOUT", "COVERCAL_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setenv("COVERCAL_REMOTE", str(folder))
    return folder


def test_without_an_address_in_the_environment_there_is_no_remote(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COVERCAL_REMOTE", raising=False)
    assert open_store().remote is None


def test_the_remote_is_the_address_in_the_environment_and_only_read(shared: Path) -> None:
    remote = open_store().remote
    assert remote is not None
    assert (remote.place, remote.writable) == (str(shared), False)


@pytest.mark.parametrize(
    ("value", "writable"), [("1", True), ("yes", True), ("TRUE ", True), ("0", False), ("", False)]
)
def test_the_environment_says_whether_the_remote_is_written(
    shared: Path, monkeypatch: pytest.MonkeyPatch, value: str, writable: bool
) -> None:
    monkeypatch.setenv("COVERCAL_REMOTE_WRITE", value)
    remote = open_store().remote
    assert remote is not None
    assert remote.writable is writable


def test_offline_there_is_no_remote(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COVERCAL_OFFLINE", "1")
    assert open_store().remote is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("COVERCAL_REMOTE_WRITE", "maybe"), ("COVERCAL_OFFLINE", "2"), ("COVERCAL_REMOTE_TIMEOUT", "a minute")],
)
def test_a_setting_of_the_remote_that_is_none_is_refused_by_its_name(
    shared: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RemoteSettingsError, match=f"{name}.* {value!r}"):
        open_store()


def test_a_remote_folder_that_is_not_there_is_refused(shared: Path) -> None:
    shared.rmdir()
    with pytest.raises(RemoteSettingsError, match=f"{shared} is not there"):
        open_store()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (RemoteError("The remote does not answer."), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (RemoteSettingsError("COVERCAL_REMOTE is no address."), False),
        (StorageError("The disk is full."), False),
        (InputError("The pool is empty."), False),
        (ValueError(), False),
    ],
)
def test_only_what_may_pass_by_itself_is_tried_again(error: Exception, passes: bool) -> None:
    from prefect.states import Failed

    assert may_pass(None, None, Failed(data=error)) is passes


def test_a_task_of_a_run_that_nobody_waits_for_is_patient_and_no_other() -> None:
    assert write_words.task.retries == 0
    assert write_words.patient_task.retries == len(write_words.patient_task.retry_delay_seconds) > 0
    assert write_words.patient_task.retry_condition_fn is may_pass
    assert write_words.patient_task.name == write_words.task.name
