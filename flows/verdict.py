"""What a run was worth, in sentences that say what is noise."""

from collections.abc import Sequence
from typing import Any

from covercal.recipe import Recipe, Require, short_names

LEVEL = 0.05  # a correlation with a larger p-value is called none


def verdict(recipe: Recipe, summary: dict[str, Any]) -> str:
    """Return what came out, and whether choosing the samples was worth anything, in one or two sentences."""
    texts = summary["evaluation"]
    text = next((each for each in texts if each["kind"] == "divergence"), texts[0] if texts else None)
    if text is None:
        return _of_tasks(summary["tasks"])
    measure = "divergence" if text["kind"] == "divergence" else "loss"
    shown = "divergence" if text["kind"] == "divergence" else "perplexity"
    words = "KL to the original" if shown == "divergence" else f"perplexity on {text['text']}"
    nearest, run = text["nearest"]["all"][shown], text["run"]["all"][shown]
    settings = recipe.quantization
    result = (
        f"{settings.method} at {settings.bits} bits: {words} {_number(run)}, rounding to nearest {_number(nearest)}"
    )
    if shown == "perplexity":
        result += f", original {_number(text['original']['all'][shown])}"
    if "random" not in text["differences"]:
        return f"{result}."
    return f"{result}. {_of_choice(recipe, text, measure, shown)}"


def _of_choice(recipe: Recipe, text: dict[str, Any], measure: str, shown: str) -> str:
    """Return whether the chosen samples did better than random ones, by the interval of the paired difference."""
    selection, random = recipe.selection, text["random"]
    ours, theirs = text["run"]["all"][shown], random["all"][shown]
    sets = len(random["seeds"])
    rivals = f"{selection.budget} random samples" if sets == 1 else f"{sets} random sets of {selection.budget}"
    found = text["differences"]["random"][measure]
    share = f"{abs(ours / theirs - 1.0):.1%} " if theirs else ""
    start = f"Chosen by {selection.selector}: {share}{'below' if ours <= theirs else 'above'} {rivals}"
    start += f" ({_number(theirs)})"
    if ours == theirs:
        return f"Chosen by {selection.selector}: the same as {rivals}."
    if found["low"] is None or found["high"] is None:
        return f"{start}; so few sequences say nothing about noise."
    if found["low"] <= 0.0 <= found["high"]:
        return f"{start}, which is within the noise."
    if sets == 1:
        return f"{start}, more than the noise of the text; other random sets may differ more."
    beaten = sum(ours < value for value in random["values"])
    if 0 < beaten < sets:
        return f"{start}, more than the noise of the text, but within the spread of the sets: below {beaten} of them."
    return f"{start}, more than the noise of the text, and {'below' if beaten else 'above'} each of them."


def _of_tasks(tasks: Sequence[dict[str, Any]]) -> str:
    scored = [each for each in tasks if "run" in each["scores"] and "original" in each["scores"]]
    if not scored:
        return (
            "Nothing was evaluated: the recipe's `evaluation:` is empty." if not tasks else "No task could be scored."
        )
    lines = [
        f"{each['task']} {each['scores']['run']['value']:.3f} (original {each['scores']['original']['value']:.3f})"
        for each in scored
    ]
    return "; ".join(lines) + "."


def sweep_verdict(recipe: Recipe, rows: Sequence[dict[str, Any]], failed: int, failed_tasks: int) -> str:
    """Return which selectors did better than random choice of the same size by more than noise.

    Parameters
    ----------
    recipe
        That was swept.
    rows
        Of the sweep's table: fields, mean, difference from random choice, its interval, and the mean of random choice
        that it is a difference from (None where not known); and the mean of every task.
    failed, failed_tasks
        Cells that came to nothing, and tasks that could not be scored in the others.
    """
    counts = {"cell": failed, "task": failed_tasks}
    lost = [f"{count} {what}{'s' * (count != 1)} failed." for what, count in counts.items() if count]
    return " ".join([_of_rows(rows), *lost, *not_judged(recipe)])


def not_judged(recipe: Recipe) -> list[str]:
    """Return the sentence that a sweep owes a recipe with a quality bar."""
    asked = recipe.require != Require()
    return ["A sweep does not judge what `require` asks for; `covercal run` does."] if asked else []


def _of_rows(rows: Sequence[dict[str, Any]]) -> str:
    compared = [row for row in rows if row["difference"] is not None and row["difference_interval"] is not None]
    measured = [row for row in rows if row["mean"] is not None]
    if not rows:
        return "No cell came to a result."
    if not measured:
        return _of_swept_tasks(rows)
    if not compared:
        best = min(measured, key=lambda row: float(row["mean"]))
        return f"Lowest: {_row_words(best)} ({_number(best['mean'])}); nothing says how much of it is noise."
    clear = [row for row in compared if abs(row["difference"]) > row["difference_interval"]]
    better = sorted((row for row in clear if row["difference"] < 0), key=_change)
    worse = [row for row in clear if row["difference"] > 0]
    count = f"By more than noise, {len(better)} of {len(compared)} rows are better than random choice of the same size "
    count += f"and {len(worse)} worse (95% intervals; of rows without a difference chance alone shows one in 20)"
    if better:
        count += f"; the largest gain: {_row_words(better[0])}, {_change(better[0]):+.1%}"
    elif len(compared) > 1:
        count += "; choosing made no difference that can be shown"
    return f"{count}."


def _of_swept_tasks(rows: Sequence[dict[str, Any]]) -> str:
    """Return the best row on every task, of rows that nothing was measured for on texts."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        for name, task in row["tasks"].items():
            sign = 1 if task["higher_is_better"] else -1
            if name not in best or sign * (task["mean"] - best[name]["tasks"][name]["mean"]) > 0:
                best[name] = row
    if not best:
        return "Nothing was measured: no text of the recipe's `evaluation:`, and no task."
    said = [f"{name} {_number(row['tasks'][name]['mean'])} ({_row_words(row)})" for name, row in best.items()]
    return f"Best by task: {'; '.join(said)}; nothing says how much of it is noise."


def _change(row: dict[str, Any]) -> float:
    """Return the difference from random choice as a share of it."""
    return float(row["difference"]) / float(row["random_mean"])


def _row_words(row: dict[str, Any]) -> str:
    short = short_names(row["fields"])
    return ", ".join(f"{short[name]} {value}" for name, value in row["fields"].items())


def explanation(linears: Sequence[dict[str, Any]], correlation: tuple[float, float] | None) -> str:
    """Return whether uncovered outlier channels explain where the linears' errors are large."""
    missing = sum(row["uncovered"] > 0 for row in linears)
    if not missing:
        return "Every outlier channel is covered by the chosen samples, so what is left of the error has other causes."
    share = f"{missing} of {len(linears)} linears read outlier channels that no chosen sample fires"
    if correlation is None:
        return f"{share}; too few values differ for a correlation with the error."
    rank, p_value = correlation
    if p_value > LEVEL:
        return f"{share}; that does not explain their errors (rank correlation {rank:+.2f}, p = {p_value:.2g})."
    direction = "larger" if rank > 0 else "smaller, not larger,"
    measured = f"rank correlation {rank:+.2f}, p = {p_value:.2g}"
    return f"{share}; the more weight is missed, the {direction} is the error ({measured})."


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
