"""The one decorator: a build function becomes a step that is a store lookup first and a Prefect task on request."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path
from pydantic import BaseModel

from storage.artifacts import ArtifactStore
from storage.errors import RemoteError, RemoteSettingsError
from storage.manifest import Decision, Outcome, Ref, Request
from tasks.progress import Progress, listening, tell
from tasks.settings import apply_settings

if TYPE_CHECKING:
    from storage.remote import RemoteObjects


@dataclass(frozen=True, slots=True)
class ByDigest:
    """An input that counts in a key by what it holds, not by how it was made."""

    ref: Ref


@dataclass(frozen=True, slots=True)
class Build:
    """What a build function works with.

    Attributes
    ----------
    folder
        Empty; becomes the artifact.
    store
        Where the inputs are read.
    label
        Row of the display.
    work
        Where parts are kept that a build which was cut short can go on from; not there until something is.
    check
        Raises when files that inputs were fingerprinted from have changed since.
    """

    folder: Path
    store: ArtifactStore
    label: str
    work: Path
    check: Callable[[], None] = lambda: None

    def progress(self, total: int, unit: str) -> Callable[[int], None]:
        """Return a function that is called with the count of newly finished units."""
        done = 0

        def advance(count: int = 1) -> None:
            nonlocal done
            done += count
            tell(Progress(self.label, done, total, unit))

        tell(Progress(self.label, 0, total, unit))
        return advance


_one_build = threading.Lock()
"""Steps of one process share its device and the model on it: one builds at a time."""
RETRY_SECONDS = (10, 60)
DASHBOARD_SECONDS = 1.0
MIN_SHOWN = 2  # a step of one unit has no progress to show

BuildFunction = Callable[..., Mapping[str, Any] | None]
KeyedInputs = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class Parcel:
    """A step's inputs on their way to a task: one thing, which neither Prefect nor Dask takes apart to search it."""

    __slots__ = ("inputs",)

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = dict(inputs)


class Step:
    """A cached step. Its keyword inputs are its key material, but for those named in `ignored`.

    Parameters
    ----------
    stage, version
        Name of the artifacts it makes, and a number that rises when its code gives other results.
    build
        `build(Build, **inputs)` writes the artifact and returns what the manifest should note beside the content.
    ignored
        Inputs that cannot change the result: places, devices.
    names
        What an input is called in a recipe, where that is not its own name; reasons speak in these names.
    keyed
        Returns the inputs as they count in the key, where one input decides what another means.
    """

    def __init__(
        self,
        stage: str,
        version: int,
        build: BuildFunction,
        ignored: frozenset[str],
        names: Mapping[str, str],
        keyed: KeyedInputs = dict,
    ) -> None:
        self.stage = stage
        self.version = version
        self.build = build
        self.ignored = ignored
        self.names = names
        self.keyed = keyed

    def request(self, inputs: Mapping[str, Any]) -> Request:
        """Return what `inputs` ask of the store."""
        keyed = {name: value for name, value in self.keyed(inputs).items() if name not in self.ignored}
        material = {self.names.get(name, name): key_material(value) for name, value in keyed.items()}
        if len(material) < len(keyed):
            raise ValueError(f"two inputs of stage {self.stage} have one name in its key: {sorted(material)}")
        return Request(self.stage, self.version, material, tuple(references(inputs)))

    def run(self, store: ArtifactStore, label: str, inputs: Mapping[str, Any]) -> Outcome:
        """Return the artifact of `inputs`, built if it has to be."""
        request = self.request(inputs)
        work = store.work_folder(request.key)

        def check() -> None:
            check_unchanged(inputs, store)

        def build(folder: Path) -> Mapping[str, Any] | None:
            with _one_build:
                info = self.build(Build(folder, store, label, work, check), **inputs)
            check()
            return info

        return store.build_once(request, build)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to a worker as a name: the worker has the code."""
        return _step, (self.build.__module__, self.build.__qualname__)

    @cached_property
    def task(self) -> Any:
        """Return the Prefect task of this step: `task(name, label, Parcel(inputs))` ends in state `Cached` on a hit."""
        return self._task()

    @cached_property
    def patient_task(self) -> Any:
        """Return the same task, which is tried again after a fault that may pass by itself."""
        return self._task().with_options(
            retries=len(RETRY_SECONDS), retry_delay_seconds=list(RETRY_SECONDS), retry_condition_fn=may_pass
        )

    def _task(self) -> Any:
        from prefect import State, Task
        from prefect.cache_policies import NO_CACHE
        from prefect.states import Completed

        def run_step(name: str, label: str, parcel: Parcel) -> State[Outcome]:
            with listening(_dashboard_progress(label)):
                outcome = self.run(open_store(), label, parcel.inputs)
            state = "Cached" if outcome.decision is Decision.HIT else "Completed"
            return Completed(name=state, message=f"{outcome.decision}: {outcome.reason}", data=outcome)

        return Task(
            run_step,
            name=self.stage,
            task_run_name="{name}",
            cache_policy=NO_CACHE,
            persist_result=False,
        )


def _step(module: str, name: str) -> Step:
    found = getattr(import_module(module), name)
    assert isinstance(found, Step), f"{module}.{name} is no step"
    return found


def may_pass(task: Any, task_run: Any, state: Any) -> bool:
    """Return whether what a task failed with may pass by itself: a remote that did not answer; never a wrong input."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, RemoteError | ConnectionError | TimeoutError) and not isinstance(
        error, RemoteSettingsError
    )


