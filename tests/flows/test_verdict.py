"""The sentences about a run: what they claim must follow from the intervals."""

from pathlib import Path
from typing import Any

import pytest

from covercal.recipe import Recipe, parse_recipe
from flows.verdict import explanation, sweep_verdict, verdict

RECIPE = {"model": {"source": "m"}, "pool": {"sources": [{"path": "p"}]}, "selection": {"budget": 32}}


def recipe(**selection: Any) -> Recipe:
    return parse_recipe({**RECIPE, "selection": {"budget": 32, **selection}}, Path("/"))


def text(
    low: float | None,
    high: float | None,
    *,
    run: float = 0.4,
    kind: str = "divergence",
    seeds: int = 1,
    values: Any = None,
) -> Any:
    measure = "divergence" if kind == "divergence" else "loss"
    scores = {"original": 0.0, "nearest": 1.3, "random": 0.5, "run": run}
    value = {name: {"all": {"divergence": kl, "perplexity": 20 * (1 + kl)}} for name, kl in scores.items()}
    difference = {"mean": run - 0.5, "low": low, "high": high, "p_value": 0.01}
    value["random"] |= {"seeds": list(range(seeds)), "values": [0.5] * seeds if values is None else values}
    return {
        "text": "held.jsonl",
        "kind": kind,
        **value,
        "differences": {"nearest": {}, "random": {measure: difference}},
    }


def summary(*texts: Any, tasks: Any = ()) -> dict[str, Any]:
    return {"evaluation": list(texts), "tasks": list(tasks)}


def test_a_difference_whose_interval_holds_zero_is_noise() -> None:
    words = verdict(recipe(), summary(text(-0.2, 0.01)))
    assert "within the noise" in words
    assert "20.0% below 32 random samples (0.5)" in words


@pytest.mark.parametrize(
    ("low", "high", "run", "word"), [(-0.2, -0.01, 0.4, "20.0% below"), (0.01, 0.2, 0.6, "20.0% above")]
)
def test_a_difference_whose_interval_leaves_zero_out_is_told_with_its_sign(
    low: float, high: float, run: float, word: str
) -> None:
    words = verdict(recipe(), summary(text(low, high, run=run)))
    assert word in words
    assert "within the noise" not in words


def test_one_random_set_is_not_called_the_noise_of_random_sets() -> None:
    assert "other random sets may differ" in verdict(recipe(), summary(text(-0.2, -0.01)))
    assert "other random sets may differ" not in verdict(recipe(), summary(text(-0.2, -0.01, seeds=5)))
    assert "5 random sets of 32" in verdict(recipe(), summary(text(-0.2, -0.01, seeds=5)))


@pytest.mark.parametrize(
    ("run", "values", "words"),
    [
        (0.4, [0.41, 0.5, 0.6], "more than the noise of the text, and below each of them."),
        (0.6, [0.41, 0.5, 0.59], "more than the noise of the text, and above each of them."),
        (0.4, [0.39, 0.5, 0.6], "but within the spread of the sets: below 2 of them."),
    ],
)
def test_several_random_sets_are_beaten_only_when_each_is(run: float, values: list[float], words: str) -> None:
    sign = 1 if run > 0.5 else -1
    low, high = sorted((sign * 0.2, sign * 0.01))
    assert verdict(recipe(), summary(text(low, high, run=run, seeds=3, values=values))).endswith(words)


def test_a_few_sequences_have_no_interval_and_no_claim() -> None:
    words = verdict(recipe(), summary(text(None, None)))
    assert "more than the noise" not in words
    assert "so few sequences" in words


def test_random_samples_that_lose_nothing_are_no_divisor() -> None:
    exact = text(0.0, 0.0, run=0.0)
    exact["random"]["all"]["divergence"] = 0.0
    assert verdict(recipe(), summary(exact)).endswith("Chosen by coverage: the same as 32 random samples.")
    exact["run"]["all"]["divergence"] = 0.1
    assert "above 32 random samples (0), which is" in verdict(recipe(), summary(exact))


def test_divergence_speaks_before_perplexity() -> None:
    words = verdict(recipe(), summary(text(-1, 1, kind="perplexity"), text(-0.2, 0.01)))
    assert "KL to the original 0.4" in words
    assert "perplexity" not in words


def test_a_run_with_perplexity_alone_names_the_text_and_the_original() -> None:
    words = verdict(recipe(), summary(text(-0.2, -0.01, kind="perplexity")))
    assert "perplexity on held.jsonl 28, rounding to nearest 46, original 20" in words
    assert "below" in words


