"""Why an artifact is not in the store: the difference to the nearest artifact of the same stage."""

from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 24  # characters of a value that a reason shows whole
SHOWN = 3  # changed fields that a reason names before it says "and n more"


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested JSON by dotted path; a reference to an artifact is one leaf."""
    if isinstance(value, Mapping) and set(value) in ({"stage", "key"}, {"stage", "digest"}):
        name = value.get("key") or value["digest"]
        return {path: f"{value['stage']} {str(name)[:8]}"}
    if isinstance(value, Mapping) and (value or not path):
        pairs = [(f"{path}.{key}" if path else str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and value:
        pairs = [(f"{path}[{index}]", each) for index, each in enumerate(value)]
    else:
        return {path: value}
    return {leaf: end for where, each in pairs for leaf, end in flatten(each, where).items()}


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per leaf that differs, such as `bits: 4 -> 3`.

    A field that was nothing and now has parts is told by its parts alone.
    """
    before, after = flatten(old), flatten(new)
    lines = {
        path: _change(before.get(path), after.get(path))
        for path in sorted({*before, *after})
        if (path in before, repr(before.get(path))) != (path in after, repr(after.get(path)))
    }
    told = {path: change for path, change in lines.items() if change != "none -> none"}
    return [f"{path}: {change}" for path, change in (told or lines).items()]


def explain_miss(
    version: int, material: Mapping[str, Any], others: Sequence[tuple[int, Mapping[str, Any], str]]
) -> str:
    """Return the reason of a miss.

    Parameters
    ----------
    version, material
        Stage version and key material of the artifact that is wanted.
    others
        (stage version, key material, time made) of the artifacts of this stage that are there.
    """
    if not others:
        return "first of its stage"
    differences = []
    for old_version, old, made in others:
        newer = [f"stage version {old_version} -> {version}"] if old_version != version else []
        differences.append((newer + changed_fields(old, material), made))
    fewest = min(len(lines) for lines, _ in differences)
    lines, _ = max((each for each in differences if len(each[0]) == fewest), key=lambda each: each[1])
    more = f", and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more


def _change(old: Any, new: Any) -> str:
    before, after = ("none" if value is None else str(value) for value in (old, new))
    short_before, short_after = _short(before), _short(after)
    if short_before == short_after:
        return f"{before} -> {after}"
    return f"{short_before} -> {short_after}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:12]}…"
