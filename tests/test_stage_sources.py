"""No step changes behind its version: the guard itself, and its mechanism on small trees."""

import importlib
from pathlib import Path

import pytest

from tasks.cached import Step
from tests.stage_sources import (
    COMMAND,
    PLUMBING,
    RECORD,
    ROOT,
    Finding,
    SourceError,
    Sources,
    Stage,
    Verdict,
    compare,
    dump,
    main,
    read_module,
    read_record,
)

# --- our own steps -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> dict[str, Stage]:
    return Sources(ROOT).stages()


def test_no_step_changed_behind_its_version(ours: dict[str, Stage]) -> None:
    messages = [f.message() for f in compare(ours, read_record(RECORD)) if f.verdict is not Verdict.SAME]
    assert not messages, "\n\n" + "\n\n".join(messages)


def test_every_step_of_the_tasks_is_found_in_their_source(ours: dict[str, Stage]) -> None:
    modules = [importlib.import_module(f"tasks.{path.stem}") for path in sorted((ROOT / "tasks").glob("*.py"))]
    steps = [each for module in modules for each in vars(module).values() if isinstance(each, Step)]
    assert {step.stage: step.version for step in steps} == {name: each.version for name, each in ours.items()}


@pytest.mark.parametrize(
    ("stage", "source"),
    [
        ("statistics", "covercal.statistics._reducer"),
        ("statistics", "storage.arrays.CHUNK_COLUMNS"),
        ("selection", "covercal.coverage.greedy_cover"),  # through the registry of selectors
        ("checkpoint", "covercal.quantizers.sequential.round_sequentially"),  # through the registry of methods
        ("checkpoint", "covercal.quantizers.levels.Levels"),
        ("checkpoint", "covercal.__version__"),
        ("texts", "covercal.recipe.TextSource"),  # through the fields of an input
        ("evaluation", "covercal.evaluation.kl_divergence"),
    ],
)
def test_a_stage_depends_on_what_its_build_reaches(ours: dict[str, Stage], stage: str, source: str) -> None:
    assert source in ours[stage].sources


def test_plumbing_is_no_source_of_any_stage(ours: dict[str, Stage]) -> None:
    sources = {name for stage in ours.values() for name in stage.sources}
    assert not {s for s in sources for name in PLUMBING if f"{s}.".startswith(f"{name}.")}


@pytest.mark.parametrize("name", PLUMBING)
def test_what_is_called_plumbing_is_there_under_that_name(name: str) -> None:
    every = Sources(ROOT)
    module, _, last = name.rpartition(".")
    assert name in every.modules or every.resolve(name) == [(module, last)], f"{name} is gone; PLUMBING names it"


# --- the mechanism, on a small tree --------------------------------------------------------------------------------

