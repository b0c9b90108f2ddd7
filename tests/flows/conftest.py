import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and texts, made once."""
    folder = tmp_path_factory.mktemp("files")
    tiny.recipe_value(folder)
    return folder


@pytest.fixture
def write_recipe(files: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe over those files, with sections changed by name."""

    def write(**changes: dict[str, Any]) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(tiny.recipe_value(files, **changes)), encoding="utf-8")
        return path

    return write
