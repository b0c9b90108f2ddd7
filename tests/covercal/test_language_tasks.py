"""Task scores against lm-eval's own model on the same requests, and what task files may and may not be."""

import gzip
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from pydantic import ValidationError

from covercal import harness_model
from covercal.decoder import Decoder, make_decoder
from covercal.errors import EvaluationError, InputError
from covercal.harness_model import SHARED, HarnessModel
from covercal.language_tasks import item_loss, main_metric, mean_error, score_language_task
from covercal.recipe import LanguageTask
from covercal.task_files import describe_task, load_task
from tests import tiny

CHOICES: dict[str, Any] = {
    "task": "choices",
    "output_type": "multiple_choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "fewshot_split": "test",
    "doc_to_text": "Question: {{query}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
LAST_WORD = {
    **CHOICES,
    "task": "last_word",
    "output_type": "loglikelihood",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{' ' + choices[0]}}",
    "doc_to_choice": None,
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
PAGES = {
    **CHOICES,
    "task": "pages",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{query}}",
    "doc_to_choice": None,
    "metric_list": [
        {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
    ],
}
WRITTEN = {
    **CHOICES,
    "task": "written",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[0]}}",
    "doc_to_choice": None,
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
KINDS = {"choices": CHOICES, "last_word": LAST_WORD, "pages": PAGES}
ITEMS = 9


def items(count: int = ITEMS) -> list[dict[str, Any]]:
    """Return questions of several lengths, each with three choices."""
    domains = list(tiny.DOMAINS)
    return [
        {
            "query": tiny.text(seed, domains[seed % 3], 3 + 7 * (seed % 4)),
            "choices": [tiny.text(seed + 50 * k, domains[k], 1 + (seed + k) % 3) for k in range(3)],
            "gold": seed % 3,
        }
        for seed in range(count)
    ]


def write_task(folder: Path, config: dict[str, Any] = CHOICES, name: str = "task.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "items.jsonl").exists():
        lines = [json.dumps(item) + "\n" for item in items()]
        (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / name).write_text(yaml.safe_dump(kept), encoding="utf-8")
    return folder / name


def plain_answers(decoder: Decoder, task: LanguageTask, max_length: int | None = None) -> dict[str, Any]:
    """Return what lm-eval gives with its own model: no cache of contexts, float32 throughout."""
    loaded = load_task(task)
    for each in loaded["tasks"].values():
        each.set_config(key="num_fewshot", value=task.shots or 0)
        each.set_fewshot_seed(seed=task.seed)
    model = HFLM(decoder.model, tokenizer=tiny.tiny_tokenizer(), backend="causal", batch_size=1, max_length=max_length)
    return dict(evaluate(model, loaded, limit=task.limit, bootstrap_iters=100 if not task.limit else 0))


@pytest.fixture(scope="module")
def llama() -> Decoder:
    return make_decoder(tiny.tiny_model())


# --- the same scores as lm-eval's own model ------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "opt", "gemma2", "mixtral"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shots", [0, 2])
def test_scores_are_those_of_lm_evals_own_model(architecture: str, kind: str, shots: int, tmp_path: Path) -> None:
    decoder = make_decoder(tiny.tiny_model(architecture))
    task = LanguageTask(path=str(write_task(tmp_path, KINDS[kind])), limit=7, shots=0 if kind == "pages" else shots)
    expected = plain_answers(decoder, task)
    scores, found = score_language_task(decoder, tiny.tiny_tokenizer(), task)
    assert scores["path"] == SHARED
    assert (scores["items"], scores["limit"], scores["shots"]) == (7, 7, task.shots)
    for metric, each in scores["metrics"].items():
        value = expected["results"][kind][f"{metric},none"]
        assert each["value"] == (value if metric.startswith("acc") else pytest.approx(value, rel=1e-5))
    for sample in expected["samples"][kind]:
        mine = {item.metric: item for item in found if item.item == sample["doc_id"]}
        for metric in sample["metrics"]:
            value, weight = sample[metric] if isinstance(sample[metric], tuple) else (sample[metric], 1.0)
            assert (mine[metric].value, mine[metric].weight) == (pytest.approx(value, abs=1e-4, rel=1e-6), weight)
            assert mine[metric].prompt == sample["prompt_hash"]


@pytest.mark.parametrize("length", [40, 17])
def test_requests_longer_than_the_models_context_are_cut_as_lm_eval_cuts_them(
    llama: Decoder, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = LanguageTask(path=str(write_task(tmp_path)), limit=8, shots=1)
    expected = plain_answers(llama, task, length)["samples"]["choices"]
    task_items, seen = load_task(task)["tasks"]["choices"], HarnessModel(llama, tiny.tiny_tokenizer())
    seen._max_length = length
    task_items.set_config(key="num_fewshot", value=1)
    task_items.set_fewshot_seed(seed=task.seed)
    task_items.build_all_requests(limit=8)
    found = seen.loglikelihood(task_items.instances)
    plain = [response[0] for sample in expected for response in sample["resps"]]
    assert [answer[0] for answer in found] == pytest.approx([answer[0][0] for answer in plain_pairs(plain)], abs=1e-4)
    assert [answer[1] for answer in found] == [answer[0][1] for answer in plain_pairs(plain)]


def plain_pairs(responses: list[Any]) -> list[Any]:
    return [[response] if not isinstance(response[0], tuple | list) else response for response in responses]


@pytest.mark.parametrize("words", [1, 30, 200])
def test_long_texts_are_read_in_the_windows_of_lm_eval(llama: Decoder, words: int) -> None:
    from lm_eval.api.instance import Instance

    text = tiny.text(3, "code", words)
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))]
    plain = HFLM(llama.model, tokenizer=tiny.tiny_tokenizer(), backend="causal", batch_size=1, max_length=32)
    ours = HarnessModel(llama, tiny.tiny_tokenizer())
    ours._max_length = 32
    expected = plain.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_an_empty_context_is_the_models_first_token(llama: Decoder) -> None:
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood", {}, ("", word), 0, ("t", 0, 1)) for word in ("one", " two three")]
    plain = HFLM(llama.model, tokenizer=tiny.tiny_tokenizer(), backend="causal", batch_size=1)
    found = HarnessModel(llama, tiny.tiny_tokenizer()).loglikelihood(asked)
    assert found == [(pytest.approx(value, abs=1e-4), greedy) for value, greedy in plain.loglikelihood(asked, True)]


