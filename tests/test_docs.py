"""The code in the documentation: what it loads from a chosen set is what the set holds."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
DOCUMENT = Path(__file__).parent.parent / "docs" / "use-elsewhere.md"
ROWS = [
    {
        "text": f"text {i} é",
        "tokens": [i, i + 1, i + 2],
        "domain": "d",
        "origins": [],
        "sample": i,
        "rank": i,
        "gain": None,
    }
    for i in range(3)
]


class Noted:
    """Stands for anything of a library that is not installed here: notes what it is called with."""

    def __init__(self, name: str, calls: list[Call]) -> None:
        self.name = name
        self.calls = calls

    def __call__(self, *positional: Any, **keywords: Any) -> "Noted":
        self.calls.append((self.name, positional, keywords))
        return self

    def __getattr__(self, name: str) -> "Noted":
        return Noted(name, self.calls)


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The Python blocks of the document by section, beside a chosen set."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    Path("chosen.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.M)[1:]
    return {s.splitlines()[0]: re.findall(r"```python\n(.*?)```", s, flags=re.S)[0] for s in sections}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is called of the libraries that are not installed here."""
    found: list[Call] = []
    modules = ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.quantization", "gptqmodel")
    for name in modules:
        module = types.ModuleType(name)
        for each in ("oneshot", "GPTQModifier", "GPTQModel", "QuantizeConfig"):
            setattr(module, each, Noted(each, found))
        monkeypatch.setitem(sys.modules, name, module)
    return found


@pytest.mark.parametrize(("section", "call"), [("llm-compressor", "oneshot"), ("GPTQModel", "quantize")])
def test_token_ids_reach_the_library_as_they_were_chosen(
    blocks: dict[str, str], calls: list[Call], section: str, call: str
) -> None:
    exec(blocks[section], {})
    ((_, positional, keywords),) = [each for each in calls if each[0] == call]
    data = positional[0] if positional else keywords["dataset"]
    assert [row["input_ids"] for row in data] == [row["tokens"] for row in ROWS]
    assert [row["attention_mask"] for row in data] == [[1, 1, 1]] * 3


def test_texts_for_auto_round_are_those_chosen(blocks: dict[str, str]) -> None:
    exec(blocks["auto-round"], {})
    assert json.loads(Path("chosen.json").read_text(encoding="utf-8")) == [{"text": row["text"]} for row in ROWS]


def test_texts_for_an_importance_matrix_are_those_chosen(blocks: dict[str, str]) -> None:
    exec(blocks["llama.cpp"], {})
    assert Path("chosen.txt").read_text(encoding="utf-8").split("\n\n") == [row["text"] for row in ROWS]
