"""What the local tasks make of their files: the subjects of MMLU, the pages of WikiText, the contexts of HellaSwag."""

import gzip
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


@cache
def _rows(path: str, stamp: int) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def mmlu_subject(data_files: str, subject: str, **_: Any) -> DatasetDict:
    """Return the `dev` and `test` items of one subject of MMLU."""
    rows = [row for row in _rows(data_files, Path(data_files).stat().st_mtime_ns) if row["subject"] == subject]
    names = ("subject", "question", "choices", "answer")
    splits = {split: [{n: row[n] for n in names} for row in rows if row["split"] == split] for split in ("dev", "test")}
    return DatasetDict({split: Dataset.from_list(items) for split, items in splits.items()})


def hellaswag_query(document: dict[str, Any]) -> str:
    """Return the context of an item with the beginning of its last sentence capitalised, as lm-eval does.

    An item of ActivityNet ends in the first words of a sentence, which its data set keeps apart (`ctx_b`, in lower
    case) and lm-eval joins by `ctx_b.capitalize()`. The local file joins them as they are. They are what comes after
    the last end of a sentence in a text that does not itself end in one.
    """
    query: str = document["query"]
    ends = [match.end() for match in re.finditer(r"[.!?] ", query)]
    if query.endswith((".", "!", "?")) or not ends:
        return query
    return query[: ends[-1]] + query[ends[-1] :].capitalize()


def wikitext_pages(data_files: str, **_: Any) -> DatasetDict:
    """Return the pages of a WikiText file: a page begins at a line `= Title =`, not at `= = Section = =`.

    As the data set that lm-eval reads (EleutherAI/wikitext_document_level) was made: 62 pages, of which two begin at
    lines of formulas that look like titles.
    """
    pages, lines = [], []
    for line in Path(data_files).read_text(encoding="utf-8").split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    pages.append("\n".join(lines))
    return DatasetDict({"test": Dataset.from_list([{"page": page} for page in pages if page.strip()])})
