"""The fields of the form on the dashboard, and the recipe that they make."""

from collections.abc import Callable
from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema

from covercal.errors import InputError
from covercal.quantization_settings import PRESETS
from covercal.recipe import load_recipe
from covercal.selectors.registry import SELECTORS
from flows import entrypoints
from flows.parameters import asked_recipe

WriteRecipe = Callable[..., Path]
FLOWS = ("quantize", "sweep", "audit")


def test_a_file_and_its_content_make_the_same_recipe(write_recipe: WriteRecipe) -> None:
    path = write_recipe()
    content = load_recipe(path).model_dump(mode="json")
    assert asked_recipe(str(path), {}, []) == asked_recipe(content, {}, []) == load_recipe(path)


def test_fields_are_set_and_changes_come_last(write_recipe: WriteRecipe) -> None:
    fields = {"selection.budget": 2, "selection.selector": "random", "quantization.bits": None}
    for source in (str(write_recipe()), load_recipe(write_recipe()).model_dump(mode="json")):
        found = asked_recipe(source, fields, ["selection.budget=3", "pool.samples=8"])
        assert (found.selection.budget, found.selection.selector) == (3, "random")
        assert (found.quantization.bits, found.pool.samples) == (4, 8)


def test_a_recipe_that_was_given_as_json_is_not_changed(write_recipe: WriteRecipe) -> None:
    content = load_recipe(write_recipe()).model_dump(mode="json")
    asked_recipe(content, {"selection.budget": 2}, ["pool.samples=8"])
    assert (content["selection"]["budget"], content["pool"]["samples"]) == (4, 16)


def test_what_is_wrong_is_named(write_recipe: WriteRecipe) -> None:
    with pytest.raises(InputError, match="There is no recipe file /nowhere"):
        asked_recipe("/nowhere.yaml", {}, [])
    with pytest.raises(InputError, match="No recipe was given; `recipe` is the path of a recipe file on the worker"):
        asked_recipe("", {}, [])
    with pytest.raises(InputError, match="did you mean"):
        asked_recipe(str(write_recipe()), {}, ["pool.sampels=8"])


@pytest.mark.parametrize("name", FLOWS)
def test_every_field_of_a_form_says_what_it_is(name: str) -> None:
    schema = parameter_schema(getattr(entrypoints, name)).model_dump_for_openapi()
    assert schema["required"][0] == "recipe"
    assert all(each["description"].endswith(".") for each in schema["properties"].values())


def test_the_form_offers_what_there_is() -> None:
    form = parameter_schema(entrypoints.quantize).model_dump_for_openapi()["properties"]
    for field, known in (("selector", SELECTORS), ("method", PRESETS)):
        assert form[field]["anyOf"][0]["enum"] == list(known)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_tries_nothing_again_by_itself(name: str) -> None:
    assert getattr(entrypoints, name).retries in (0, None)