def test_a_model_whose_cache_cannot_be_shared_is_run_by_lm_eval_and_the_scores_say_so(
    llama: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = LanguageTask(path=str(write_task(tmp_path)), limit=5)
    shared, _ = score_language_task(llama, tiny.tiny_tokenizer(), task)
    monkeypatch.setattr(harness_model, "unshareable", lambda decoder: "its cache is a mystery")
    monkeypatch.setattr(harness_model, "score_continuations", lambda *_, **__: pytest.fail("the shared path ran"))
    plain, _ = score_language_task(llama, tiny.tiny_tokenizer(), task)
    assert (shared["path"], plain["path"]) == (SHARED, "its cache is a mystery")
    assert plain["metrics"] == shared["metrics"]


def test_what_a_model_writes_is_scored_too(llama: Decoder, tmp_path: Path) -> None:
    scores, found = score_language_task(
        llama, tiny.tiny_tokenizer(), LanguageTask(path=str(write_task(tmp_path, WRITTEN)), limit=3)
    )
    assert (scores["metric"], scores["items"], len(found)) == ("exact_match", 3, 3)


# --- what scores hold ----------------------------------------------------------------------------------------------


def test_the_error_of_an_accuracy_is_that_of_the_sample(llama: Decoder, tmp_path: Path) -> None:
    task = LanguageTask(path=str(write_task(tmp_path)))
    scores, found = score_language_task(llama, tiny.tiny_tokenizer(), task)
    for metric in ("acc", "acc_norm"):
        values = [item.value for item in found if item.metric == metric]
        assert scores["metrics"][metric]["value"] == np.mean(values)
        assert scores["metrics"][metric]["error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(ITEMS))


@pytest.mark.parametrize("aggregation", ["perplexity", "weighted_perplexity", "bits_per_byte"])
def test_the_error_of_a_perplexity_is_the_spread_of_many_samples(aggregation: str) -> None:
    draw = np.random.default_rng(0)

    def metric(pairs: list[tuple[float, float]]) -> float:
        values, weights = np.array(pairs).T
        if aggregation == "perplexity":
            return float(np.exp(-values.mean()))
        ratio = -values.sum() / weights.sum()
        return float(np.exp(ratio)) if aggregation == "weighted_perplexity" else float(ratio / np.log(2))

    def sample() -> list[tuple[float, float]]:
        weights = draw.integers(20, 80, 200)
        return [(float(-w * draw.gamma(8, 0.05) - draw.normal(0, 0.5)) / 20, float(w)) for w in weights]

    spread = np.std([metric(sample()) for _ in range(400)])
    assert np.mean([mean_error(sample(), aggregation) for _ in range(20)]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("aggregation", ["weighted_perplexity", "bits_per_byte"])
def test_an_item_without_weight_counts_nothing(aggregation: str) -> None:
    some = [(-20.0, 10.0), (-5.0, 4.0)]
    assert item_loss(0.0, 0.0, aggregation) == (0.0, 0.0)
    means = []
    for items in (some, [*some, (0.0, 0.0)]):
        losses = np.array([item_loss(*item, aggregation) for item in items])
        means.append(losses[:, 0] @ losses[:, 1] / losses[:, 1].sum())
    assert means[0] == means[1]


def test_a_single_item_and_an_unknown_average_have_no_error() -> None:
    assert mean_error([(1.0, 1.0)], "mean") is None
    assert mean_error([(1.0, 1.0), (0.0, 1.0)], "matthews_corrcoef") is None


@pytest.mark.parametrize(
    ("names", "main"),
    [
        (["acc", "acc_norm"], "acc_norm"),
        (["perplexity", "acc"], "acc"),
        (["word_perplexity", "byte_perplexity"], "word_perplexity"),
        (["exact_match,strict", "exact_match,flexible"], "exact_match,strict"),
        (["acc,a", "acc,b"], "acc,a"),
    ],
)
def test_the_main_metric_is_acc_norm_or_acc_or_the_first(names: list[str], main: str) -> None:
    assert main_metric(names) == main


def test_two_shots_draw_other_examples_with_another_seed(llama: Decoder, tmp_path: Path) -> None:
    path = str(write_task(tmp_path))

    def prompts(**settings: Any) -> list[str]:
        _, found = score_language_task(llama, tiny.tiny_tokenizer(), LanguageTask(path=path, limit=3, **settings))
        return [item.prompt for item in found]

    assert prompts(shots=2) == prompts(shots=2, seed=1234) != prompts(shots=2, seed=1)
    assert prompts() == prompts(shots=0) == prompts(seed=1)


def test_a_task_that_says_no_shots_keeps_to_it_and_the_scores_say_so(llama: Decoder, tmp_path: Path) -> None:
    path = str(write_task(tmp_path, {**CHOICES, "num_fewshot": 0}))
    scores, _ = score_language_task(llama, tiny.tiny_tokenizer(), LanguageTask(path=path, shots=2, limit=2))
    assert scores["shots"] == 0


def test_a_group_has_its_own_aggregate_and_its_subtasks(llama: Decoder, tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items(4)), encoding="utf-8")
    shared = {key: value for key, value in CHOICES.items() if key != "task"}
    members = [{"task": "many"}, {"task": "few", "dataset_kwargs": {"data_files": {"test": "few.jsonl"}}}]
    scored = {}
    for by_size in (True, False):
        averaged = [{"metric": name, "weight_by_size": by_size} for name in ("acc", "acc_norm")]
        group = {**shared, "group": "both", "task": members, "aggregate_metric_list": averaged}
        scores, found = score_language_task(
            llama, tiny.tiny_tokenizer(), LanguageTask(path=str(write_task(tmp_path, group, "group.yaml")))
        )
        scored[by_size] = scores
        assert (scores["task"], scores["metric"], scores["items"]) == ("both", "acc_norm", ITEMS + 4)
        assert {name: each["items"] for name, each in scores["subtasks"].items()} == {
            "both::many": ITEMS,
            "both::few": 4,
        }
        parts = [[i.value for i in found if (i.metric, i.subtask) == ("acc", f"both::{n}")] for n in ("many", "few")]
        means, errors = [np.mean(p) for p in parts], [np.std(p, ddof=1) / math.sqrt(len(p)) for p in parts]
        if by_size:
            assert scores["metrics"]["acc"]["value"] == pytest.approx(np.mean(np.concatenate(parts)))
        else:
            assert scores["metrics"]["acc"]["value"] == pytest.approx(np.mean(means))
            assert scores["metrics"]["acc"]["error"] == pytest.approx(math.hypot(*errors) / 2)
    assert (scored[True]["weighting"], scored[False]["weighting"]) == ("items", "subtasks")


def test_a_group_of_single_items_has_the_error_of_one_sample(llama: Decoder, tmp_path: Path) -> None:
    members = []
    for number, item in enumerate(items(6)):
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / f"one{number}.jsonl").write_text(json.dumps(item) + "\n", encoding="utf-8")
        members.append({"task": f"one{number}", "dataset_kwargs": {"data_files": {"test": f"one{number}.jsonl"}}})
    shared = {key: value for key, value in CHOICES.items() if key != "task"}
    averaged = [{"metric": "acc", "weight_by_size": True}]
    group = {**shared, "group": "six", "task": members, "aggregate_metric_list": averaged}
    task = LanguageTask(path=str(write_task(tmp_path, group, "group.yaml")))
    scores, found = score_language_task(llama, tiny.tiny_tokenizer(), task)
    values = [each.value for each in found if each.metric == "acc"]
    assert len(values) == 6
    assert scores["metrics"]["acc"]["error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(6))


def test_a_group_may_name_the_task_files_beside_it(llama: Decoder, tmp_path: Path) -> None:
    write_task(tmp_path, CHOICES, "a.yaml")
    write_task(tmp_path, {"include": "a.yaml", "task": "other", "doc_to_text": "{{query}}"}, "b.yaml")
    path = write_task(tmp_path, {"group": "both", "task": ["choices", "other"]}, "group.yaml")
    scores, _ = score_language_task(llama, tiny.tiny_tokenizer(), LanguageTask(path=str(path), limit=3))
    values = [each["value"] for each in scores["subtasks"].values()]
    assert (len(values), scores["value"]) == (2, pytest.approx(np.mean(values)))


def test_running_a_task_is_silent_and_tells_its_progress(
    llama: Decoder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, str]] = []
    done: list[int] = []

    def started(total: int, unit: str) -> Callable[[int], None]:
        told.append((total, unit))
        return done.append

    level = logging.getLogger("lm_eval").level
    score_language_task(
        llama, tiny.tiny_tokenizer(), LanguageTask(path=str(write_task(tmp_path)), limit=4, shots=1), started
    )
    assert capfd.readouterr() == ("", "")
    assert (told, sum(done)) == ([(12, "requests")], 12)
    assert logging.getLogger("lm_eval").level == level


def test_the_folder_that_a_run_is_started_in_does_not_matter(
    llama: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_task(tmp_path / "tasks")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "items.jsonl").write_text('{"query": "x"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    scores, _ = score_language_task(llama, tiny.tiny_tokenizer(), LanguageTask(path=str(path)))
    assert scores["items"] == ITEMS


# --- what a task file is made of -----------------------------------------------------------------------------------


def test_includes_functions_and_data_are_found(tmp_path: Path) -> None:
    write_task(tmp_path, CHOICES, "base.yaml")
    (tmp_path / "words.py").write_text("def ask(doc):\n    return doc['query']\n", encoding="utf-8")
    (tmp_path / "task.yaml").write_text(
        "include: base.yaml\ntask: mine\ndoc_to_text: !function words.ask\n", encoding="utf-8"
    )
    parts = describe_task(LanguageTask(path=str(tmp_path / "task.yaml")))
    assert (parts.name, parts.functions, parts.data) == ("mine", (tmp_path / "words.py",), (tmp_path / "items.jsonl",))
    assert parts.config["doc_to_text"] == {"function": "ask", "file": 0}
    assert parts.config["doc_to_choice"] == "choices"
    assert str(tmp_path) not in json.dumps(parts.config)


def test_a_pattern_stands_for_the_files_that_it_fits(tmp_path: Path) -> None:
    config = {**CHOICES, "dataset_kwargs": {"data_files": {"test": "items*.jsonl"}}}
    path = write_task(tmp_path, config)
    (tmp_path / "items2.jsonl").write_text(json.dumps(items(1)[0]) + "\n", encoding="utf-8")
    parts = describe_task(LanguageTask(path=str(path)))
    assert parts.data == (tmp_path / "items.jsonl", tmp_path / "items2.jsonl")


def test_a_task_of_the_hub_names_its_data_set() -> None:
    parts = describe_task(LanguageTask(name="arc_challenge"))
    assert (parts.name, parts.hub, parts.data) == ("arc_challenge", (("allenai/ai2_arc", None),), ())
    assert parts.config["dataset_name"] == "ARC-Challenge"


def test_a_group_of_the_hub_is_all_of_its_tasks() -> None:
    parts = describe_task(LanguageTask(name="mmlu"))
    assert parts.hub == (("cais/mmlu", None),)
    assert json.dumps(parts.config).count('"doc_to_choice"') == 57
    assert "site-packages" not in json.dumps(parts.config)


def test_files_of_a_data_set_on_the_hub_are_its_own() -> None:
    parts = describe_task(LanguageTask(name="arithmetic_2ds"))
    assert parts.data == ()
    assert [name for name, _ in parts.hub] == ["EleutherAI/arithmetic"]
    parts = describe_task(LanguageTask(name="prost"))
    assert (parts.data, parts.hub) == ((), (("corypaik/prost", None),))


def test_a_task_file_may_name_files_of_a_data_set_on_the_hub(tmp_path: Path) -> None:
    kept = {"dataset_path": "owner/name", "dataset_kwargs": {"data_files": {"test": "part/test.jsonl"}}}
    parts = describe_task(LanguageTask(path=str(write_task(tmp_path, {**CHOICES, **kept}))))
    assert (parts.data, parts.hub) == ((), (("owner/name", None),))
    kept = {"dataset_path": "json", "dataset_kwargs": {"data_files": "hf://datasets/owner/name@v1/test.jsonl"}}
    parts = describe_task(LanguageTask(path=str(write_task(tmp_path, {**CHOICES, **kept}))))
    assert (parts.data, parts.hub) == ((), (("owner/name", "v1"),))


HUB_SOURCES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"dataset_path": "owner/name"}, {"path": "owner/name", "revision": "a" * 40}),
    (
        {"dataset_path": "owner/name", "dataset_kwargs": {"revision": "v1"}},
        {"path": "owner/name", "revision": "b" * 40},
    ),
    (
        {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": ["hf://datasets/owner/name@v1/x.jsonl"]}}},
        {"path": "json", "data_files": {"test": [f"hf://datasets/owner/name@{'b' * 40}/x.jsonl"]}},
    ),
    ({"dataset_path": "owner/other"}, {"path": "owner/other"}),
]


