"""Three ways to go through the chain: only look (`Planned`), build here (`Direct`), or through Prefect (`Tracked`)."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from storage.artifacts import ArtifactStore
from storage.manifest import Decision, Manifest, Outcome, Ref, Request
from tasks.cached import ByDigest, Parcel, Step

FAILED = "failed"
WORST_FIRST = (
    FAILED,
    "rebuild",
    "build",
    "waits",
    "pull",
    *(str(d) for d in reversed(Decision)),
)  # plans first, then runs


@dataclass(frozen=True, slots=True)
class Pending:
    """Stands for a value that only exists once the row `label` has run."""

    label: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Stands for an artifact that could not be made, where the run goes on without it.

    Attributes
    ----------
    error
        Why.
    """

    error: str


@dataclass(frozen=True, slots=True)
class Event:
    """What became, or will become, of one artifact.

    Attributes
    ----------
    label
        Row of the display.
    stage, key
        The artifact; no key when it depends on what is not there yet.
    decision
        A `Decision`, or `failed`; for a plan also `build`, `rebuild`, `pull` or `waits`.
    reason
        Why.
    seconds
        Time it took.
    info
        What the artifact's manifest notes beside its content.
    """

    label: str
    stage: str
    key: str
    decision: str
    reason: str
    seconds: float = 0.0
    info: Mapping[str, Any] = field(default_factory=dict)


class Execution(Protocol):
    """How steps are carried out."""

    store: ArtifactStore

    def run(self, label: str, step: Step, **inputs: Any) -> Any:
        """Return a reference to the step's artifact, or `Pending`."""
        ...

    def map(self, label: str, step: Step, inputs: Any) -> Any:
        """Return the references of one step for several inputs, or `Pending` when they are not known yet."""
        ...

    def attempt(self, label: str, step: Step, inputs: Any) -> Any:
        """Do as `map`; what fails is told, loses none of the others, and is `Failed` in the result."""
        ...

    def read(self, label: str, reader: Callable[..., Any], *refs: Any) -> Any:
        """Return `reader(store, *refs)`, or `Pending` when a reference has no content yet."""
        ...


