"""Tasks of the lm-evaluation-harness by what they are made of: configuration, Python files, data.

A task comes from a YAML file of one's own, whose data files are relative to its folder, or from lm-eval's own by name.
Both are read by lm-eval's own loader, `include` and `!function` among it.
"""

import difflib
import gzip
import importlib.util
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

from covercal.errors import InputError
from covercal.recipe import LanguageTask

BUILDERS = {
    "json",
    "csv",
    "parquet",
    "arrow",
    "text",
    "xml",
    "pandas",
    "sql",
    "webdataset",
}  # of `datasets`: need files
HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/")
PIECE_BYTES = 1 << 20
TAIL_BYTES = 1 << 16
_LOADING = Lock()


@dataclass(frozen=True, slots=True)
class TaskParts:
    """What decides a task's requests, found without loading its data.

    Attributes
    ----------
    name
        Of the task or group in lm-eval.
    config
        Configuration as plain JSON; a Python file, or one of data, is its number in the lists below.
    functions, data
        Files that hold Python functions, and data.
    hub
        Data sets on the hub: id, and the commit, branch or tag that the configuration asks for.
    """

    name: str
    config: Any
    functions: tuple[Path, ...]
    data: tuple[Path, ...]
    hub: tuple[tuple[str, str | None], ...]


def describe_task(task: LanguageTask) -> TaskParts:
    """Find what a task is made of, and check its files.

    Raises
    ------
    InputError
        When the name is unknown, or a file is missing, cut short or no task.
    """
    spec = _registered(str(task.name)) if task.path is None else read_task(Path(task.path), functions=False)
    found = _Collector()
    config = found.plain(spec)
    for path in found.data:
        check_data(path)
    name = str(task.name or spec.get("task") if "group" not in spec else spec["group"])
    return TaskParts(task.name or name, config, tuple(found.functions), tuple(found.data), tuple(found.hub))


def hub_label(name: str, revision: str | None) -> str:
    """Return what a data set on the hub is called at a branch or tag; at the default one, its name."""
    return name if revision is None else f"{name}@{revision}"