@pytest.mark.parametrize(("source", "wanted"), HUB_SOURCES)
def test_a_data_set_on_the_hub_is_read_at_its_commit(
    source: dict[str, Any], wanted: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append({"path": path, **options})
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(items(3))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    path = write_task(tmp_path, {**{k: v for k, v in CHOICES.items() if k != "dataset_kwargs"}, **source})
    load_task(LanguageTask(path=str(path)), {"owner/name": "a" * 40, "owner/name@v1": "b" * 40})
    assert asked == [wanted]
    assert datasets.load_dataset is load_dataset


def test_functions_of_lm_evals_own_tasks_are_found() -> None:
    parts = describe_task(LanguageTask(name="hellaswag"))
    assert [path.name for path in parts.functions] == ["utils.py"]
    assert parts.config["process_docs"] == {"function": "process_docs", "file": 0}


# --- what is wrong -------------------------------------------------------------------------------------------------


def refusal(task: LanguageTask) -> str:
    with pytest.raises(InputError) as caught:
        describe_task(task)
    return str(caught.value)


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    assert "lm-eval has no task 'arc_chalenge'; did you mean 'arc_challenge'" in refusal(
        LanguageTask(name="arc_chalenge")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "task.yaml is not valid YAML"),
        ("- 1\n", "task.yaml cannot be used: Expected YAML dict"),
        ("output_type: multiple_choice\n", "task.yaml is no lm-eval task: it has neither `task:` nor `group:`"),
        ("include: gone.yaml\ntask: x\n", "task.yaml includes"),
        ("include: task.yaml\ntask: x\n", "task.yaml cannot be used: Include cycle"),
        ("group: g\ntask: [choises]\n", "names the task 'choises'; did you mean 'choices'?"),
        ("task: x\ndataset_path: json\ndataset_kwargs: {data_files: gone.jsonl}\n", "There is no data file"),
        ("task: x\ndataset_path: json\ndataset_kwargs: {data_files: 'gone*.jsonl'}\n", "There is no data file"),
        ("task: x\ndataset_path: json\ndataset_kwargs: {data_files: 'https://a/b'}\n", "lie on local disk"),
    ],
)
def test_what_is_no_task_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    write_task(tmp_path, CHOICES, "beside.yaml")
    (tmp_path / "task.yaml").write_text(text, encoding="utf-8")
    assert message in refusal(LanguageTask(path=str(tmp_path / "task.yaml")))


