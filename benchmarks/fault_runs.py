"""A small real run that faults are injected into: forked for every fault, killed inside a chosen phase."""

import json
import os
import resource
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import storage.artifacts
from covercal.checkpoint import CheckpointWriter
from covercal.recipe import load_recipe
from flows.chain import run_chain
from flows.execution import Direct, Recorder
from flows.inputs import identify
from storage.artifacts import ArtifactStore
from storage.local import LocalObjects
from storage.remote import RemoteObjects, open_remote
from tasks.capture import capture_shard
from tasks.quantize import quantize_model
from tests import tiny

BLOCKS = 6
PATIENCE = 120.0
PHASES = ("capture", "quantisation", "commit", "push")


def make_recipe(folder: Path) -> Path:
    """Write a recipe over a small Llama of six blocks and made-up texts: 5 shards, 2 checkpoints, 14 artifacts."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=tiny.VOCABULARY,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    tiny.write_texts(folder / "pool.jsonl", range(120))
    tiny.write_texts(folder / "heldout.jsonl", range(1000, 1010))
    value = tiny.recipe_value(folder, pool={"samples": 40}, selection={"budget": 12})
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run works: its cache folder and its remote, if any (an address that it may write to)."""

    root: Path
    remote: str = ""

    def store(self) -> ArtifactStore:
        """Open the store."""
        remote = open_remote(self.remote, writable=True) if self.remote else None
        return ArtifactStore(self.root, remote).prepare()


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run did, or how it ended.

    Attributes
    ----------
    decisions
        (stage, key, decision, reason) of every artifact.
    digests
        Digest by key.
    blocks
        Blocks that were quantised.
    phases
        Seconds of every pass through each phase.
    error, kind
        Message and class of the error that ended it.
    signal
        The signal that ended it.
    """

    decisions: list[list[str]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    blocks: int = 0
    phases: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""
    kind: str = ""
    signal: int = 0

    def decided(self, *decisions: str) -> list[list[str]]:
        """Return the rows with one of these decisions."""
        return [row for row in self.decisions if row[2] in decisions]


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL in the pass number `index` through a phase, `delay` seconds after it began, or else at its end."""

    phase: str
    index: int
    delay: float


def run(recipe: Path, place: Place, kill: Kill | None = None, *, largest_file: int = 0) -> Ran:
    """Run a recipe in a forked process; `largest_file` limits the bytes of any file it writes."""

    def work() -> dict[str, Any]:
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        torch.set_num_threads(1)
        blocks, phases = [0], {phase: [] for phase in PHASES}
        with watched(phases, kill), counted(CheckpointWriter, "write_block", blocks):
            store = place.store()
            store.send_unsent()
            recorder = Recorder()
            typed = load_recipe(recipe, ())
            run_chain(typed, identify(typed, store), Direct(store, recorder))
        decisions = [[e.stage, e.key, str(e.decision), e.reason] for e in recorder.events]
        found = {key: store.look_up(stage, key).manifest for stage, key, *_ in decisions}
        digests = {key: manifest.digest for key, manifest in found.items() if manifest is not None}
        return {"decisions": decisions, "digests": digests, "blocks": blocks[0], "phases": phases}

    return Ran(**in_child(work))


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` returns in a forked process; of one that failed or was killed, how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work_in_child(work, writer)
    os.close(writer)
    chunks = []
    end = time.monotonic() + PATIENCE
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"a run did not end in {PATIENCE:.0f} s")
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            break
        chunks.append(chunk)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    value: dict[str, Any] = json.loads(b"".join(chunks))
    return value


def _work_in_child(work: Callable[[], dict[str, Any]], writer: int) -> None:
    try:
        value = work()
    except BaseException as error:
        value = {"error": str(error), "kind": type(error).__name__}
        if not isinstance(error, Exception) or os.environ.get("FAULTS_VERBOSE"):
            traceback.print_exc()
    with os.fdopen(writer, "wb") as stream:
        stream.write(json.dumps(value).encode())
    os._exit(0)


@contextmanager
def watched(phases: dict[str, list[float]], kill: Kill | None) -> Iterator[None]:
    """Time every pass through every phase, and kill this process inside one of them."""

    def wrap(owner: Any, name: str, phase: str) -> tuple[Any, str, Any]:
        original = getattr(owner, name)

        def passed(*arguments: Any, **keywords: Any) -> Any:
            timer = None
            if kill is not None and (kill.phase, kill.index) == (phase, len(phases[phase])):
                timer = threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL))
                timer.start()
            started = time.perf_counter()
            try:
                return original(*arguments, **keywords)
            finally:
                phases[phase].append(time.perf_counter() - started)
                if timer is not None:
                    timer.join()

        setattr(owner, name, passed)
        return owner, name, original

    wrapped = [
        wrap(capture_shard, "build", "capture"),
        wrap(quantize_model, "build", "quantisation"),
        wrap(storage.artifacts, "flush_and_hash", "commit"),
        wrap(LocalObjects, "commit", "commit"),
        wrap(RemoteObjects, "commit", "push"),
    ]
    try:
        yield
    finally:
        for owner, name, original in wrapped:
            setattr(owner, name, original)


@contextmanager
def counted(owner: Any, name: str, count: list[int]) -> Iterator[None]:
    """Count the calls of a method."""
    original = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        count[0] += 1
        return original(*arguments, **keywords)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def finished_blocks(root: Path) -> dict[str, int]:
    """Return how many finished blocks each work folder holds, by key."""
    return {path.name: len(list(path.glob("block-*"))) for path in (root / "work").glob("*")}


def faults_of(store: ArtifactStore) -> list[str]:
    """Return what is wrong with anything in a store or its remote."""
    found = [fault for stage, key in store.folders() for fault in store.verify(stage, key)]
    if store.remote is not None:
        found += [fault for stage, key in store.remote.folders() for fault in store.remote.verify(stage, key)]
    return found