def load_task(task: LanguageTask, commits: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return lm-eval's task objects with their data: `TaskDict` of its `TaskManager`.

    Parameters
    ----------
    commits
        At which commit data sets on the hub are read, by their `hub_label`; others as they are now.

    Raises
    ------
    InputError
        When lm-eval cannot make a task of it.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from jinja2 import TemplateError

    wrong = (AssertionError, AttributeError, ImportError, IndexError, KeyError, OSError, TypeError, ValueError)
    try:
        with _pinned(commits or {}):
            if task.path is None:
                loaded = _manager().load([str(task.name)])
            else:
                loaded = _made(read_task(Path(task.path), functions=True))
    except (*wrong, DatasetsError, DatasetGenerationError, TemplateError) as cause:
        reason = cause.__cause__ if isinstance(cause, DatasetGenerationError) and cause.__cause__ else cause
        line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise InputError(f"Task {task.path or task.name} cannot be loaded by lm-eval: {line}") from cause
    value: dict[str, Any] = loaded
    return value


def read_task(path: Path, *, functions: bool) -> dict[str, Any]:
    """Return a task file's configuration with its includes, its data files absolute and its subtasks spelled out.

    Parameters
    ----------
    functions
        Import what `!function` names; otherwise it is a text: the YAML's folder, and the dotted name below it.
    """
    config = _load_yaml(path, functions=functions)
    if "task" not in config and "group" not in config:
        raise InputError(f"Task file {path} is no lm-eval task: it has neither `task:` nor `group:`.")
    return _placed(config, path, functions)


@contextmanager
def _pinned(commits: Mapping[str, str]) -> Iterator[None]:
    """Have lm-eval read data sets on the hub at these commits, one load at a time: its own tasks name none."""
    import datasets

    with _LOADING:
        load = datasets.load_dataset

        @wraps(load)
        def at_commit(path: str, *arguments: Any, **options: Any) -> Any:
            commit = commits.get(hub_label(path, options.get("revision")))
            if commit is not None:
                options["revision"] = commit
            if "data_files" in options:
                options["data_files"] = _files_at(options["data_files"], commits)
            return load(path, *arguments, **options)

        datasets.load_dataset = at_commit
        try:
            yield
        finally:
            datasets.load_dataset = load


def _files_at(value: Any, commits: Mapping[str, str]) -> Any:
    """Return `data_files` with those on the hub named at their commits."""
    if isinstance(value, Mapping):
        return {name: _files_at(each, commits) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_files_at(each, commits) for each in value]
    named = HUB_FILE.match(str(value))
    if named is None or (commit := commits.get(hub_label(named[1], named[2]))) is None:
        return value
    return f"hf://datasets/{named[1]}@{commit}/{value[named.end() :]}"


def check_data(path: Path) -> None:
    """Raise when a data file is missing, empty or cut short.

    Raises
    ------
    InputError
        Naming the file.
    """
    if not path.is_file():
        raise InputError(f"There is no data file {path}; a task's data_files are relative to its YAML's folder.")
    tail = b""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while piece := stream.read(PIECE_BYTES):
                tail = (tail + piece)[-TAIL_BYTES:]
    except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
        raise InputError(f"Data file {path} is cut short or damaged: {cause}.") from cause
    if not tail.strip():
        raise InputError(f"Data file {path} is empty.")
    last = tail.rstrip(b"\n").rpartition(b"\n")[2]
    if path.name.removesuffix(".gz").endswith(".jsonl") and len(last) < TAIL_BYTES:
        try:
            json.loads(last)
        except ValueError:
            raise InputError(f"Data file {path} is cut short: its last line is no JSON.") from None


# --- task files ----------------------------------------------------------------------------------------------------


def _made(config: dict[str, Any]) -> Any:
    """Return lm-eval's objects of a configuration that needs no other: `TaskManager.load` takes no group as such."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._factory import TaskFactory
    from lm_eval.tasks._index import TaskIndex

    made = TaskFactory().build(TaskIndex.entry_from_config(config), overrides=None, registry={})
    return TaskManager(include_defaults=False).load([made])


def _load_yaml(path: Path, *, functions: bool) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise InputError(f"There is no task file {path}.")
    try:
        config: dict[str, Any] = load_yaml(path, resolve_func=functions)
    except yaml.YAMLError as cause:
        raise InputError(f"Task file {path} is not valid YAML: {' '.join(str(cause).split())}") from cause
    except FileNotFoundError as cause:
        raise InputError(f"Task file {path} includes {cause.filename}, which is not there.") from cause
    except (AttributeError, ImportError, OSError, UnicodeDecodeError, ValueError) as cause:
        raise InputError(f"Task file {path} cannot be used: {cause}") from cause
    return config


def _placed(config: Mapping[str, Any], path: Path, functions: bool) -> dict[str, Any]:
    """Return a configuration with data files absolute against the folder of `path`, in its subtasks too."""
    placed = dict(config)
    if isinstance(placed.get("dataset_path"), str) and (path.parent / placed["dataset_path"]).is_dir():
        placed["dataset_path"] = str((path.parent / placed["dataset_path"]).absolute())
    options = dict(placed.get("dataset_kwargs") or {})
    here = not _on_hub(placed.get("dataset_path"))  # else they are files of the data set
    if here and "data_files" in options:
        options["data_files"] = _absolute(options["data_files"], path)
    if here and "data_dir" in options:
        options["data_dir"] = str((path.parent / str(options["data_dir"])).absolute())
    if options:
        placed["dataset_kwargs"] = options
    if isinstance(placed.get("task"), list):
        placed["task"] = [_member(each, path, functions) for each in placed["task"]]
    return placed


def _on_hub(source: Any) -> bool:
    """Return whether a `dataset_path` names a data set on the hub, and no builder of `datasets` and no folder."""
    return isinstance(source, str) and source not in BUILDERS and not Path(source).is_absolute()


def _member(member: Any, path: Path, functions: bool) -> dict[str, Any]:
    """Return a subtask of a group; one that is only named is looked for in the task files beside it."""
    if isinstance(member, Mapping):
        return _placed(member, path, functions)
    siblings = {name: file for file in sorted(path.parent.glob("*.yaml")) for name in _names_in(file)}
    if member not in siblings:
        raise InputError(f"Group {path} names the task {member!r}; {_nearest(str(member), list(siblings))}")
    return read_task(siblings[member], functions=functions)


def _names_in(path: Path) -> Iterator[str]:
    try:
        config = _load_yaml(path, functions=False)
    except InputError:
        return  # a file beside the group that is no task file is none of its tasks
    for key in ("task", "group"):
        if isinstance(config.get(key), str):
            yield config[key]


def _absolute(value: Any, yaml_path: Path) -> Any:
    if isinstance(value, Mapping):
        return {name: _absolute(each, yaml_path) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [path for each in value for path in _listed(_absolute(each, yaml_path))]
    if HUB_FILE.match(str(value)):
        return str(value)
    if "://" in str(value):
        raise InputError(f"Task file {yaml_path} reads {value}; the data of a task file lie on local disk.")
    path = (yaml_path.parent / Path(str(value)).expanduser()).absolute()
    if any(sign in path.name for sign in "*?["):
        return [str(each) for each in sorted(path.parent.glob(path.name))] or str(path)
    return str(path)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# --- lm-eval's own tasks -------------------------------------------------------------------------------------------


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _registered(name: str) -> dict[str, Any]:
    """Return the configuration of a task, group or tag of lm-eval, its members spelled out."""
    index = _manager().task_index
    if name not in index:
        raise InputError(f"lm-eval has no task {name!r}; {_nearest(name, list(index))}")
    entry = index[name]
    if entry.yaml_path is None:
        return {"group": name, "task": [_registered(each) for each in sorted(entry.tags)]}
    config = _load_yaml(entry.yaml_path, functions=False)
    if not isinstance(config.get("task"), list):
        return config
    members = [_registered_member(each, index) for each in config["task"]]
    return {**config, "task": members}


def _registered_member(member: Any, index: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(member, str):
        return _registered(member)
    name = member.get("task") or member.get("group")
    return {**(_registered(name) if isinstance(name, str) and name in index else {}), **member}


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return "a task file of your own is given with `path`." if len(known) > 20 else f"known: {', '.join(sorted(known))}."


# --- parts ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Collector:
    """Turns a configuration into plain JSON, and keeps what it refers to."""

    functions: list[Path] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    hub: list[tuple[str, str | None]] = field(default_factory=list)

    def plain(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return self._config(value)
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [self.plain(each) for each in value]
        if isinstance(value, str) and (found := function_file(value)) is not None:
            return {"function": value.rpartition(".")[2], "file": _number(self.functions, found)}
        return value if value is None or isinstance(value, str | int | float | bool) else str(value)

    def _config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        options = dict(config.get("dataset_kwargs") or {}) if isinstance(config.get("dataset_kwargs"), Mapping) else {}
        source = config.get("dataset_path")
        plain: dict[str, Any] = {}
        here = not _on_hub(source)
        if here and options.get("data_files") is not None:
            options["data_files"] = self._files(options["data_files"], lambda path: [path])
        if here and options.get("data_dir") is not None:
            options["data_dir"] = self._files(options["data_dir"], _files_below)
        if options:
            plain["dataset_kwargs"] = {name: self.plain(each) for name, each in options.items()}
        if isinstance(source, str) and Path(source).is_absolute():
            plain["dataset_path"] = self._files(source, _files_below)
        elif not here and config.get("custom_dataset") is None:
            wanted = (str(source), options.get("revision"))
            _number(self.hub, wanted)
        return {str(name): self.plain(each) for name, each in config.items() if name not in plain} | plain

    def _files(self, value: Any, files: Callable[[Path], list[Path]]) -> Any:
        if isinstance(value, Mapping):
            return {str(name): self._files(each, files) for name, each in value.items()}
        if isinstance(value, list):
            return [self._files(each, files) for each in value]
        if (named := HUB_FILE.match(str(value))) is not None:
            _number(self.hub, (named[1], named[2]))
            return str(value)
        if "://" in str(value):
            raise InputError(f"The task reads {value}; the data of a task lie on local disk or on the hub.")
        root = Path(str(value))
        return [
            {"data": _number(self.data, each), "name": each.relative_to(root).as_posix() if each != root else ""}
            for each in files(root)
        ]


def function_file(text: str) -> Path | None:
    """Return the Python file of a `!function` that was left a text: a folder, and a dotted name below it."""
    path = Path(text)
    module, _, name = path.name.rpartition(".")
    if "\n" in text or not path.is_absolute() or not module or not name.isidentifier():
        return None
    beside = path.parent.joinpath(*module.split(".")).with_suffix(".py")
    if beside.is_file():
        return beside
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


def _files_below(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    if not found:
        raise InputError(f"There are no data files in {folder}.")
    return found


def _number(items: list[Any], item: Any) -> int:
    if item not in items:
        items.append(item)
    return items.index(item)
