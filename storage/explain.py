"""Why an artifact is not in the store: the difference to the nearest artifact of the same stage."""

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 3  # changed fields that a reason names before it says "and n more"


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested JSON by dotted path; a reference to an artifact is one leaf."""
    if isinstance(value, Mapping) and set(value) in ({"stage", "key"}, {"stage", "digest"}):
        name = value.get("key") or value["digest"]
        return {path: f"{value['stage']} {str(name)[:8]}"}
    if isinstance(value, Mapping) and value:
        pairs = [(f"{path}.{key}" if path else str(key), each) for key, each in value.items()]
    elif isinstance(value, list | tuple) and value:
        pairs = [(f"{path}[{index}]", each) for index, each in enumerate(value)]
    else:
        return {path: value}
    return {leaf: end for where, each in pairs for leaf, end in flatten(each, where).items()}


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per leaf that differs, such as `bits: 4 -> 3`."""
    before, after = flatten(old), flatten(new)
    return [
        f"{path}: {_shown(before.get(path))} -> {_shown(after.get(path))}"
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path)
    ]


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
    differences = [(changed_fields(old, material), old_version, made) for old_version, old, made in others]
    fewest = min(len(lines) for lines, _, _ in differences)
    nearest = max((each for each in differences if len(each[0]) == fewest), key=lambda each: each[2])
    lines = list(nearest[0])
    if nearest[1] != version:
        lines.insert(0, f"stage version {nearest[1]} -> {version}")
    more = f", and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
