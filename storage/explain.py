"""Why an artifact is not in the store: the difference to the nearest artifact of its stage, down to the field."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST = 24  # characters of a value that a reason shows whole
SHOWN = 3  # changed fields that a reason names before it says "and n more"
DEEPEST = 8  # how far up a change is followed
_INDEX = re.compile(r"\[\d+\]$")


@dataclass(frozen=True, slots=True)
class Known:
    """What an artifact was, or was to be, made from.

    Attributes
    ----------
    version, material
        Stage version and key material.
    inputs
        The artifacts it reads, as (stage, key, digest); finds the key of an input that counts by its digest.
    """

    version: int
    material: Mapping[str, Any]
    inputs: Sequence[tuple[str, str, str]] = ()

    def key_of(self, leaf: "Leaf") -> str:
        """Return the key of an input; empty when it is not known."""
        if leaf.key:
            return leaf.key
        inputs = (key for stage, key, digest in self.inputs if (stage, digest) == (leaf.stage, leaf.digest) and digest)
        return next(inputs, "")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A reference to an artifact inside key material."""

    stage: str
    key: str = ""
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.stage} {(self.key or self.digest)[:8]}"


Finder = Callable[[str, str], Known | None]


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested JSON by dotted path; a reference to an artifact is one leaf."""
    if isinstance(value, Mapping) and set(value) in ({"stage", "key"}, {"stage", "digest"}):
        return {path: Leaf(**value)}
    if isinstance(value, Mapping) and (value or not path):
        pairs = [(f"{path}.{key}" if path else str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and value:
        pairs = [(f"{path}[{index}]", each) for index, each in enumerate(value)]
    else:
        return {path: value}
    return {leaf: end for where, each in pairs for leaf, end in flatten(each, where).items()}


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per leaf that differs, such as `quantization.bits: 4 -> 3`.

    A field that was nothing and now has parts is told by its parts alone.
    """
    return [f"{path}: {_change(a, b)}" for path, (a, b) in _changes(old, new).items()]


def differences(stage: str, old: Known, new: Known, find: Finder, depth: int = DEEPEST) -> list[str]:
    """Return what differs between two artifacts of a stage; of an input that differs, what differs in that.

    Parameters
    ----------
    stage
        Their stage.
    old, new
        What the one was made from, and what the other is to be made from.
    find
        Returns what the artifact (stage, key) was made from, if that is known.
    """
    lines = [f"{stage} stage version {old.version} -> {new.version}"] if old.version != new.version else []
    counted: dict[str, list[Leaf | None]] = {}
    for path, (before, after) in _changes(old.material, new.material).items():
        if isinstance(before, Leaf) and isinstance(after, Leaf) and before.stage == after.stage:
            lines += _followed(path, (old, before), (new, after), find, depth)
        elif _INDEX.search(path) and None in (before, after) and isinstance(before or after, Leaf):
            counted.setdefault(_INDEX.sub("", path), []).append(after)
        else:
            lines.append(f"{path}: {_change(before, after)}")
    for path, leaves in counted.items():
        more = sum(leaf is not None for leaf in leaves)
        lines.append(f"{path}: {more} more" if more else f"{path}: {len(leaves)} fewer")
    return list(dict.fromkeys(lines))


def _followed(path: str, old: tuple[Known, Leaf], new: tuple[Known, Leaf], find: Finder, depth: int) -> list[str]:
    """Return what differs between two inputs."""
    (reader, before), (wanted, after) = old, new
    first, second = (find(leaf.stage, known.key_of(leaf)) for known, leaf in ((reader, before), (wanted, after)))
    if first is not None and second is not None and depth > 0:
        lines = differences(before.stage, first, second, find, depth - 1)
        if lines:
            return lines
    return [f"{path}: {_change(before, after)}"]


def explain_miss(stage: str, wanted: Known, others: Sequence[tuple[Known, str]], find: Finder) -> str:
    """Return the reason of a miss.

    Parameters
    ----------
    stage, wanted
        The artifact that is wanted.
    others
        What the artifacts of this stage that are there were made from, and when they were made.
    find
        See `differences`.
    """
    if not others:
        return "first of its stage"

    def distance(other: Known) -> int:
        return (other.version != wanted.version) + len(_changes(other.material, wanted.material))

    distances = [distance(other) for other, _ in others]
    fewest = min(distances)
    near = (other for other, each in zip(others, distances, strict=True) if each == fewest)
    nearest, _ = max(near, key=lambda each: each[1])
    lines = differences(stage, nearest, wanted, find)
    more = f", and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = flatten(old), flatten(new)
    found = {
        path: (before.get(path), after.get(path))
        for path in sorted({*before, *after})
        if (path in before, repr(before.get(path))) != (path in after, repr(after.get(path)))
    }
    told = {path: pair for path, pair in found.items() if not _is_empty(pair) or not _has_parts(path, found)}
    return told or found


def _is_empty(pair: tuple[Any, Any]) -> bool:
    return all(value is None or value in ([], {}, ()) for value in pair)


def _has_parts(path: str, paths: Mapping[str, Any]) -> bool:
    return any(each.startswith((f"{path}.", f"{path}[")) for each in paths)


def _change(old: Any, new: Any) -> str:
    before, after = ("none" if value is None else str(value) for value in (old, new))
    if before == after:  # values of two types that read alike
        before, after = repr(old), repr(new)
    start = _common_start(before, after)
    return f"{_short(before, start)} -> {_short(after, start)}"


def _common_start(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _short(text: str, start: int) -> str:
    """Return a value whole, or its beginning, or, when that does not tell it from the other, where they part."""
    if len(text) <= LONGEST:
        return text
    if start < LONGEST // 2:
        return f"{text[: LONGEST // 2]}…"
    return f"…{text[start - 4 : start + LONGEST // 2]}" + ("…" if start + LONGEST // 2 < len(text) else "")