PACKAGES = ("library", "tasks")
TREE = {
    "library/__init__.py": '__version__ = "1"\n',
    "library/middle.py": '''
"""Between a step and what it needs."""

from library.far import clip


def prepare(value):
    return clip(value)


def unrelated():
    return 1
''',
    "library/far.py": '''
"""Two modules away."""

from collections.abc import Sequence

LIMIT: int = 10  # inclusive
UNUSED = 3
SPARE = 3
Values = Sequence[int]


def clip(value: Values, low: "int" = 0) -> list[int]:
    """Cut off what lies above the limit."""
    clipped: list[int] = [max(low, min(each, LIMIT)) for each in value]
    return clipped
''',
    "library/scaling.py": '''
from dataclasses import dataclass


class Rescaled:
    def offset(self):
        return 0


@dataclass
class Scale(Rescaled):
    """How much.

    Attributes
    ----------
    factor
        Times.
    """

    factor: float = 2.0

    def apply(self, values):
        return [self.factor * each + self.offset() for each in values]


def other():
    return Scale
''',
    "library/registry.py": """
import importlib

MEMBERS = {"plain": "library.members.plain:measure"}


def member(name):
    module, _, attribute = MEMBERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
""",
    "library/pattern.py": """
import importlib


def found(name):
    return importlib.import_module(f"library.found.{name}").measure
""",
    "library/members/__init__.py": "",
    "library/members/plain.py": """
WEIGHT = 2


def measure(values):
    return sum(values) * WEIGHT
""",
    "library/found/__init__.py": "",
    "library/found/one.py": """
def measure(values):
    return min(values)
""",
    "library/given.py": """
class Inner:
    def values(self):
        return [1, 2]


class Given:
    inner: Inner

    @property
    def values(self):
        return self.inner.values()


Input = Given | None
""",
    "library/started.py": """
import library.far

library.far.UNUSED = 4

try:
    from math import fsum as total
except ImportError:
    total = sum


def summed(values):
    return total(values)
""",
    "tasks/progress.py": """
def show(value):
    print(value)
""",
    "tasks/__init__.py": "",
    "tasks/cached.py": """
def cached(stage, version):
    return lambda build: build


class Build:
    def progress(self):
        return None
""",
    "tasks/count.py": '''
"""Stage `counts`."""

import functools
from typing import TYPE_CHECKING

import library
import library.scaling
from library.middle import prepare
from library.pattern import found
from library.started import summed
from tasks.cached import Build, cached

if TYPE_CHECKING:
    from library.given import Input


@cached("counts", version=2)
def count(build: Build, *, given: "Input", name: str, other: int):
    """Count what is given."""
    from library.registry import member
    from tasks.progress import show

    show(other)
    values = library.scaling.Scale().apply(prepare(given.values))
    return {"count": member(name)(values), "least": found(name)(values), "sum": summed(values), library.__version__: 1}


@functools.cache
def other():
    return 1
''',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree whose state is recorded."""
    for name, text in TREE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    assert run(tmp_path) == 0
    return tmp_path


def run(tree: Path, *arguments: str) -> int:
    return main(arguments, tree, tree / "record.json", PACKAGES)


def edit(tree: Path, file: str, old: str, new: str) -> None:
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))


def finding(tree: Path, stage: str = "counts") -> Finding:
    findings = compare(Sources(tree, PACKAGES).stages(), read_record(tree / "record.json"))
    return next(each for each in findings if each.name == stage)


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("tasks/count.py", "show(other)", "show(other + 1)", "changed   tasks.count.count"),
        ("library/middle.py", "clip(value)", "clip(value, 1)", "changed   library.middle.prepare"),
        ("library/far.py", "max(low,", "abs(low,", "changed   library.far.clip"),
        ("library/far.py", 'low: "int" = 0', 'low: "int" = 1', "changed   library.far.clip"),
        ("library/far.py", "LIMIT: int = 10", "LIMIT: int = 11", "changed   library.far.LIMIT"),
        ("library/scaling.py", "self.factor * each", "self.factor + each", "changed   library.scaling.Scale"),
        ("library/scaling.py", "factor: float = 2.0", "factor: float = 3.0", "changed   library.scaling.Scale"),
        ("library/scaling.py", "@dataclass\n", "@dataclass(order=True)\n", "changed   library.scaling.Scale"),
        ("library/scaling.py", "return 0", "return 1", "changed   library.scaling.Rescaled"),
        ("library/registry.py", "plain:measure", "plain:sum", "changed   library.registry.MEMBERS"),
        ("library/members/plain.py", "sum(values)", "max(values)", "changed   library.members.plain.measure"),
        ("library/members/plain.py", "WEIGHT = 2", "WEIGHT = 3", "changed   library.members.plain.WEIGHT"),
        ("library/found/one.py", "min(values)", "max(values)", "changed   library.found.one.measure"),
        ("library/given.py", "self.inner.values()", "[]", "changed   library.given.Given"),
        ("library/given.py", "[1, 2]", "[1, 3]", "changed   library.given.Inner"),
        ("library/started.py", "UNUSED = 4", "UNUSED = 5", "changed   library.started.(top level)"),
        ("library/started.py", "total = sum", "total = max", "changed   library.started.total"),
        ("library/__init__.py", '"1"', '"2"', "changed   library.__version__"),
        ("library/middle.py", "clip(value)", "unrelated()", "appeared  library.middle.unrelated"),
        ("library/middle.py", "clip(value)", "unrelated()", "vanished  library.far.clip"),
    ],
)
def test_a_change_that_a_build_reaches_trips(tree: Path, file: str, old: str, new: str, told: str) -> None:
    edit(tree, file, old, new)
    assert finding(tree).verdict is Verdict.CHANGED
    assert f"  {told}" in finding(tree).differences()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("library/far.py", "# inclusive", "# exclusive"),
        ("library/far.py", '"""Cut off what lies above the limit."""', '"""Cut."""\n    "and run"'),
        ("library/far.py", '    """Cut off what lies above the limit."""\n', ""),
        ("library/far.py", "value: Values", "value: list[float]"),
        ("library/far.py", "-> list[int]", "-> Values"),
        ("library/far.py", "clipped: list[int] =", "clipped ="),
        ("library/far.py", "LIMIT: int = 10", "LIMIT = 10"),
        ("library/far.py", "[max(low, min(each, LIMIT)) for", "[\n        max((low), min(each, LIMIT),)\n        for"),
        ("library/far.py", "SPARE = 3", "SPARE = 4"),
        ("library/far.py", "Sequence[int]", "Sequence[float]"),
        ("library/scaling.py", "factor: float", "factor: int"),
        ("library/scaling.py", "        Times.", "        How many times."),
        ("library/scaling.py", "return Scale", "return Scale()"),
        ("library/middle.py", "return 1", "return 2"),
        ("library/given.py", "Given | None", "Given"),
        ("tasks/progress.py", "print(value)", "print(value, value)"),
        ("tasks/cached.py", "return None", "return 1"),
        ("tasks/count.py", "return 1", "return 2"),  # a function that an input of the step has the name of
        ("tasks/count.py", "other: int", "other: float"),
    ],
)
def test_a_change_that_cannot_matter_does_not_trip(tree: Path, file: str, old: str, new: str) -> None:
    edit(tree, file, old, new)
    assert finding(tree).verdict is Verdict.SAME


def test_a_new_member_in_the_registry_is_followed(tree: Path) -> None:
    (tree / "library/members/fine.py").write_text("def measure(values):\n    return 0\n")
    edit(tree, "library/registry.py", "MEMBERS = {", 'MEMBERS = {"fine": "library.members.fine:measure", ')
    assert "  appeared  library.members.fine.measure" in finding(tree).differences()


def test_a_new_module_that_a_pattern_can_import_is_followed(tree: Path) -> None:
    (tree / "library/found/two.py").write_text("def measure(values):\n    return 0\n")
    assert finding(tree).differences() == ["  appeared  library.found.two.measure"]


def test_the_message_names_stage_definition_and_both_ways_out(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(tree, "library/far.py", "LIMIT: int = 10", "LIMIT: int = 11")
    assert run(tree) == 1
    told = capsys.readouterr().err
    assert "Stage counts changed and its version, 2, did not" in told
    assert "library.far.LIMIT" in told
    assert "raise `version` in tasks/count.py" in told
    assert f"`{COMMAND} --cannot-alter-results counts`" in told


def test_a_refused_change_is_refused_again(tree: Path) -> None:
    edit(tree, "library/far.py", "LIMIT: int = 10", "LIMIT: int = 11")
    assert run(tree) == 1
    assert run(tree) == 1


def test_a_raised_version_passes_once_it_is_recorded(tree: Path) -> None:
    edit(tree, "library/far.py", "LIMIT: int = 10", "LIMIT: int = 11")
    edit(tree, "tasks/count.py", "version=2", "version=3")
    assert run(tree) == 0
    assert read_record(tree / "record.json")["counts"].version == 3
    edit(tree, "library/far.py", "LIMIT: int = 11", "LIMIT: int = 12")
    assert run(tree) == 1


def test_a_raised_version_that_is_not_recorded_trips(tree: Path) -> None:
    edit(tree, "tasks/count.py", "version=2", "version=3")
    assert finding(tree).verdict is Verdict.RAISED
    assert f"record it with `{COMMAND}`" in finding(tree).message()


@pytest.mark.parametrize("arguments", [(), ("--cannot-alter-results", "counts"), ("--cannot-alter-results", "all")])
def test_a_lowered_version_is_always_refused(
    tree: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(tree, "tasks/count.py", "version=2", "version=1")
    assert run(tree, *arguments) == 1
    assert "went down from version 2 to 1" in capsys.readouterr().err
    assert read_record(tree / "record.json")["counts"].version == 2


@pytest.mark.parametrize("stage", ["counts", "all"])
def test_a_change_that_cannot_alter_results_is_recorded_on_request(tree: Path, stage: str) -> None:
    edit(tree, "library/far.py", "LIMIT: int = 10", "LIMIT: int = 5 + 5")
    assert run(tree, "--cannot-alter-results", stage) == 0
    assert run(tree) == 0


def test_only_the_named_stage_is_excused(tree: Path) -> None:
    add_stage(tree)
    assert run(tree) == 0
    edit(tree, "library/middle.py", "clip(value)", "clip(value, 1)")
    assert run(tree, "--cannot-alter-results", "more") == 1
    assert finding(tree, "more").differences() == []
    assert run(tree, "--cannot-alter-results", "counts") == 0


def add_stage(tree: Path, stage: str = "more") -> None:
    (tree / "tasks/more.py").write_text(
        "from library.middle import prepare\nfrom tasks.cached import cached\n\n\n"
        f'@cached("{stage}", version=1)\ndef more(build, *, values):\n    return prepare(values)\n'
    )


def test_a_new_stage_is_recorded_beside_a_refused_one(tree: Path) -> None:
    edit(tree, "library/far.py", "LIMIT: int = 10", "LIMIT: int = 11")
    add_stage(tree)
    assert finding(tree, "more").verdict is Verdict.NEW
    assert run(tree) == 1
    assert set(read_record(tree / "record.json")) == {"counts", "more"}


def test_a_stage_that_comes_back_is_held_to_its_old_record(tree: Path) -> None:
    text = (tree / "tasks/count.py").read_text()
    (tree / "tasks/count.py").unlink()
    assert run(tree) == 0
    (tree / "tasks/count.py").write_text(text.replace("show(other)", "show(1)"))
    assert run(tree) == 1


def test_an_unknown_stage_is_refused_by_name(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tree, "--cannot-alter-results", "conts")
    assert "there is no stage conts; known: counts" in capsys.readouterr().err


def test_two_steps_of_one_stage_are_an_error(tree: Path) -> None:
    add_stage(tree, "counts")
    with pytest.raises(SourceError, match=r"Stage counts is declared in tasks/count\.py and in tasks/more\.py"):
        Sources(tree, PACKAGES).stages()


@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        ("tasks/count.py", "version=2", "version=TWO", "a plain string and a plain number"),
        ("library/middle.py", "from library.far", "from .far", "write imports absolute"),
        ("library/middle.py", "import clip", "import *", "name by name"),
        ("library/middle.py", "import clip", "import slip as clip", "library.far defines no slip"),
    ],
)
def test_what_cannot_be_followed_is_an_error(tree: Path, file: str, old: str, new: str, fault: str) -> None:
    edit(tree, file, old, new)
    with pytest.raises(SourceError, match=fault):
        Sources(tree, PACKAGES).stages()


def test_a_dump_tells_apart_what_differs_and_nothing_else() -> None:
    texts = ["x = 1", "x = 1.0", "x = True", "x = '1'", "x = f'{a}b'", "x = f'{a}' 'c'", "x = a[1:]", "x = a[:1]"]
    dumps = [dump(read_module("m", "", text).definitions["x"][0]) for text in texts]
    assert len(set(dumps)) == len(texts)
    assert dump(read_module("m", "", "x = (f'{a}' \"\" 'b')").definitions["x"][0]) == dumps[4]
