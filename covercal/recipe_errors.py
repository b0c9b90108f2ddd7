"""What is wrong in a recipe, in sentences that name the field and what would be right."""

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

KEY = "[key]"  # what pydantic adds to the location of a mapping's key that is wrong itself


def sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return a sentence for every field that is wrong, and for an unknown one the nearest valid name.

    Parameters
    ----------
    error, model
        What pydantic found, and of which class.
    """
    return [_sentence(each, model) for each in _by_field(_first_hand(error.errors()), model)]


def _sentence(error: dict[str, Any], model: type[BaseModel]) -> str:
    location = _fields_of(error["loc"], model)
    field = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        names = _valid_names(location[:-1], model)
        near = difflib.get_close_matches(str(location[-1]), names, n=1)
        prefix = ".".join(str(p) for p in location[:-1])
        hint = f"did you mean `{'.'.join(filter(None, [prefix, near[0]]))}`?" if near else f"valid: {', '.join(names)}"
        return f"there is no field `{field}`; {hint}"
    if error["type"] == "missing":
        return f"field `{field}` is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(error["input"], dict | BaseModel) else f" (got {error['input']!r})"
    return f"`{field}`: {message}{given}" if field else message


def _by_field(errors: Sequence[Any], model: type[BaseModel]) -> list[dict[str, Any]]:
    """Return one error for each field: what a value of several kinds might be is said in one sentence."""
    merged: dict[str, dict[str, Any]] = {}
    for each in errors:
        field = ".".join(str(part) for part in _fields_of(each["loc"], model))
        earlier = merged.get(field)
        if earlier is None or "extra_forbidden" in (each["type"], earlier["type"]):
            merged[field if earlier is None else f"{field} {len(merged)}"] = dict(each)
        else:
            also = str(each["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
            earlier["msg"] = f"{earlier['msg']}, or {also}"
    return list(merged.values())


def _first_hand(errors: Sequence[Any]) -> list[Any]:
    """Return the errors without those that say a list is too short only because an entry of it is wrong."""
    inner = [each["loc"] for each in errors]
    return [
        each
        for each in errors
        if each["type"] != "too_short"
        or not any(len(loc) > len(each["loc"]) and loc[: len(each["loc"])] == each["loc"] for loc in inner)
    ]


def _fields_of(location: Sequence[str | int], whole: type[BaseModel]) -> list[str | int]:
    """Return a location without what pydantic adds to it, such as names for the branches of a union."""
    return _followed(location, whole)[0]


def _valid_names(location: Sequence[str | int], whole: type[BaseModel]) -> list[str]:
    section = _followed(location, whole)[1]
    return list(section.model_fields) if _is_section(section) else []


def _followed(location: Sequence[str | int], whole: type[BaseModel]) -> tuple[list[str | int], Any]:
    """Return the parts of a location that stand in the recipe, and the section or annotation that the last one has."""
    model: Any = whole
    fields: list[str | int] = []
    for part in location:
        if typing.get_origin(model) is dict:
            fields.append(part)
            model = _section_type(typing.get_args(model)[1])
        elif isinstance(part, int):
            fields.append(part)
        elif _is_section(model) and part != KEY:
            fields.append(part)
            field = model.model_fields.get(part)
            model = _section_type(field.annotation) if field is not None else None
    return fields, model


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _section_type(annotation: Any) -> Any:
    """Return the section inside `tuple[Section, ...]` or `Section | None`, else the annotation."""
    if typing.get_origin(annotation) in (tuple, typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if _is_section(a)]
        return inner[0] if inner else annotation
    return annotation
