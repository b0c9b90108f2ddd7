"""The tasks of `recipes/tasks` ask exactly what lm-eval's own tasks of these names ask about the same items."""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from covercal.recipe import LanguageTask
from covercal.task_files import load_task, read_task

ROOT = Path(__file__).parent.parent
LOCAL = ROOT / "recipes" / "tasks"
SHARED = ROOT.parent / "shared" / "data"
OWN = Path(lm_eval.tasks.__file__).parent
ITEMS = 12

Row = dict[str, Any]


@dataclass(frozen=True)
class Pairing:
    """A task of ours and lm-eval's own.

    Attributes
    ----------
    local, own
        Task files.
    data
        Items in our form.
    original
        From an item in our form to the data set's own row.
    examples
        Items by hand in both forms: the original's, and ours.
    """

    local: str
    own: str
    data: str
    original: Callable[[Row], Row]
    examples: tuple[tuple[Row, Row], ...]


def arc(item: Row) -> Row:
    labels = ["A", "B", "C", "D", "E"][: len(item["choices"])]
    return {
        "question": item["query"].removeprefix("Question: "),
        "choices": {"text": item["choices"], "label": labels},
        "answerKey": labels[item["gold"]],
    }


def hellaswag(item: Row) -> Row:
    label, _, rest = item["query"].partition(": ")
    whole, end, begun = rest.rpartition(". ")
    halves = {"ctx_a": rest, "ctx_b": ""} if rest.endswith(".") else {"ctx_a": whole + end.strip(), "ctx_b": begun}
    return {"activity_label": label, **halves, "endings": item["choices"], "label": str(item["label"])}


def winogrande(item: Row) -> Row:
    first, second = item["context_options"]
    shared = next(i for i in range(len(first) + 1) if i == len(first) or first[i : i + 1] != second[i : i + 1])
    return {
        "sentence": f"{first[:shared]}_ {item['continuation']}",
        "option1": first[shared:],
        "option2": second[shared:],
        "answer": str(item["gold"] + 1),
    }


def piqa(item: Row) -> Row:
    goal = item["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": item["choices"][0], "sol2": item["choices"][1], "label": item["gold"]}


def lambada(item: Row) -> Row:
    return {"text": f"{item['context']} {item['continuation']}"}


