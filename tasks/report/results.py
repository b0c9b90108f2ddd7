"""The tables of numbers of a run's page, as text: what was measured, its interval, and how a difference reads."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tasks.report.figure import Summary
from tasks.report.numerals import (
    MISSING,
    alike,
    decimals,
    duration,
    half_width,
    known,
    number,
    one_line,
    percent,
    percent_span,
    probability,
    size,
    span,
)

RIVALS = ("nearest", "random", "original")  # what a run is compared with, in the order of the columns


@dataclass(frozen=True, slots=True)
class Value:
    """A measure of one model as text, its 95% interval (empty: not known), and a remark."""

    text: str
    interval: str = ""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """A run less another model.

    Attributes
    ----------
    text, interval, probability
        Mean paired difference, its 95% interval and its p-value, each empty where not known.
    reading
        `lower` or `higher` where the interval excludes zero, `noise` where it does not, `not known` without interval.
    verdict
        `better` or `worse` where the reading says that it is, else empty.
    """

    text: str
    interval: str
    probability: str
    reading: str
    verdict: str


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One measure of every model, by the model's id, and this run's differences, by the rival's id."""

    name: str
    remark: str
    values: Mapping[str, Value]
    differences: Mapping[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ResultGroup:
    """Rows under one heading, such as those of one text; an empty heading is not shown."""

    name: str
    rows: list[ResultRow]


def difference(found: Mapping[str, Any] | None, higher_is_better: bool, share: bool = False) -> Difference | None:
    """Return a difference of the summary in words; None where there is none."""
    if not found or not known(found.get("mean")):
        return None
    mean, low, high = found["mean"], found.get("low"), found.get("high")
    reading, verdict = "not known", ""
    if known(low) and known(high):
        reading = "lower" if high < 0 else "higher" if low > 0 else "noise"
        if reading != "noise":
            verdict = "better" if (reading == "higher") == higher_is_better else "worse"
    if share:
        text, interval = percent(mean, sign=True), percent_span(low, high, sign=True)
    else:
        digits = decimals(max(abs(each) for each in (mean, low, high) if known(each))) or 4
        text, interval = alike(mean, digits, sign=True), span(low, high, sign=True, digits=digits)
    return Difference(
        text, "" if interval == MISSING else interval, probability(found.get("p_value")), reading, verdict
    )


def result_groups(summary: Summary) -> list[ResultGroup]:
    """Return the rows of the result table: every text's measures, then coverage and size."""
    models = [each["id"] for each in summary.get("models") or ()]
    groups = [ResultGroup(_text_name(text), _text_rows(text, models)) for text in summary.get("evaluation") or ()]
    rows = [*_coverage_rows(summary.get("selection") or {}), *_size_rows(summary.get("quantization") or {})]
    return [*groups, *([ResultGroup("The choice and the checkpoint", rows)] if rows else [])]


def _text_rows(text: Mapping[str, Any], models: list[str]) -> list[ResultRow]:
    measures: list[tuple[str, str, Callable[..., Value], bool]] = []
    if text["kind"] == "divergence":
        measures = [
            ("divergence", "KL to the original, nats per token", _plain, False),
            ("agreement", "Same top token as the original", _share, True),
        ]
    measures += [("perplexity", "Perplexity", _perplexity, False), ("loss", "Loss, nats per token", _plain, False)]
    rows = []
    for measure, name, shown, higher_is_better in measures:
        values = {m: shown(text[m]["all"], measure) for m in models if m in text}
        if measure == "divergence":
            values = {**values, **({"original": Value("0")} if "original" in values else {})}
            values.update({m: _with_seeds(v, text[m]) for m, v in values.items() if text[m].get("values")})
        if measure == "agreement" and "original" in values:
            values["original"] = Value("100%")
        found = {
            rival: known_difference
            for rival in RIVALS
            if (
                known_difference := difference(
                    ((text.get("differences") or {}).get(rival) or {}).get(measure),
                    higher_is_better,
                    share=measure == "agreement",
                )
            )
        }
        if measure != "loss" or found:  # alone, the loss says no more than the perplexity
            rows.append(ResultRow(name, "", values, found))
    return rows


def _text_name(text: Mapping[str, Any]) -> str:
    scores = text["run"]["all"]
    remark = one_line(text["text"], 60)
    if known(scores.get("sequences")) and known(scores.get("tokens")):
        remark += f", {scores['sequences']:,} sequences, {scores['tokens']:,} tokens"
    return remark


def _plain(scores: Mapping[str, Any], measure: str) -> Value:
    value, half = scores.get(measure), half_width(scores.get(f"{measure}_error"), scores.get("sequences"))
    if not known(value) or not known(half):
        return Value(number(value))
    digits = decimals(float(value or 0.0)) or 4
    return Value(number(value), span(value - half, value + half, digits=digits))


def _share(scores: Mapping[str, Any], measure: str) -> Value:
    value, half = scores.get(measure), half_width(scores.get(f"{measure}_error"), scores.get("sequences"))
    if not known(value) or not known(half):
        return Value(percent(value))
    return Value(percent(value), percent_span(max(0.0, value - half), min(1.0, value + half)))


def _perplexity(scores: Mapping[str, Any], measure: str) -> Value:
    """Return perplexity with the interval of the loss carried through the exponential."""
    value, loss = scores.get(measure), scores.get("loss")
    half = half_width(scores.get("loss_error"), scores.get("sequences"))
    if not (known(value) and known(loss) and known(half)):
        return Value(number(value))
    factor = math.exp(min(half, 50.0))
    return Value(number(value), span(value / factor, value * factor, digits=decimals(value)))


def _with_seeds(value: Value, scores: Mapping[str, Any]) -> Value:
    each = [float(v) for v in scores["values"] if known(v)]
    if len(each) < 2:
        return value
    digits = max(map(decimals, each))
    return Value(
        value.text,
        value.interval,
        f"{len(each)} seeds: {span(min(each), max(each), digits=digits)}".replace(" to ", "\u00a0to\u00a0"),
    )


def _coverage_rows(selection: Mapping[str, Any]) -> list[ResultRow]:
    rows = []
    for name, measure in (("Outlier weight covered", "weighted_coverage"), ("Outlier channels covered", "coverage")):
        if known(selection.get(measure)):
            values = {"run": Value(percent(selection[measure]))}
            if known(selection.get(f"random_{measure}")):
                values["random"] = Value(percent(selection[f"random_{measure}"]), remark="on average")
            rows.append(ResultRow(name, f"{selection['budget']:,} samples", values))
    return rows


def _size_rows(quantization: Mapping[str, Any]) -> list[ResultRow]:
    if not known(quantization.get("bytes")):
        return []
    now = Value(size(quantization["bytes"]))
    before = Value(size(quantization.get("original_bytes_16_bit")), remark="at 16 bits")
    nearest = Value(size(quantization.get("nearest_bytes")))
    return [ResultRow("Size on disk", "", {"original": before, "nearest": nearest, "random": now, "run": now})]


@dataclass(frozen=True, slots=True)
class Fact:
    """A number of the first screen: what it is, the number, what to hold it against."""

    name: str
    text: str
    beside: tuple[str, ...]


def facts(summary: Summary) -> list[Fact]:
    """Return the few numbers that the page begins with."""
    found = [*_quality_fact(summary), *_coverage_fact(summary.get("selection") or {})]
    quantization = summary.get("quantization") or {}
    if known(quantization.get("bytes")) and known(quantization.get("original_bytes_16_bit")):
        before, now = quantization["original_bytes_16_bit"], quantization["bytes"]
        found.append(Fact("Size on disk", size(now), (f"{percent(now / before, digits=0)} of {size(before)}",)))
    if known(summary.get("seconds")):
        stages = summary.get("stages") or ()
        hits = sum(stage["decision"] == "hit" for stage in stages)
        found.append(
            Fact("Time of this run", duration(summary["seconds"]), (f"{hits} of {len(stages)} stages cached",))
        )
    return found


def _quality_fact(summary: Summary) -> list[Fact]:
    texts = summary.get("evaluation") or ()
    text = next((each for each in texts if each["kind"] == "divergence"), texts[0] if texts else None)
    if text is None:
        return []
    measure, name = (
        ("divergence", "KL to the original") if text["kind"] == "divergence" else ("perplexity", "Perplexity")
    )
    names = {each["id"]: each["name"] for each in summary.get("models") or ()}
    rivals = [m for m in ("nearest", "random") if m in text]
    beside = tuple(f"{one_line(names.get(m, m), 30)}: {number(text[m]['all'].get(measure))}" for m in rivals)
    return [Fact(name, number(text["run"]["all"].get(measure)), beside)]


def _coverage_fact(selection: Mapping[str, Any]) -> list[Fact]:
    if not known(selection.get("weighted_coverage")):
        return []
    beside = f"{selection['budget']:,} samples"
    if known(selection.get("random_weighted_coverage")):
        beside = f"random choice: {percent(selection['random_weighted_coverage'])}"
    return [Fact("Outlier weight covered", percent(selection["weighted_coverage"]), (beside,))]


def sweep_facts(summary: Summary) -> list[Fact]:
    """Return the few numbers that the page of a sweep begins with."""
    cells, rows = summary.get("cells") or (), summary.get("rows") or ()
    failed = sum(bool(cell.get("error")) for cell in cells)
    readings = [row_difference(row) for row in rows]
    compared = [each for each in readings if each]
    found = [Fact("Cells", f"{len(cells) - failed:,}", (f"{failed:,} failed" if failed else "none failed",))]
    if compared:
        lower = sum(each.reading == "lower" for each in compared)
        found.append(Fact("Rows better than random", f"{lower} of {len(compared)}", ("by more than the noise",)))
        higher = sum(each.reading == "higher" for each in compared)
        found.append(Fact("Rows worse than random", f"{higher} of {len(compared)}", ("by more than the noise",)))
    return [*found, Fact("Time of this sweep", duration(summary.get("seconds")), ())]


def row_difference(row: Mapping[str, Any]) -> Difference | None:
    """Return a sweep row's difference to random choice in words; None where it has none."""
    mean, half = row.get("difference"), row.get("difference_interval")
    ends = {"low": mean - half, "high": mean + half} if known(mean) and known(half) else {}
    return difference({"mean": mean, **ends}, higher_is_better=False)


def task_groups(summary: Summary) -> list[ResultGroup]:
    """Return one row for every task that ended well, under no heading."""
    rows = [_task_row(task) for task in summary.get("tasks") or () if task.get("scores")]
    return [ResultGroup("", rows)] if rows else []


def in_shares(task: Mapping[str, Any]) -> bool:
    """Return whether a task's scores are shares of its items: means of what is right or wrong."""
    values = [s["value"] for s in task["scores"].values() if known(s.get("value"))]
    return task.get("aggregation", "mean") == "mean" and all(0 <= value <= 1 for value in values)


def _task_row(task: Mapping[str, Any]) -> ResultRow:
    share = in_shares(task)
    shown = _share if share else _plain
    values = {
        m: shown({"v": s.get("value"), "v_error": s.get("error"), "sequences": task.get("items")}, "v")
        for m, s in task["scores"].items()
    }
    better = bool(task.get("higher_is_better", True))
    found = {
        rival: words
        for rival in RIVALS
        if (words := difference((task.get("differences") or {}).get(rival), better, share=share))
    }
    shots = f"{task['shots']} shots" if known(task.get("shots")) else ""
    limit = "" if task.get("limit") is None else f"the first {task['limit']:,} asked for"
    items = f"{task['items']:,} items" if known(task.get("items")) else ""
    sets = task.get("random_sets") or 1
    first = f"of {sets} random sets the first" if sets > 1 and "random" in task["scores"] else ""
    differences = (task.get("differences") or {}).values()
    tests = sorted({d["test"] for d in differences if d.get("test")})
    units = sorted({d["metric"] for d in differences if d.get("metric") not in (None, task["metric"])})
    told = [f"differences in {one_line(each, 40)}" for each in units]
    parts = (one_line(task["metric"], 40), shots, items, limit, first, *tests, *told)
    remark = "; ".join(part for part in parts if part)
    return ResultRow(one_line(task["task"], 60), remark, values, found)


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One linear: its relative errors, and the outlier channels that the chosen set misses."""

    name: str
    nearest: str
    run: str
    ratio: str
    outlier_channels: int
    uncovered: int
    uncovered_weight: str


def linear_rows(summary: Summary) -> list[LinearRow]:
    """Return the linears, the worst of this run first."""
    linears = (summary.get("layers") or {}).get("linears") or ()
    order = sorted(linears, key=lambda each: -each["run"] if known(each["run"]) else math.inf)
    return [_linear_row(each) for each in order]


def _linear_row(each: Mapping[str, Any]) -> LinearRow:
    ratio = MISSING
    if known(each["run"]) and known(each["nearest"]) and each["nearest"] > 0:
        ratio = f"{each['run'] / each['nearest']:.2f}"
    return LinearRow(
        one_line(each["name"]),
        number(each["nearest"]),
        number(each["run"]),
        ratio,
        each["outlier_channels"],
        each["uncovered"],
        percent(each["uncovered_weight"]),
    )