@dataclass(slots=True)
class Recorder:
    """Keeps every event and tells it to the display."""

    on_start: Callable[[str, int], None] = lambda label, count: None
    on_event: Callable[[Event], None] = lambda event: None
    built_before: Mapping[str, Event] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Keep an event and tell it; what planning this very run has built counts as built, not as found."""
        event = self.built_before.get(event.key, event)
        self.events.append(event)
        self.on_event(event)


def pending_label(value: Any) -> str | None:
    """Return the row that `value` waits for, if any: a `Pending`, or content of an artifact without digest."""
    if isinstance(value, Pending):
        return value.label
    if isinstance(value, ByDigest):
        if isinstance(value.ref, Pending):
            return value.ref.label
        return None if value.ref.digest else value.ref.stage
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((label for each in value if (label := pending_label(each)) is not None), None)
    return None


@dataclass(slots=True)
class Direct:
    """Runs every step in this process, without Prefect."""

    store: ArtifactStore
    recorder: Recorder

    def run(self, label: str, step: Step, **inputs: Any) -> Ref:
        """Build or find one artifact."""
        self.recorder.on_start(label, 1)
        return self._one(label, step, inputs)

    def map(self, label: str, step: Step, inputs: Sequence[Mapping[str, Any]]) -> tuple[Ref, ...]:
        """Build or find several artifacts, one after the other."""
        self.recorder.on_start(label, len(inputs))
        return tuple(self._one(label, step, each) for each in inputs)

    def attempt(self, label: str, step: Step, inputs: Sequence[Mapping[str, Any]]) -> tuple[Ref | Failed, ...]:
        """Build or find several artifacts, each whatever becomes of the others."""
        self.recorder.on_start(label, len(inputs))
        found: list[Ref | Failed] = []
        for each in inputs:
            try:
                found.append(self._one(label, step, each))
            except (
                Exception
            ) as error:  # the others must not be lost, whatever it is; it is told, and ends in exit code 1
                found.append(_failed(self.recorder, label, step, error))
        return tuple(found)

    def _one(self, label: str, step: Step, inputs: Mapping[str, Any]) -> Ref:
        outcome = step.run(self.store, label, inputs)
        self.recorder.add(event_of(label, outcome))
        return outcome.ref

    def read(self, label: str, reader: Callable[..., Any], *refs: Any) -> Any:
        """Read artifacts."""
        return reader(self.store, *refs)


@dataclass(slots=True)
class Planned:
    """Looks up every artifact and builds none, but for the light stages named in `builds`.

    Which shards a pool has, and so what is cached of it, is only known once its texts are tokenised; that takes
    seconds, and the result is kept for the run. What the remote has is told as `pull`, and pulled only when its content
    decides what else is to do.

    Attributes
    ----------
    explains
        Whether what is to do says why, for which the manifests of its stage are read.
    """

    store: ArtifactStore
    recorder: Recorder
    builds: frozenset[str] = frozenset({"pool", "texts"})
    explains: bool = True
    planned: dict[str, Request] = field(default_factory=dict)

    def run(self, label: str, step: Step, **inputs: Any) -> Ref | Pending:
        """Find one artifact."""
        self.recorder.on_start(label, 1)
        return self._one(label, step, inputs)

    def map(self, label: str, step: Step, inputs: Any) -> tuple[Any, ...] | Pending:
        """Find several artifacts."""
        if isinstance(inputs, Pending):
            return self._waits(label, step, inputs.label)
        self.recorder.on_start(label, len(inputs))
        return tuple(self._one(label, step, each) for each in inputs)

    def attempt(self, label: str, step: Step, inputs: Any) -> tuple[Any, ...] | Pending:
        """Find several artifacts."""
        return self.map(label, step, inputs)

    def _one(self, label: str, step: Step, inputs: Mapping[str, Any]) -> Ref | Pending:
        waits_for = pending_label(inputs)
        if waits_for is not None:
            return self._waits(label, step, waits_for)
        request = step.request(inputs)
        found = self.store.claim(request.stage, request.key)
        if found.manifest is not None:
            self.recorder.add(event_of(label, hit(found.manifest)))
            return found.manifest.ref
        self.planned[request.key] = request
        if step.stage in self.builds and all(ref.digest for ref in request.inputs):
            outcome = step.run(self.store, label, inputs)
            self.recorder.add(event_of(label, outcome))
            return outcome.ref
        remote = self.store.look_up_remote(request.stage, request.key)
        if remote.manifest is not None:
            reason = f"{found.reason}; {remote.reason}" if found.damaged else remote.reason
            self.recorder.add(Event(label, step.stage, request.key, "pull", reason))
            return remote.manifest.ref
        damaged = [each.reason for each in (found, remote) if each.damaged]
        reason = "; ".join(damaged) or (self.store.explain(request, self.planned) if self.explains else found.reason)
        decision = "rebuild" if damaged else "build"
        self.recorder.add(Event(label, step.stage, request.key, decision, reason))
        return Ref(step.stage, request.key)

    def _waits(self, label: str, step: Step, waits_for: str) -> Pending:
        self.recorder.add(Event(label, step.stage, "", "waits", f"depends on {waits_for}, which is not there yet"))
        return Pending(label)

    def read(self, label: str, reader: Callable[..., Any], *refs: Any) -> Any:
        """Read artifacts, or say that they are not there yet."""
        for ref in refs:
            if isinstance(ref, Pending):
                return ref
            if isinstance(ref, Ref) and not ref.digest:
                return Pending(label)
        return reader(self.store, *refs)


@dataclass(slots=True)
class Tracked:
    """Runs every step as a Prefect task; to be used inside a flow, by several threads of it if need be.

    Attributes
    ----------
    unattended
        Whether nobody waits for the run: what may pass, such as a remote that does not answer, is then tried again.
    """

    store: ArtifactStore
    recorder: Recorder
    unattended: bool = False
    _unfinished: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, label: str, step: Step, **inputs: Any) -> Ref:
        """Run one task."""
        return self.map(label, step, [inputs])[0]

    def map(self, label: str, step: Step, inputs: Sequence[Mapping[str, Any]]) -> tuple[Ref, ...]:
        """Run mapped tasks; the first failure ends the flow."""
        return tuple(self._finished(label, future) for future in self._submitted(label, step, inputs))

    def attempt(self, label: str, step: Step, inputs: Sequence[Mapping[str, Any]]) -> tuple[Ref | Failed, ...]:
        """Run mapped tasks, each whatever becomes of the others."""
        found: list[Ref | Failed] = []
        for future in self._submitted(label, step, inputs):
            try:
                found.append(self._finished(label, future))
            except Exception as error:  # as in `Direct`
                found.append(_failed(self.recorder, label, step, error))
        return tuple(found)

    def _submitted(self, label: str, step: Step, inputs: Sequence[Mapping[str, Any]]) -> list["_Submitted"]:
        self.recorder.on_start(label, len(inputs))
        names = [label if len(inputs) == 1 else f"{label} {i}/{len(inputs)}" for i in range(1, len(inputs) + 1)]
        return [self._submit(step, name, label, each) for name, each in zip(names, inputs, strict=True)]

    def _submit(self, step: Step, name: str, label: str, inputs: Mapping[str, Any]) -> "_Submitted":
        """Submit one task, unless another thread of this flow waits for the same artifact: then wait for that."""
        key = step.request(inputs).key
        task = step.patient_task if self.unattended else step.task
        with self._lock:
            if key not in self._unfinished:
                self._unfinished[key] = task.submit(name=name, label=label, parcel=Parcel(inputs))
            return _Submitted(key, self._unfinished[key])

    def _finished(self, label: str, submitted: "_Submitted") -> Ref:
        try:
            outcome: Outcome = submitted.future.result()
        finally:
            with self._lock:
                self._unfinished.pop(submitted.key, None)
        self.recorder.add(event_of(label, outcome))
        return outcome.ref

    def read(self, label: str, reader: Callable[..., Any], *refs: Any) -> Any:
        """Read artifacts."""
        return reader(self.store, *refs)


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A task under way, and the artifact it makes."""

    key: str
    future: Any


def _failed(recorder: Recorder, label: str, step: Step, error: Exception) -> Failed:
    """Tell that an artifact could not be made."""
    recorder.add(Event(label, step.stage, "", FAILED, f"{type(error).__name__}: {error}"))
    return Failed(str(error) or type(error).__name__)


def hit(manifest: Manifest) -> Outcome:
    """Return the outcome of finding an artifact."""
    return Outcome(manifest.ref, Decision.HIT, "in the store", 0.0, manifest.info)


def event_of(label: str, outcome: Outcome) -> Event:
    """Return the event of a finished step."""
    ref = outcome.ref
    return Event(label, ref.stage, ref.key, outcome.decision, outcome.reason, outcome.seconds, outcome.info)