ARC = (
    (
        {
            "question": "Which is hot?",
            "choices": {"text": ["ice", "the sun", "snow"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {"query": "Question: Which is hot?", "choices": ["ice", "the sun", "snow"], "gold": 1},
    ),
    (
        {
            "question": "What do cows eat? {{braces}} stay.",
            "choices": {"text": ["grass", "stones", "air"], "label": ["A", "B", "C"]},
            "answerKey": "A",
        },
        {"query": "Question: What do cows eat? {{braces}} stay.", "choices": ["grass", "stones", "air"], "gold": 0},
    ),
)
PAIRINGS = (
    Pairing("arc_challenge_local", "arc/arc_challenge.yaml", "arc-challenge-test.jsonl.gz", arc, ARC),
    Pairing("arc_easy_local", "arc/arc_easy.yaml", "arc-easy-test.jsonl.gz", arc, ARC),
    Pairing(
        "hellaswag_local",
        "hellaswag/hellaswag.yaml",
        "hellaswag-validation.jsonl.gz",
        hellaswag,
        (
            (
                {
                    "activity_label": "Baking",
                    "ctx_a": "How to bake [title] Mix the dough.",
                    "ctx_b": "the baker",
                    "endings": ["waits [substeps] long.", "sings.", "leaves  home.", "is a door."],
                    "label": "2",
                },
                {
                    "query": "Baking: How to bake. Mix the dough. the baker",
                    "choices": ["waits long.", "sings.", "leaves home.", "is a door."],
                    "label": 2,
                },
            ),
        ),
    ),
    Pairing(
        "winogrande_local",
        "winogrande/default.yaml",
        "winogrande-validation.jsonl.gz",
        winogrande,
        (
            (
                {
                    "sentence": "Ann thanked Eve because _ had helped.",
                    "option1": "Ann",
                    "option2": "Eve",
                    "answer": "2",
                },
                {
                    "context_options": ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"],
                    "continuation": "had helped.",
                    "gold": 1,
                },
            ),
        ),
    ),
    Pairing(
        "piqa_local",
        "piqa/piqa.yaml",
        "piqa-validation.jsonl.gz",
        piqa,
        (
            (
                {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Eat the lid.", "label": 0},
                {"query": "Question: Open a jar.\n", "choices": ["Turn the lid.", "Eat the lid."], "gold": 0},
            ),
        ),
    ),
    Pairing(
        "lambada_local",
        "lambada/lambada_openai.yaml",
        "lambada-test.jsonl.gz",
        lambada,
        (
            (
                {"text": 'He said:\n\n"Where is my  hat?" And she gave him the hat'},
                {"context": 'He said:\n\n"Where is my  hat?" And she gave him the', "continuation": "hat"},
            ),
        ),
    ),
)
by_name = pytest.mark.parametrize("pairing", PAIRINGS, ids=lambda pairing: pairing.local)
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the evaluation sets are not on this machine")


def rows(path: Path, count: int | None = None) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for _, line in zip(range(count or 10**9), stream, strict=False)]


def write_rows(path: Path, items: list[Row]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def local_task(name: str, items: list[Row], folder: Path) -> ConfigurableTask:
    """Return our task on items of our form."""
    config = read_task(LOCAL / f"{name}.yaml", functions=True)
    split = config["test_split"]
    config["dataset_kwargs"] = {"data_files": {split: str(write_rows(folder / f"{name}.jsonl", items))}}
    return ConfigurableTask(config=config)


def own_task(path: str, documents: list[Row], split: str) -> ConfigurableTask:
    """Return lm-eval's task on rows of its data set, drawing examples from the split that is evaluated."""
    config = load_yaml(OWN / path, resolve_func=True)
    data = DatasetDict({split: Dataset.from_list(documents)})
    for key in ("tag", "training_split", "validation_split", "dataset_kwargs"):
        config.pop(key, None)
    places = {"test_split": split, "fewshot_split": split, "custom_dataset": lambda **_: data}
    return ConfigurableTask(config={**config, **places})


def requests(task: ConfigurableTask, shots: int) -> list[tuple[int, str, Any]]:
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests()
    return [(each.doc_id, each.request_type, each.arguments) for each in task.instances]


def invented_results(task: ConfigurableTask, seed: int) -> list[dict[str, Any]]:
    """Return the metrics of every item when the model answered at random."""
    draw = random.Random(seed)
    answers: dict[int, list[tuple[float, bool]]] = {}
    for each in task.instances:
        answers.setdefault(each.doc_id, []).append((-20 * draw.random(), draw.random() < 0.5))
    return [task.process_results(doc, answers[index]) for index, doc in enumerate(task.eval_docs)]


def assert_same_task(ours: ConfigurableTask, own: ConfigurableTask, most_shots: int) -> None:
    for shots in sorted({0, most_shots}):
        assert requests(ours, shots) == requests(own, shots)
    assert ours.aggregation() == own.aggregation()
    assert ours.higher_is_better() == own.higher_is_better()
    assert invented_results(ours, 1) == invented_results(own, 1)


@by_name
def test_an_item_written_in_both_forms_is_asked_the_same(pairing: Pairing, tmp_path: Path) -> None:
    originals, items = ([pair[form] for pair in pairing.examples] for form in (0, 1))
    ours = local_task(pairing.local, items, tmp_path)
    own = own_task(pairing.own, originals, ours.config.test_split)
    assert_same_task(ours, own, len(items) - 1)


@needs_data
@by_name
def test_real_items_are_asked_as_lm_evals_own_task_asks_them(pairing: Pairing, tmp_path: Path) -> None:
    items = rows(SHARED / pairing.data, ITEMS)
    ours = local_task(pairing.local, items, tmp_path)
    own = own_task(pairing.own, [pairing.original(item) for item in items], ours.config.test_split)
    assert_same_task(ours, own, 5)


@needs_data
def test_every_subject_of_mmlu_is_asked_as_lm_eval_asks_it() -> None:
    loaded = load_task(LanguageTask(path=str(LOCAL / "mmlu_local.yaml")))
    items: dict[tuple[str, str], list[Row]] = {}
    for row in rows(SHARED / "mmlu.jsonl.gz"):
        items.setdefault((row["subject"], row["split"]), []).append(row)
    assert set(loaded["tasks"]) == {f"mmlu_local::{subject}" for subject, _ in items}
    assert {path.stem for path in OWN.glob("mmlu/default/mmlu_*.yaml")} == {f"mmlu_{subject}" for subject, _ in items}
    for name, ours in loaded["tasks"].items():
        subject = name.removeprefix("mmlu_local::")
        config = load_yaml(OWN / f"mmlu/default/mmlu_{subject}.yaml", resolve_func=True)
        data = DatasetDict({split: Dataset.from_list(items[subject, split][:5]) for split in ("dev", "test")})
        config.pop("tag", None)
        own = ConfigurableTask(config={**config, "custom_dataset": lambda data=data, **_: data})
        for shots in (0, 5):
            for task in (ours, own):
                task.set_config(key="num_fewshot", value=shots)
                task.set_fewshot_seed(seed=1234)
                task.build_all_requests(limit=2)
            assert [each.arguments for each in ours.instances] == [each.arguments for each in own.instances]
        assert ours.higher_is_better() == own.higher_is_better()


def test_a_page_begins_at_a_title_and_at_no_section(tmp_path: Path) -> None:
    text = " \n = One = \n \n a . \n = = Part = = \n b \n \n = Two ( of 2 ) = \n c \n"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    assert wikitext(tmp_path / "text.txt") == [
        " = One = \n \n a . \n = = Part = = \n b \n ",
        " = Two ( of 2 ) = \n c \n",
    ]


@needs_data
def test_wikitext_is_read_as_lm_eval_reads_its_pages() -> None:
    pages = wikitext(SHARED / "wikitext2-test.txt")
    whole = (SHARED / "wikitext2-test.txt").read_text(encoding="utf-8")
    assert (len(pages), "\n".join(pages)) == (62, whole[whole.index(" = Robert") :])
    ours = next(iter(load_task(LanguageTask(path=str(LOCAL / "wikitext2_local.yaml")))["tasks"].values()))
    own = own_task("wikitext/wikitext.yaml", [{"page": page} for page in pages], "test")
    assert requests(ours, 0) == requests(own, 0)
    results = [[(-1234.5,)] for _ in pages]
    assert [ours.process_results(d, r[0]) for d, r in zip(ours.eval_docs, results, strict=True)] == [
        own.process_results(d, r[0]) for d, r in zip(own.eval_docs, results, strict=True)
    ]
    assert ours.aggregation() == own.aggregation()
    assert ours.higher_is_better() == own.higher_is_better()


def wikitext(path: Path) -> list[str]:
    config = read_task(LOCAL / "wikitext2_local.yaml", functions=True)
    return list(config["custom_dataset"](data_files=str(path))["test"]["page"])