def test_a_missing_task_file_is_named(tmp_path: Path) -> None:
    assert refusal(LanguageTask(path=str(tmp_path / "x.yaml"))) == f"There is no task file {tmp_path / 'x.yaml'}."


@pytest.mark.parametrize("how", ["lines", "gzip", "empty", "not gzip"])
def test_data_that_are_cut_short_are_named(how: str, tmp_path: Path) -> None:
    whole = "".join(json.dumps(item) + "\n" for item in items()).encode()
    name, data, message = {
        "lines": ("items.jsonl", whole[:-20], "is cut short: its last line is no JSON"),
        "gzip": ("items.jsonl.gz", gzip.compress(whole)[:-30], "is cut short or damaged"),
        "empty": ("items.jsonl", b"\n", "is empty"),
        "not gzip": ("items.jsonl.gz", whole, "is cut short or damaged"),
    }[how]
    (tmp_path / name).write_bytes(data)
    path = write_task(tmp_path, {**CHOICES, "dataset_kwargs": {"data_files": {"test": name}}})
    assert f"Data file {tmp_path / name} {message}" in refusal(LanguageTask(path=str(path)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metric_list": [{"metric": "no_such_metric"}]}, "cannot be loaded by lm-eval"),
        ({"doc_to_target": "{{missing.deep}}"}, "cannot be loaded by lm-eval"),
        ({"output_type": "guess"}, "cannot be loaded by lm-eval: Got invalid output_type 'guess'"),
        ({"surprise": 1}, "cannot be loaded by lm-eval"),
    ],
)
def test_what_lm_eval_makes_no_task_of_is_told_in_its_words(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load_task(LanguageTask(path=str(write_task(tmp_path, {**CHOICES, **changed}))))


def test_more_shots_than_examples_are_refused(llama: Decoder, tmp_path: Path) -> None:
    task = LanguageTask(path=str(write_task(tmp_path)), shots=50)
    with pytest.raises(InputError, match=r"Task task has 9 examples; evaluation\.tasks asks for 50 shots"):
        score_language_task(llama, tiny.tiny_tokenizer(), task)


def test_as_many_shots_as_examples_leave_none_for_the_item_itself(llama: Decoder, tmp_path: Path) -> None:
    task = LanguageTask(path=str(write_task(tmp_path)), shots=9)
    with pytest.raises(EvaluationError, match="lm-eval cannot run task task"):
        score_language_task(llama, tiny.tiny_tokenizer(), task)


@pytest.mark.parametrize(
    "fields", [{}, {"name": "a", "path": "b"}, {"name": "a", "limit": 0}, {"name": "a", "shots": -1}]
)
def test_a_task_is_named_in_one_way(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LanguageTask(**fields)


def test_importing_this_module_does_not_import_lm_eval() -> None:
    code = (
        "import sys, covercal.language_tasks, tasks.language_tasks; "
        "sys.exit(any(m in sys.modules for m in ('lm_eval', 'torch', 'datasets', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["last_word", "pages"])
def test_a_broken_model_is_an_error_and_no_score(kind: str, tmp_path: Path) -> None:
    model = tiny.tiny_model()
    model.lm_head.weight.data[5] = float("nan")
    task = LanguageTask(path=str(write_task(tmp_path, KINDS[kind])), limit=3)
    with pytest.raises(EvaluationError, match=f"The model gives nan on item 0 of {kind}: it is broken"):
        score_language_task(make_decoder(model), tiny.tiny_tokenizer(), task)


def test_a_perplexity_beyond_all_numbers_is_an_error(tmp_path: Path) -> None:
    model = tiny.tiny_model()
    model.lm_head.weight.data *= 1e4
    task = LanguageTask(path=str(write_task(tmp_path, LAST_WORD)), limit=3)
    with pytest.raises(EvaluationError, match="lm-eval cannot run task task: math range error"):
        score_language_task(make_decoder(model), tiny.tiny_tokenizer(), task)
