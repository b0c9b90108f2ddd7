"""The parts that recipes are made of: immutable, and a name that they do not know is an error."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


def one_of(known: Mapping[str, Any], kind: str) -> BeforeValidator:
    """Return a validator that accepts a registered name and names the nearest one otherwise."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            near = difflib.get_close_matches(str(value), list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}."
            raise ValueError(f"there is no {kind} {value!r}; {hint}")
        return value

    return BeforeValidator(check)


class Section(BaseModel):
    """A part of a recipe: immutable, and a name that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Choice(Section):
    """A section that may be written as the value of its main field: `shrinkage: 0.3` is `{strength: 0.3}`."""

    main: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, value: Any) -> Any:
        return cls.spelled_out(value)

    @classmethod
    def spelled_out(cls, value: Any) -> Any:
        """Return a plain value as the mapping that it stands for; anything else as it is."""
        return {cls.main: value} if isinstance(value, str | int | float) and not isinstance(value, bool) else value