def cached(
    stage: str,
    version: int,
    *,
    ignored: tuple[str, ...] = (),
    names: Mapping[str, str] | None = None,
    keyed: KeyedInputs = dict,
) -> Callable[[BuildFunction], Step]:
    """Turn a build function into a step of `stage`; see `Step`."""

    def wrap(build: BuildFunction) -> Step:
        return Step(stage, version, build, frozenset(ignored), names or {}, keyed)

    return wrap


def open_store() -> ArtifactStore:
    """Return the store in `COVERCAL_CACHE`, by default the user's cache folder; created when it is not there.

    `COVERCAL_REMOTE` is the address of a cache to share, `COVERCAL_REMOTE_WRITE=1` lets this user send to it,
    `COVERCAL_REMOTE_TIMEOUT` is the seconds one request may take, and `COVERCAL_OFFLINE=1` goes on without it. What the
    environment leaves open a settings file may say (`tasks.settings`).

    Raises
    ------
    RemoteSettingsError
        When the address is none.
    InputError
        When the settings file is wrong.
    """
    apply_settings()
    place = os.environ.get("COVERCAL_CACHE")
    return ArtifactStore(Path(place) if place else user_cache_path("covercal"), _remote(os.environ)).prepare()


def _remote(environment: Mapping[str, str]) -> "RemoteObjects | None":
    address = environment.get("COVERCAL_REMOTE")
    if not address or _is_on(environment, "COVERCAL_OFFLINE"):
        return None
    from storage.remote import TIMEOUT_SECONDS, open_remote

    timeout = environment.get("COVERCAL_REMOTE_TIMEOUT") or str(TIMEOUT_SECONDS)
    try:
        seconds = float(timeout)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RemoteSettingsError(f"COVERCAL_REMOTE_TIMEOUT {timeout!r} is no number of seconds above 0.")
    return open_remote(address, writable=_is_on(environment, "COVERCAL_REMOTE_WRITE"), timeout=seconds)


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "").strip().lower()
    if value not in ("", "0", "1", "false", "true", "no", "yes"):
        raise RemoteSettingsError(f"{name} is {value!r}; it is 1 or 0.")
    return value in ("1", "true", "yes")


def key_material(value: Any) -> Any:
    """Return `value` as the plain JSON that goes into a key.

    An object with a method `key_material` speaks for itself; an artifact stands for its key, or its content
    under `ByDigest`. A path is refused: where a thing lies never decides what it is.

    Raises
    ------
    TypeError
        For anything else.
    """
    if isinstance(value, ByDigest):
        return {"stage": value.ref.stage, "digest": value.ref.digest}
    if isinstance(value, Ref):
        return {"stage": value.stage, "key": value.key}
    if hasattr(value, "key_material"):
        return key_material(value.key_material())
    if isinstance(value, BaseModel):
        return key_material(value.model_dump())
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: key_material(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): key_material(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [key_material(each) for each in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a key")


def references(value: Any) -> Iterator[Ref]:
    """Yield every artifact that occurs in `value`."""
    if isinstance(value, ByDigest):
        yield value.ref
    elif isinstance(value, Ref):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from references(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from references(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from references(getattr(value, field.name))


def check_unchanged(inputs: Mapping[str, Any], store: ArtifactStore) -> None:
    """Make sure that what was read is what the key says: files may have been changed since they were fingerprinted.

    Everything in `inputs` that has a method `check_unchanged` is asked; a model that was unpacked into an artifact is
    read from there.
    """
    unpacked = inputs.get("imported") is not None
    for value in inputs.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(each, "check_unchanged"):
                each.check_unchanged(store, unpacked=unpacked)


def _dashboard_progress(label: str) -> Callable[[Progress], None]:
    """Return a listener that shows a task's progress on the Prefect dashboard, at most once a second.

    A server that does not answer ends the showing, with a warning in the task's log, and never the build.
    """
    from httpx import HTTPError
    from prefect.artifacts import create_progress_artifact, update_progress_artifact
    from prefect.exceptions import PrefectException
    from prefect.logging import get_run_logger

    artifact: Any = None
    last = 0.0
    broken = False

    def show(progress: Progress) -> None:
        nonlocal artifact, last, broken
        if broken or progress.label != label or progress.total < MIN_SHOWN:
            return
        now = time.monotonic()
        if artifact is not None and now - last < DASHBOARD_SECONDS and progress.done < progress.total:
            return
        percent = 100.0 * progress.done / progress.total
        try:
            if artifact is None:
                artifact = create_progress_artifact(percent, description=f"{label}: {progress.total} {progress.unit}")
            else:
                update_progress_artifact(artifact, percent)
        except (HTTPError, PrefectException) as cause:
            broken = True
            get_run_logger().warning("Progress is no longer shown: the Prefect server did not take it (%s).", cause)
        last = now

    return show
