"""Whether a run is as good as its recipe requires."""

from collections.abc import Iterator, Sequence
from typing import Any

from covercal.recipe import Bar, Recipe
from flows.execution import FAILED, Event

MEASURES = {
    "divergence": "the KL to the original, in nats per token,",
    "agreement": "the share of tokens with the original's top token",
    "perplexity": "the perplexity",
}


def shortcomings(recipe: Recipe, summary: dict[str, Any], events: Sequence[Event]) -> list[str]:
    """Return a sentence for all that failed on the way, and one for all that the recipe requires and the run misses."""
    failed = [f"{each.label}: {each.reason}" for each in events if each.decision == FAILED]
    below = missed(recipe, summary) if "evaluation" in summary else []
    found = [f"{len(failed)} evaluation{'s' * (len(failed) != 1)} failed; the first: {failed[0]}"] if failed else []
    return [*found, f"The run misses what its recipe requires: {'; '.join(below)}."] if below else found


def missed(recipe: Recipe, summary: dict[str, Any]) -> list[str]:
    """Return a sentence for everything that `require` asks and the run does not reach.

    A task that was to be judged and has no score is missed, too.
    """
    return [sentence for what, value, bar in _required(recipe, summary) if (sentence := _sentence(what, value, bar))]


def _required(recipe: Recipe, summary: dict[str, Any]) -> Iterator[tuple[str, float | None, Bar]]:
    """Yield what is required, what the run reached (None: nothing), and the bar."""
    for measure, words in MEASURES.items():
        bar = getattr(recipe.require, measure)
        for text in summary["evaluation"] if bar is not None else ():
            if measure in text["run"]["all"]:
                yield f"{words} on {text['text']}", text["run"]["all"][measure], bar
    found = [(each["task"], each["scores"].get("run", {}).get("value")) for each in summary["tasks"]]
    for name, bar in recipe.require.tasks.items():
        for value in [value for task, value in found if task == name] or [None]:
            yield f"task {name}", value, bar


def _sentence(what: str, value: float | None, bar: Bar) -> str:
    if value is None:
        return f"{what} has no score; require asks for {_words(bar)}"
    below = bar.min is not None and not value >= bar.min
    above = bar.max is not None and not value <= bar.max
    return f"{what} is {value:.4g}; require asks for {_words(bar)}" if below or above else ""


def _words(bar: Bar) -> str:
    words = [] if bar.min is None else [f"at least {bar.min:g}"]
    return " and ".join(words if bar.max is None else [*words, f"at most {bar.max:g}"])