def test_without_a_rival_nothing_is_said_of_the_choice() -> None:
    without = text(-0.2, -0.01)
    del without["random"], without["differences"]["random"]
    assert "Chosen" not in verdict(recipe(), summary(without))


def test_tasks_speak_where_there_are_no_texts() -> None:
    task = {"task": "arc", "scores": {"original": {"value": 0.4}, "run": {"value": 0.38}}}
    assert verdict(recipe(), summary(tasks=[task])) == "arc 0.380 (original 0.400)."
    assert "No task" in verdict(recipe(), summary(tasks=[{"task": "arc", "scores": {}}]))
    assert "empty" in verdict(recipe(), summary())


def row(name: str, mean: float | None, difference: float | None, interval: float | None) -> dict[str, Any]:
    fields = {"selection.selector": name, "selection.budget": 8}
    random = None if mean is None or difference is None else mean - difference
    value = {"fields": fields, "mean": mean, "difference": difference, "difference_interval": interval}
    return {**value, "random_mean": random, "tasks": {}}


def test_a_sweep_counts_only_what_is_more_than_noise() -> None:
    rows = [
        row("random", 1.0, None, None),
        row("a", 0.9, -0.1, 0.05),
        row("b", 0.97, -0.03, 0.05),
        row("c", 1.2, 0.2, 0.1),
    ]
    words = sweep_verdict(recipe(), rows, 0, 0)
    assert words.startswith(
        "By more than noise, 1 of 3 rows are better than random choice of the same size and 1 worse"
    )
    assert "selector a, budget 8, -10.0%" in words
    assert "failed" not in words
    assert "2 cells failed" in sweep_verdict(recipe(), rows, 2, 0)


def test_the_largest_gain_is_a_share_of_random_choice_over_the_pools_that_both_have() -> None:
    of_three_pools = {**row("a", 1.6, -0.1, 0.05), "random_mean": 1.0}  # and random choice has the two easy ones only
    rows = [row("random", 1.0, None, None), of_three_pools]
    assert "selector a, budget 8, -10.0%" in sweep_verdict(recipe(), rows, 0, 0)


def test_a_sweep_without_random_choice_claims_nothing() -> None:
    words = sweep_verdict(recipe(), [row("a", 0.9, None, None), row("b", 0.8, None, None)], 0, 0)
    assert words.startswith("Lowest: selector b")
    assert "nothing says how much of it is noise" in words


def test_a_row_without_a_number_loses_none_of_the_others() -> None:
    rows = [row("a", None, None, None), row("b", 0.8, None, None)]
    assert sweep_verdict(recipe(), rows, 0, 0).startswith("Lowest: selector b")
    assert "Nothing was measured" in sweep_verdict(recipe(), rows[:1], 0, 0)


def test_a_sweep_of_tasks_alone_names_the_best_row_of_each() -> None:
    scored = {"a": (0.3, 12.0), "b": (0.4, 15.0)}
    rows = [
        {
            **row(name, None, None, None),
            "tasks": {
                "arc": {"mean": accuracy, "higher_is_better": True},
                "wikitext": {"mean": perplexity, "higher_is_better": False},
            },
        }
        for name, (accuracy, perplexity) in scored.items()
    ]
    assert sweep_verdict(recipe(), rows, 0, 1) == (
        "Best by task: arc 0.4 (selector b, budget 8); wikitext 12 (selector a, budget 8); nothing says how much of it "
        "is noise. 1 task failed."
    )


def test_a_sweep_says_that_it_does_not_judge_what_is_required() -> None:
    asked = parse_recipe(
        {**RECIPE, "evaluation": {"divergence": [{"path": "p"}]}, "require": {"divergence": {"max": 1}}}, Path("/")
    )
    assert "A sweep does not judge what `require` asks for" in sweep_verdict(asked, [], 0, 0)
    assert "require" not in sweep_verdict(recipe(), [], 0, 0)


def linear(uncovered: int) -> dict[str, Any]:
    return {"uncovered": uncovered}


def test_full_coverage_explains_nothing() -> None:
    assert "Every outlier channel is covered" in explanation([linear(0)] * 4, None)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((0.6, 0.001), "the larger is the error"),
        ((-0.6, 0.001), "smaller, not larger"),
        ((0.1, 0.4), "does not explain"),
    ],
)
def test_a_correlation_is_told_with_its_direction_and_only_when_it_is_one(
    found: tuple[float, float], words: str
) -> None:
    assert words in explanation([linear(1), linear(0)], found)
    assert "1 of 2 linears" in explanation([linear(1), linear(0)], found)
