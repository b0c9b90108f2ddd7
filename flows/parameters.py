"""What a flow run is asked for: the fields of the form on the dashboard, and the recipe they make."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from covercal.errors import InputError
from covercal.quantization_settings import PRESETS
from covercal.recipe import Recipe, load_recipe, parse_recipe
from covercal.selectors.registry import SELECTORS

RecipeSource = str | dict[str, Any]
SelectorName = Annotated[str, Field(json_schema_extra={"enum": [*SELECTORS]})]
MethodName = Annotated[str, Field(json_schema_extra={"enum": [*PRESETS]})]
Count = Annotated[int, Field(ge=1)]
Bits = Annotated[int, Field(json_schema_extra={"enum": [2, 3, 4, 5, 6, 7, 8]})]


def asked_recipe(recipe: RecipeSource, fields: Mapping[str, Any], changes: Sequence[str]) -> Recipe:
    """Return the recipe of a flow run.

    Parameters
    ----------
    recipe
        Path of a recipe file, or a recipe as JSON, its paths absolute.
    fields
        What fields (`section.field`) are set to; None leaves a field as the recipe has it.
    changes
        Further ones, as `section.field=value`; they come last.

    Raises
    ------
    InputError
        When the recipe is not there or a field is wrong.
    """
    if not recipe:
        raise InputError(
            "No recipe was given; `recipe` is the path of a recipe file on the worker's machine. "
            "`covercal deploy RECIPE` gives runs one that they have unless they are given another."
        )
    overrides = [f"{name}={json.dumps(value)}" for name, value in fields.items() if value is not None]
    overrides += changes
    if isinstance(recipe, str):
        return load_recipe(Path(recipe), overrides)
    return parse_recipe(recipe, Path("/"), overrides=overrides)
