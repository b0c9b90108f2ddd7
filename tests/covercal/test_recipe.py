import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from covercal.errors import InputError
from covercal.quantization_settings import PRESETS
from covercal.recipe import (
    Bar,
    DivergenceText,
    Evaluation,
    LanguageTask,
    Model,
    Outliers,
    PerplexityText,
    Pool,
    Quantization,
    Recipe,
    Report,
    Selection,
    Statistics,
    TextSource,
    load_recipe,
    parse_recipe,
    plain,
    short_names,
)
from covercal.selectors.registry import SELECTORS
from covercal.thresholds import RULES, WEIGHTINGS

FOLDER = Path("/recipes")
SMALLEST: dict[str, Any] = {"model": {"source": "owner/model"}, "pool": {"sources": [{"path": "pool.jsonl"}]}}
SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "model": Model,
    "pool": Pool,
    "pool.sources.0": TextSource,
    "statistics": Statistics,
    "outliers": Outliers,
    "selection": Selection,
    "quantization": Quantization,
    "evaluation": Evaluation,
    "evaluation.perplexity.0": PerplexityText,
    "evaluation.divergence.0": DivergenceText,
    "evaluation.tasks.0": LanguageTask,
    "report": Report,
}
FIELDS = [(section, name) for section, model in SECTIONS.items() for name in model.model_fields]


def with_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a small recipe with one text of each kind and these dotted fields."""
    value = deepcopy(SMALLEST)
    value["evaluation"] = {
        "perplexity": [{"path": "a.txt"}],
        "divergence": [{"path": "a.jsonl"}, {"path": "b.jsonl"}],
        "tasks": [{"name": "arc_challenge"}],
    }
    for path, wanted in fields.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        here: Any = value
        for part in parents:
            here = here[part] if isinstance(part, int) else here.setdefault(part, {})
        here[last] = wanted
    return value


def recipe(**fields: Any) -> Recipe:
    """Return the recipe with these fields, `__` for the dot."""
    return parse_recipe(with_fields({name.replace("__", "."): value for name, value in fields.items()}), FOLDER)


def complaint(value: dict[str, Any]) -> str:
    """Return what is said of a wrong recipe."""
    with pytest.raises(InputError) as caught:
        parse_recipe(value, FOLDER, "run.yaml")
    return str(caught.value)


def written(folder: Path, value: dict[str, Any]) -> Path:
    """Write a recipe as YAML."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path


# --- defaults ------------------------------------------------------------------------------------------------------


def test_a_model_and_texts_are_enough_and_the_rest_is_as_documented() -> None:
    assert parse_recipe(SMALLEST, FOLDER).model_dump() == {
        "model": {"source": "owner/model", "revision": None, "dtype": "bfloat16", "trust_remote_code": False},
        "device": "auto",
        "pool": {
            "sources": (
                {
                    "path": "/recipes/pool.jsonl",
                    "hub": None,
                    "config": None,
                    "split": "train",
                    "revision": None,
                    "text": "text",
                    "domain": None,
                    "rows": None,
                },
            ),
            "sequence_length": 256,
            "packing": "join",
            "samples": 512,
            "seed": 0,
        },
        "statistics": {"sites": "linear_inputs", "skip_tokens": 1, "shard_samples": 64},
        "outliers": {"rule": "sigma", "k": 6.0, "weighting": "full", "adaptive": False, "adaptive_k": 4.0},
        "selection": {"selector": "coverage", "budget": 64, "seed": 0, "samples": ()},
        "quantization": {
            "method": "covercal",
            "bits": 4,
            "group_size": 128,
            "symmetric": False,
            "activation_order": True,
            "ranges": {"search": "output", "shrink": 0.5, "steps": 20, "refit": 3},
            "scaling": {
                "search": "none",
                "loss": "linear",
                "steps": 20,
                "regularization": "none",
                "strength": 0.5,
                "power": 0.5,
            },
            "gram": {
                "source": "calibration",
                "pool_share": 0.5,
                "weight": "token",
                "prefixes": (),
                "expert_tokens": 32,
            },
            "shrinkage": {"strength": 0.25, "towards": "own"},
            "damping": {"strength": 0.01, "weights": "uniform", "gamma": "validated"},
            "target": {"kind": "coreq", "alpha": "closed_form"},
            "rounding": {"kind": "sequential", "width": 4, "polish": 2},
            "salient": {"share": 0.0, "bits": 4, "scope": "tensor", "clip": 1.0},
            "activations": {
                "kind": "none",
                "bits": 8,
                "ranges": "min_max",
                "percentile": 99.99,
                "source": "calibration",
            },
            "storage_dtype": "auto",
        },
        "evaluation": {
            "perplexity": (),
            "divergence": (),
            "tasks": (),
            "task_models": ("original", "nearest", "random", "run"),
            "random": 1,
            "layers": 8,
        },
        "require": {"divergence": None, "agreement": None, "perplexity": None, "tasks": {}},
        "report": {"selectors": None},
        "sweep": {},
    }


def test_a_task_runs_whole_with_its_own_shots_and_lm_evals_seed() -> None:
    value = {**SMALLEST, "evaluation": {"tasks": [{"name": "arc_challenge"}, {"path": "tasks/mine.yaml"}]}}
    named, own = parse_recipe(value, FOLDER).evaluation.tasks
    assert named.model_dump() == {"name": "arc_challenge", "path": None, "limit": None, "shots": None, "seed": 1234}
    assert own.path == "/recipes/tasks/mine.yaml"
    assert (named.called, own.called) == ("arc_challenge", "mine")


@pytest.mark.parametrize("task", [{}, {"name": "arc_challenge", "path": "mine.yaml"}])
def test_a_task_is_named_in_one_way(task: dict[str, Any]) -> None:
    said = complaint({**SMALLEST, "evaluation": {"tasks": [task]}})
    assert "evaluation.tasks.0: give either `name`, a task of lm-eval, or `path`, a task YAML" in said.replace(
        "`: ", ": "
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("limit", 0, "`evaluation.tasks.0.limit`: Input should be greater than or equal to 1"),
        ("shots", -1, "`evaluation.tasks.0.shots`: Input should be greater than or equal to 0"),
        ("seed", -1, "`evaluation.tasks.0.seed`: Input should be greater than or equal to 0"),
        ("shot", 5, "there is no field `evaluation.tasks.0.shot`; did you mean `evaluation.tasks.0.shots`?"),
    ],
)
def test_a_wrong_field_of_a_task_is_named(field: str, value: int, message: str) -> None:
    assert message in complaint({**SMALLEST, "evaluation": {"tasks": [{"name": "arc_challenge", field: value}]}})


def test_windows_and_limits_of_evaluation_texts_are_as_documented() -> None:
    evaluation = recipe().evaluation
    assert (evaluation.perplexity[0].window, evaluation.perplexity[0].limit) == (2048, None)
    assert (evaluation.divergence[0].window, evaluation.divergence[0].limit) == (512, 24)


def test_code_that_comes_with_a_model_stays_off() -> None:
    assert parse_recipe(SMALLEST, FOLDER).model.trust_remote_code is False


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe().selection.budget = 3


def test_one_length_and_a_list_of_lengths_are_both_read_as_lengths() -> None:
    assert recipe(pool__sequence_length=32).pool.lengths == (32,)
    assert recipe(pool__sequence_length=[32, 64]).pool.lengths == (32, 64)


def test_evaluation_texts_come_first_for_perplexity_and_then_for_divergence() -> None:
    names = [Path(str(text.path)).name for text in recipe().evaluation.texts]
    assert names == ["a.txt", "a.jsonl", "b.jsonl"]


# --- unknown names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("pool.sampels", "pool.samples"),
        ("modle", "model"),
        ("statistics.skip_token", "statistics.skip_tokens"),
        ("quantization.groupsize", "quantization.group_size"),
        ("selection.bugdet", "selection.budget"),
        ("pool.sources.0.txt", "pool.sources.0.text"),
        ("evaluation.divergence.0.windwo", "evaluation.divergence.0.window"),
        ("evaluation.divergence.1.limits", "evaluation.divergence.1.limit"),
        ("evaluation.perplexity.0.pth", "evaluation.perplexity.0.path"),
    ],
)
def test_an_unknown_field_names_the_nearest_valid_one(misspelt: str, meant: str) -> None:
    assert f"there is no field `{misspelt}`; did you mean `{meant}`?" in complaint(with_fields({misspelt: 1}))


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=lambda part: part or "recipe")
def test_every_field_is_suggested_for_its_own_misspelling(section: str, name: str) -> None:
    full = f"{section}.{name}" if section else name
    assert f"did you mean `{full}`?" in complaint(with_fields({f"{full}x": 1}))


@pytest.mark.parametrize(
    ("section", "model"), [(section, model) for section, model in SECTIONS.items() if section], ids=lambda part: part
)
def test_a_name_near_to_nothing_lists_the_valid_fields_of_its_section(section: str, model: type[BaseModel]) -> None:
    said = complaint(with_fields({f"{section}.ZQJ": 1}))
    assert f"there is no field `{section}.ZQJ`; valid: {', '.join(model.model_fields)}" in said


@pytest.mark.parametrize("name", ["auto", "int"])
@pytest.mark.parametrize("section", ["", "pool", "quantization"])
def test_an_unknown_field_called_like_a_type_is_named_too(section: str, name: str) -> None:
    full = f"{section}.{name}" if section else name
    assert f"there is no field `{full}`" in complaint(with_fields({full: 1}))


@pytest.mark.parametrize(
    ("fields", "sentences"),
    [
        (
            {"require.tasks": {"arc": {"maxx": 0.3}}},
            ["there is no field `require.tasks.arc.maxx`; did you mean `require.tasks.arc.max`?"],
        ),
        (
            {"require.tasks": {"arc": {"max": "much"}, "piqa": {}}},
            [
                "`require.tasks.arc.max`: Input should be a valid number",
                "`require.tasks.piqa`: give `max`, `min` or both",
            ],
        ),
        ({"require.tasks": {3: {"max": 1}}}, ["`require.tasks.3`: Input should be a valid string (got 3)"]),
        (
            {"sweep": {"selection.budget": 8, "selection.seed": 3}},
            [
                "`sweep.selection.budget`: Input should be a valid tuple (got 8)",
                "`sweep.selection.seed`: Input should be",
            ],
        ),
    ],
)
def test_an_entry_of_a_mapping_is_named_by_its_key(fields: dict[str, Any], sentences: list[str]) -> None:
    said = complaint(with_fields(fields))
    assert all(each in said for each in sentences)


def test_all_faults_are_named_at_once() -> None:
    said = complaint(with_fields({"pool.sampels": 8, "quantization.bits": 1, "outliers.k": -1}))
    assert all(field in said for field in ("`pool.sampels`", "`quantization.bits`", "`outliers.k`"))


def test_a_complaint_names_the_recipe() -> None:
    assert complaint(with_fields({"pool.sampels": 8})).startswith("Recipe run.yaml: ")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("covrage", "coverage"), ("Random", "random"), ("rand", "random"), ("max_perplexty", "max_perplexity")],
)
def test_an_unknown_selector_names_the_nearest(name: str, meant: str) -> None:
    said = complaint(with_fields({"selection.selector": name}))
    assert f"`selection.selector`: there is no selector '{name}'; did you mean '{meant}'?" in said


def test_a_selector_near_to_nothing_lists_the_known_ones() -> None:
    said = complaint(with_fields({"selection.selector": "zzz"}))
    assert f"there is no selector 'zzz'; known: {', '.join(sorted(SELECTORS))}" in said


@pytest.mark.parametrize(("name", "meant"), [("gtpq", "gptq"), ("gpt", "gptq"), ("rnt", "rtn")])
def test_an_unknown_method_names_the_nearest(name: str, meant: str) -> None:
    said = complaint(with_fields({"quantization.method": name}))
    assert f"`quantization.method`: there is no method '{name}'; did you mean '{meant}'?" in said


@pytest.mark.parametrize("field", ["selection.selector", "outliers.rule", "outliers.weighting"])
@pytest.mark.parametrize("value", [["coverage", "random"], {"name": "coverage"}, 3, None])
def test_what_is_no_name_is_refused_by_field(field: str, value: Any) -> None:
    assert f"`{field}`" in complaint(with_fields({field: value}))


@pytest.mark.parametrize(
    ("field", "kind", "name", "meant"),
    [
        ("outliers.rule", "threshold rule", "quartile", "quantile"),
        ("outliers.rule", "threshold rule", "Sigma", "sigma"),
        ("outliers.rule", "threshold rule", "medain", "median"),
        ("outliers.weighting", "weighting", "square_norm", "squared_norm"),
        ("outliers.weighting", "weighting", "unweighed", "unweighted"),
    ],
)
def test_an_unknown_rule_or_weighting_names_the_nearest(field: str, kind: str, name: str, meant: str) -> None:
    assert f"`{field}`: there is no {kind} '{name}'; did you mean '{meant}'?" in complaint(with_fields({field: name}))


@pytest.mark.parametrize(("field", "known"), [("outliers.rule", RULES), ("outliers.weighting", tuple(WEIGHTINGS))])
def test_a_rule_or_weighting_near_to_nothing_lists_the_known_ones(field: str, known: tuple[str, ...]) -> None:
    assert f"known: {', '.join(sorted(known))}" in complaint(with_fields({field: "zzz"}))


# --- values that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("pool.samples", 0, "greater than or equal to 1"),
        ("pool.samples", "many", "valid integer"),
        ("pool.samples", 3.5, "valid integer"),
        ("pool.seed", -1, "greater than or equal to 0"),
        ("pool.sequence_length", "long", "valid integer"),
        ("pool.packing", "jion", "'join' or 'separate'"),
        ("pool.sources", [], "at least 1 item"),
        ("pool.sources", "pool.jsonl", "valid tuple"),
        ("pool.sources.0", "pool.jsonl", "valid dictionary"),
        ("pool.sources.0.rows", 0, "greater than or equal to 1"),
        ("pool.sources.0.text", 3, "valid string"),
        ("model.dtype", "float64", "'float32', 'bfloat16' or 'float16'"),
        ("model.trust_remote_code", "perhaps", "valid boolean"),
        ("statistics.sites", "linears", "'linear_inputs' or 'block_inputs'"),
        ("statistics.skip_tokens", -1, "greater than or equal to 0"),
        ("statistics.shard_samples", 0, "greater than or equal to 1"),
        ("outliers.rule", "quartile", "'quantile'"),
        ("outliers.k", 0, "greater than 0"),
        ("outliers.k", float("nan"), "finite"),
        ("outliers.k", float("inf"), "finite"),
        ("outliers.weighting", "none", "unweighted"),
        ("outliers.adaptive", "perhaps", "valid boolean"),
        ("outliers.adaptive_k", 0, "greater than 0"),
        ("outliers.adaptive_k", float("inf"), "finite"),
        ("selection.samples", 3, "valid tuple"),
        ("selection.budget", 0, "greater than or equal to 1"),
        ("selection.seed", -1, "greater than or equal to 0"),
        ("quantization.bits", 1, "greater than or equal to 2"),
        ("quantization.bits", 9, "less than or equal to 8"),
        ("quantization.group_size", 0, "greater than or equal to 1"),
        ("quantization.damping.strength", -0.1, "greater than or equal to 0, or 'validated'"),
        ("quantization.damping.strength", "much", "'validated'"),
        ("quantization.storage_dtype", "int8", "'auto'"),
        ("evaluation.perplexity.0.window", 1, "greater than or equal to 2"),
        ("evaluation.divergence.0.limit", 0, "greater than or equal to 1"),
        ("evaluation.divergence.1.window", None, "valid integer"),
        ("device", 0, "valid string"),
    ],
)
def test_a_wrong_value_names_its_field_what_was_given_and_what_would_be_right(
    field: str, value: Any, right: str
) -> None:
    said = complaint(with_fields({field: value}))
    assert f"`{field}`: " in said
    assert right in said
    assert f"(got {value!r})" in said


@pytest.mark.parametrize("lengths", [1, 0, -3, [], [32, 1]])
def test_a_sequence_length_below_two_tokens_is_refused(lengths: Any) -> None:
    said = complaint(with_fields({"pool.sequence_length": lengths}))
    assert "`pool`" in said
    assert "a sequence length is at least 2 tokens" in said


@pytest.mark.parametrize(
    ("value", "missing"),
    [
        ({}, ("model", "pool")),
        ({"model": {"source": "a/b"}}, ("pool",)),
        ({"pool": {"sources": [{"path": "a.jsonl"}]}}, ("model",)),
        ({"model": {}, "pool": {}}, ("model.source", "pool.sources")),
    ],
)
def test_every_missing_section_or_field_is_named(value: dict[str, Any], missing: tuple[str, ...]) -> None:
    said = complaint(value)
    assert said.removeprefix("Recipe run.yaml: ").split("; ") == [f"field `{name}` is required" for name in missing]


@pytest.mark.parametrize("section", ["model", "pool", "statistics", "selection", "quantization", "evaluation"])
@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_a_section_that_is_no_mapping_is_refused_by_name(section: str, value: Any) -> None:
    said = complaint({**SMALLEST, section: value})
    assert f"`{section}`: " in said
    assert "dictionary" in said


def test_a_key_that_is_no_text_is_refused() -> None:
    assert "`1`" in complaint({**SMALLEST, 1: "x"})


@pytest.mark.parametrize("place", [{}, {"path": "a.jsonl", "hub": "owner/texts"}], ids=["neither", "both"])
@pytest.mark.parametrize("where", ["pool.sources.0", "evaluation.divergence.1"])
def test_a_source_with_both_or_neither_of_path_and_hub_is_refused(where: str, place: dict[str, str]) -> None:
    said = complaint(with_fields({where: {"text": "text", **place}}))
    assert f"`{where}`: give either `path` or `hub`" in said


@pytest.mark.parametrize("wrong", [{"path": "a", "txt": "b"}, {"text": "a"}, {"path": "a", "rows": 0}])
def test_one_wrong_source_is_the_only_thing_complained_of(wrong: dict[str, Any]) -> None:
    said = complaint(with_fields({"pool.sources.0": wrong}))
    assert "at least 1 item" not in said


# --- parts that must fit together ----------------------------------------------------------------------------------


def test_a_budget_larger_than_the_pool_is_refused_with_the_largest_that_fits() -> None:
    said = complaint(with_fields({"pool.samples": 8, "selection.budget": 9}))
    assert "selection.budget (9) is larger than pool.samples (8)" in said
    assert "at most 8" in said


def test_a_budget_may_be_the_whole_pool() -> None:
    assert recipe(pool__samples=8, selection__budget=8).selection.budget == 8


def test_skipping_all_tokens_of_a_sample_is_refused() -> None:
    said = complaint(with_fields({"pool.sequence_length": 16, "statistics.skip_tokens": 16}))
    assert "statistics.skip_tokens (16) leaves nothing of samples of 16 tokens" in said
    assert "pool.sequence_length" in said


def test_the_shortest_length_decides_how_many_tokens_can_be_skipped() -> None:
    assert "samples of 8 tokens" in complaint(
        with_fields({"pool.sequence_length": [64, 8], "statistics.skip_tokens": 8})
    )


def test_all_tokens_but_one_may_be_skipped() -> None:
    assert recipe(pool__sequence_length=[64, 8], statistics__skip_tokens=7).statistics.skip_tokens == 7


# --- outlier rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_goes_with_every_weighting(rule: str, weighting: str) -> None:
    found = recipe(outliers__rule=rule, outliers__k=0.5, outliers__weighting=weighting).outliers
    assert (found.rule, found.weighting, found.k) == (rule, weighting, 0.5)


@pytest.mark.parametrize("k", [1, 1.5, 6])
def test_a_quantile_of_one_or_more_is_refused_with_a_share_that_would_do(k: float) -> None:
    said = complaint(with_fields({"outliers.rule": "quantile", "outliers.k": k}))
    assert f"`outliers`: outliers.k is {k:g}; with `rule: quantile` it is a share such as 0.999" in said


def test_a_quantile_needs_a_k_of_its_own() -> None:
    assert "outliers.k is 6; with `rule: quantile`" in complaint(with_fields({"outliers.rule": "quantile"}))


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"quantile"}))
def test_other_rules_take_a_k_above_one(rule: str) -> None:
    assert recipe(outliers__rule=rule, outliers__k=20).outliers.k == 20


def test_the_lower_quantile_is_a_share_too() -> None:
    wrong = {"outliers.rule": "quantile", "outliers.k": 0.999, "outliers.adaptive": True}
    said = complaint(with_fields(wrong))
    assert "outliers.adaptive_k is 4; with `rule: quantile` it is a share such as 0.999" in said
    found = recipe(**{name.replace(".", "__"): value for name, value in wrong.items()}, outliers__adaptive_k=0.99)
    assert found.outliers.adaptive_k == 0.99


@pytest.mark.parametrize("lower", [6, 6.5, 100])
def test_a_lower_k_that_is_not_lower_is_refused(lower: float) -> None:
    said = complaint(with_fields({"outliers.adaptive": True, "outliers.adaptive_k": lower}))
    assert f"outliers.adaptive_k ({lower:g}) must be lower than outliers.k (6)" in said


def test_the_default_lower_k_has_to_be_lower_as_well() -> None:
    said = complaint(with_fields({"outliers.adaptive": True, "outliers.k": 3}))
    assert "outliers.adaptive_k (4) must be lower than outliers.k (3)" in said


@pytest.mark.parametrize("fields", [{"outliers.adaptive_k": 100}, {"outliers.rule": "quantile", "outliers.k": 0.9}])
def test_without_refinement_the_lower_k_does_not_matter(fields: dict[str, Any]) -> None:
    assert not parse_recipe(with_fields(fields), FOLDER).outliers.adaptive


def test_refinement_without_calibration_is_refused() -> None:
    said = complaint(with_fields({"outliers.adaptive": True, "quantization.method": "rtn"}))
    assert "outliers.adaptive needs the errors of a calibrated method; rtn has none" in said


def test_refinement_by_errors_that_nothing_measures_is_refused() -> None:
    said = complaint(with_fields({"outliers.adaptive": True, "quantization.method": "w8a8_static"}))
    assert "outliers.adaptive needs the errors of a calibrated method; w8a8_static has none" in said


def test_refinement_with_calibration_is_accepted() -> None:
    assert recipe(outliers__adaptive=True, quantization__method="gptq").outliers.adaptive


# --- samples in the recipe -----------------------------------------------------------------------------------------

LISTED = "selection.samples lists the samples of `selector: given`, and of no other"


def test_given_samples_keep_their_order() -> None:
    found = recipe(selection__selector="given", selection__samples=[7, 3, 11], selection__budget=2)
    assert found.selection.samples == (7, 3, 11)


def test_the_selector_given_without_samples_is_refused() -> None:
    assert LISTED in complaint(with_fields({"selection.selector": "given"}))


@pytest.mark.parametrize("selector", sorted(set(SELECTORS) - {"given"}))
def test_samples_for_another_selector_are_refused(selector: str) -> None:
    assert LISTED in complaint(with_fields({"selection.selector": selector, "selection.samples": [1]}))


def test_a_budget_above_the_given_samples_is_refused_with_both_numbers() -> None:
    given = {"selection.selector": "given", "selection.samples": [1, 2]}
    assert "selection.budget (64) is larger than the 2 samples of selection.samples" in complaint(with_fields(given))
    said = complaint(with_fields({**given, "selection.budget": 3}))
    assert "selection.budget (3) is larger than the 2 samples of selection.samples" in said


def test_a_sample_that_is_no_number_is_named_by_its_place() -> None:
    said = complaint(with_fields({"selection.selector": "given", "selection.samples": [3, 1.5], "selection.budget": 1}))
    assert "`selection.samples.1`: " in said
    assert "valid integer" in said


def test_a_sample_that_is_given_twice_is_refused() -> None:
    given = {"selection.selector": "given", "selection.samples": [1, 2, 1], "selection.budget": 1}
    assert "selection.samples names a sample twice" in complaint(with_fields(given))


@pytest.mark.parametrize("sample", [-1, 8, 100])
def test_a_given_sample_outside_the_pool_is_refused_with_those_that_are_there(sample: int) -> None:
    given = {"selection.selector": "given", "selection.samples": [0, sample, 7], "selection.budget": 1}
    said = complaint(with_fields({**given, "pool.samples": 8}))
    assert f"selection.samples names sample {sample}; the pool has 0 to 7" in said


def test_all_samples_of_the_pool_may_be_given() -> None:
    given = {"selection.selector": "given", "selection.samples": [2, 0, 1], "selection.budget": 3}
    assert parse_recipe(with_fields({**given, "pool.samples": 3}), FOLDER).selection.samples == (2, 0, 1)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_recipe_file_is_read_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {source: owner/model}\npool:\n  sources: [{path: /data/pool.jsonl}]\n  samples: 99\n")
    assert load_recipe(path).pool.samples == 99


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no recipe file .*none\.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_broken_yaml_names_the_file_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model:\n  source: a/b\npool: [1\n")
    with pytest.raises(InputError, match=r"broken\.yaml is not valid YAML[\s\S]*line 3"):
        load_recipe(path)


@pytest.mark.parametrize("value", ["2024-02-30", "0x_", "!!int x", "!!int ''", "!!bool x", "!!timestamp x", "[" * 2000])
def test_a_value_that_yaml_cannot_read_is_refused_in_a_file_and_in_an_override(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, SMALLEST)
    with pytest.raises(InputError, match=r"--set device=[\s\S]*: the value is not valid YAML: "):
        load_recipe(path, [f"device={value}"])
    path.write_text(f"device: {value}\n")
    with pytest.raises(InputError, match=r"recipe\.yaml is not valid YAML: "):
        load_recipe(path)


@pytest.mark.parametrize("content", ["", "- model\n", "model\n", "3\n"])
def test_yaml_that_is_no_mapping_is_refused_by_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"list\.yaml must be a mapping of sections such as `model:`"):
        load_recipe(path)


def test_a_recipe_that_is_not_utf_8_is_refused_by_file(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("model: {source: caf\xe9}\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.yaml cannot be read: .*utf-8"):
        load_recipe(path)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read: .*directory"):
        load_recipe(tmp_path)


def test_a_wrong_field_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, with_fields({"pool.sampels": 3}))
    with pytest.raises(InputError, match=rf"Recipe {path}: there is no field `pool.sampels`"):
        load_recipe(path)


# --- overrides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("selection.budget=16", "selection.budget", 16),
        ("selection.budget = 16", "selection.budget", 16),
        ("device=cuda:1", "device", "cuda:1"),
        ("outliers.k=2.5", "outliers.k", 2.5),
        ("quantization.group_size=null", "quantization.group_size", None),
        ("quantization.symmetric=true", "quantization.symmetric", True),
        ("pool.sequence_length=[32, 64]", "pool.sequence_length", [32, 64]),
        ("pool.sources.0.text=body", "pool.sources.0.text", "body"),
        ("pool.sources.0={path: z=1.txt}", "pool.sources.0", {"path": "z=1.txt"}),
        ("evaluation.divergence.1.window=64", "evaluation.divergence.1.window", 64),
        ("evaluation={}", "evaluation", {}),
        ("selection={selector: random}", "selection", {"selector": "random"}),
    ],
)
def test_an_override_does_what_the_same_value_in_the_file_does(
    tmp_path: Path, assignment: str, field: str, value: Any
) -> None:
    overridden = load_recipe(written(tmp_path, with_fields({})), [assignment])
    assert overridden == load_recipe(written(tmp_path, with_fields({field: value})))
    assert overridden != load_recipe(written(tmp_path, with_fields({})))


def test_the_last_of_two_overrides_of_a_field_counts(tmp_path: Path) -> None:
    path = written(tmp_path, SMALLEST)
    assert load_recipe(path, ["selection.budget=3", "selection.budget=5"]).selection.budget == 5


@pytest.mark.parametrize("assignment", ["selection.budget", "=3", " =3", "selection..budget=3", ".budget=3", "", "a.="])
def test_an_override_of_another_form_is_shown_how_to_write_it(tmp_path: Path, assignment: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path, SMALLEST), [assignment])
    assert f"--set {assignment}: write it as section.field=value, for example selection.budget=16." in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {source: a}\npool:\n  samples: 3\npool: {seed: 1}", "line 4 gives `pool` again, after line 2"),
        ("pool:\n  samples: 3\n  seed: 1\n  samples: 4", "line 4 gives `samples` again, after line 2"),
        ("pool: {samples: 3, samples: 3}", "line 1 gives `samples` again, after line 1"),
    ],
)
def test_a_section_or_field_that_is_there_twice_is_refused_with_its_lines(
    tmp_path: Path, text: str, sentence: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"Recipe {path} is not valid YAML: {sentence}; keep one of the two."


def test_an_override_that_gives_a_field_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--set selection=.*: line 1 gives `budget` again"):
        load_recipe(written(tmp_path, SMALLEST), ["selection={budget: 1, budget: 2}"])


def test_a_recipe_may_use_one_block_twice(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    blocks = "evaluation:\n  perplexity: [&text {path: a.txt, window: 8}, {<<: *text, window: 16}]\n"
    path.write_text(yaml.safe_dump(SMALLEST) + blocks, encoding="utf-8")
    found = load_recipe(path).evaluation.perplexity
    assert [(text.path, text.window) for text in found] == [(f"{tmp_path}/a.txt", 8), (f"{tmp_path}/a.txt", 16)]


def test_an_override_whose_value_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--set pool.sequence_length=\[32: the value is not valid YAML"):
        load_recipe(written(tmp_path, SMALLEST), ["pool.sequence_length=[32"])


@pytest.mark.parametrize("entry", ["1", "x", "-1"])
@pytest.mark.parametrize("rest", [".text=body", "={path: b.txt}"])
def test_an_override_of_a_list_entry_that_is_not_there_is_refused(tmp_path: Path, entry: str, rest: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path, SMALLEST), [f"pool.sources.{entry}{rest}"])
    assert f"there is no `{entry}` there; a list entry is named by its number from 0" in str(caught.value)


@pytest.mark.parametrize("given", [{}, {"sweep": {"selection.budget": [4], "selection.seed": [0, 1]}}, {"sweep": None}])
def test_an_override_of_the_sweep_names_a_whole_field(tmp_path: Path, given: dict[str, Any]) -> None:
    path = written(tmp_path, {**SMALLEST, **given})
    expected = {"selection.budget": (8, 16)} | ({"selection.seed": (0, 1)} if given.get("sweep") else {})
    assert load_recipe(path, ["sweep.selection.budget=[8,16]"]).sweep == expected


def test_an_override_opens_a_section_that_is_empty(tmp_path: Path) -> None:
    value = {**with_fields({}), "require": {"divergence": None}, "outliers": None}
    loaded = load_recipe(written(tmp_path, value), ["require.divergence.max=0.1", "outliers.k=5"])
    assert (loaded.require.divergence, loaded.outliers.k) == (Bar(max=0.1), 5.0)


@pytest.mark.parametrize(
    ("given", "assignment", "spelled_out"),
    [
        (
            {"shrinkage": 0.3},
            "quantization.shrinkage.towards=pool",
            {"shrinkage": {"strength": 0.3, "towards": "pool"}},
        ),
        ({"shrinkage": 0.3}, "quantization.shrinkage.strength=0.1", {"shrinkage": {"strength": 0.1}}),
        ({"rounding": "beam"}, "quantization.rounding.width=8", {"rounding": {"kind": "beam", "width": 8}}),
    ],
)
def test_an_override_inside_a_short_form_is_one_inside_what_it_stands_for(
    tmp_path: Path, given: dict[str, Any], assignment: str, spelled_out: dict[str, Any]
) -> None:
    found = load_recipe(written(tmp_path, {**SMALLEST, "quantization": given}), [assignment])
    assert found == load_recipe(written(tmp_path, {**SMALLEST, "quantization": spelled_out}))


def test_an_override_inside_a_single_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`model\.source` is a single value and has no fields"):
        load_recipe(written(tmp_path, SMALLEST), ["model.source.name=3"])


def test_a_misspelt_override_names_the_nearest_field(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no field `pool.sampels`; did you mean `pool.samples`\?"):
        load_recipe(written(tmp_path, SMALLEST), ["pool.sampels=3"])


# --- paths ---------------------------------------------------------------------------------------------------------


def test_paths_relative_to_the_recipe_file_become_absolute(tmp_path: Path) -> None:
    value = with_fields({"pool.sources": [{"path": "texts/pool.jsonl"}, {"path": "../more.txt"}]})
    loaded = load_recipe(written(tmp_path, value))
    paths = [source.path for source in (*loaded.pool.sources, *loaded.evaluation.texts)]
    names = ["texts/pool.jsonl", "../more.txt", "a.txt", "a.jsonl", "b.jsonl"]
    assert paths == [str(tmp_path / name) for name in names]


def test_paths_in_a_sweep_become_absolute_like_the_fields_they_stand_for(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    swept = {
        "model.source": ["models/tiny", "new.gguf", "owner/model"],
        "pool.sources": [[{"path": "pool.jsonl", "text": "models/tiny"}], [{"hub": "texts"}, {"hub": "owner/texts"}]],
        "pool.sources.0": [{"path": "pool.jsonl"}],
        "pool.sources.0.path": ["pool.jsonl", "/data/pool.jsonl"],
        "evaluation.tasks": [[{"path": "task.yaml"}, {"name": "texts"}]],
        "selection.selector": ["texts"],
    }
    assert load_recipe(written(tmp_path, {**SMALLEST, "sweep": swept})).sweep == {
        "model.source": (f"{tmp_path}/models/tiny", f"{tmp_path}/new.gguf", "owner/model"),
        "pool.sources": (
            [{"path": f"{tmp_path}/pool.jsonl", "text": "models/tiny"}],
            [{"hub": f"{tmp_path}/texts"}, {"hub": "owner/texts"}],
        ),
        "pool.sources.0": ({"path": f"{tmp_path}/pool.jsonl"},),
        "pool.sources.0.path": (f"{tmp_path}/pool.jsonl", "/data/pool.jsonl"),
        "evaluation.tasks": ([{"path": f"{tmp_path}/task.yaml"}, {"name": "texts"}],),
        "selection.selector": ("texts",),
    }


def test_the_folder_one_works_in_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = written(tmp_path / "recipes", SMALLEST)
    monkeypatch.chdir(tmp_path / "recipes")
    beside = load_recipe(Path("recipe.yaml"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(path) == beside
    assert beside.pool.sources[0].path == str(tmp_path / "recipes" / "pool.jsonl")


def test_absolute_paths_stay(tmp_path: Path) -> None:
    value = with_fields({"pool.sources.0.path": "/data/pool.jsonl"})
    assert load_recipe(written(tmp_path, value)).pool.sources[0].path == "/data/pool.jsonl"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    value = with_fields({"pool.sources.0.path": "~/pool.jsonl"})
    assert load_recipe(written(tmp_path, value)).pool.sources[0].path == "/home/someone/pool.jsonl"


def test_a_model_folder_beside_the_recipe_becomes_absolute(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    value = with_fields({"model.source": "models/tiny"})
    assert load_recipe(written(tmp_path, value)).model.source == str(tmp_path / "models" / "tiny")


def test_a_gguf_file_becomes_absolute_even_when_it_is_not_there(tmp_path: Path) -> None:
    value = with_fields({"model.source": "tiny.gguf"})
    assert load_recipe(written(tmp_path, value)).model.source == str(tmp_path / "tiny.gguf")


def test_hub_ids_stay_as_they_are(tmp_path: Path) -> None:
    value = with_fields({"model.source": "owner/model", "pool.sources.0": {"hub": "owner/texts"}})
    loaded = load_recipe(written(tmp_path, value))
    assert (loaded.model.source, loaded.pool.sources[0].hub, loaded.pool.sources[0].path) == (
        "owner/model",
        "owner/texts",
        None,
    )


def test_a_data_set_folder_beside_the_recipe_becomes_absolute(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    value = with_fields({"pool.sources.0": {"hub": "texts"}})
    assert load_recipe(written(tmp_path, value)).pool.sources[0].hub == str(tmp_path / "texts")


# --- names of fields -----------------------------------------------------------------------------------------------


def test_short_names_are_the_last_parts_that_tell_fields_apart() -> None:
    fields = {
        "quantization.bits": "bits",
        "quantization.shrinkage.strength": "shrinkage.strength",
        "quantization.damping.strength": "damping.strength",
        "pool.sources.0.path": "sources.0.path",
        "evaluation.divergence.0.path": "divergence.0.path",
        "pool.seed": "pool.seed",
        "selection.seed": "selection.seed",
    }
    assert short_names(fields) == fields


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), unique=True))
def test_short_names_are_ends_of_fields_and_all_different(fields: list[str]) -> None:
    found = short_names(fields)
    assert len(set(found.values())) == len(fields)
    assert all(f".{name}".endswith(f".{short}") for name, short in found.items())


# --- as it is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, *PRESETS])
@pytest.mark.parametrize("given", [{}, {"bits": 3, "shrinkage": 0.3, "ranges": {"shrink": 0.4}}])
def test_a_shown_recipe_with_another_method_is_as_if_that_method_had_been_written(
    given: dict[str, Any], method: str | None
) -> None:
    def written_by_hand(name: str | None) -> Recipe:
        return parse_recipe({**SMALLEST, "quantization": {**given, **({"method": name} if name else {})}}, FOLDER)

    shown = json.loads(json.dumps(plain(written_by_hand(method))))
    assert parse_recipe(shown, Path("/")) == written_by_hand(method)
    assert shown["quantization"]["method"] == written_by_hand(method).quantization.method
    assert parse_recipe(shown, Path("/"), overrides=["quantization.method=rtn"]) == written_by_hand("rtn")


# --- round trip ----------------------------------------------------------------------------------------------------

_names = st.text("abcxyz_/.-é", min_size=1, max_size=12).filter(lambda name: not name.startswith("~"))
_sources = st.one_of(
    st.fixed_dictionaries({"path": _names}, optional={"text": _names, "domain": _names, "rows": st.integers(1, 9)}),
    st.fixed_dictionaries({"hub": _names}, optional={"config": _names, "split": _names, "revision": _names}),
)
_recipes = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"source": _names}, optional={"dtype": st.sampled_from(["float32", "bfloat16", "float16"])}
        ),
        "pool": st.fixed_dictionaries(
            {"sources": st.lists(_sources, min_size=1, max_size=3), "samples": st.integers(10, 999)},
            optional={
                "sequence_length": st.integers(9, 4096) | st.lists(st.integers(9, 4096), min_size=1, max_size=3),
                "packing": st.sampled_from(["join", "separate"]),
                "seed": st.integers(0, 2**40),
            },
        ),
        "selection": st.fixed_dictionaries({"budget": st.integers(1, 10)})
        | st.lists(st.integers(0, 9), min_size=1, unique=True).map(
            lambda samples: {"selector": "given", "samples": samples, "budget": len(samples)}
        ),
    },
    optional={
        "statistics": st.fixed_dictionaries({"skip_tokens": st.integers(0, 8)}),
        "outliers": st.fixed_dictionaries({"k": st.floats(1e-300, 1e300)}, optional={"rule": st.just("mad")})
        | st.fixed_dictionaries(
            {"rule": st.just("quantile"), "k": st.floats(0.5, 0.999), "weighting": st.sampled_from(list(WEIGHTINGS))},
            optional={"adaptive": st.booleans(), "adaptive_k": st.floats(0.1, 0.4)},
        ).filter(lambda fields: "adaptive_k" in fields or not fields.get("adaptive")),
        "quantization": st.fixed_dictionaries(
            {"group_size": st.none() | st.integers(1, 512), "damping": st.floats(0, 1e300)}
        ),
        "evaluation": st.fixed_dictionaries(
            {
                "perplexity": st.lists(st.fixed_dictionaries({"path": _names}), max_size=2),
                "divergence": st.lists(_sources, max_size=2),
            }
        ),
    },
)


@given(_recipes)
def test_a_recipe_written_as_json_parses_back_to_an_equal_one(value: dict[str, Any]) -> None:
    first = parse_recipe(value, FOLDER)
    assert parse_recipe(json.loads(first.model_dump_json()), Path("/elsewhere")) == first


@given(_recipes)
def test_a_recipe_written_as_plain_values_parses_back_to_an_equal_one(value: dict[str, Any]) -> None:
    first = parse_recipe(value, FOLDER)
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(first.model_dump(mode="json"))), Path("/elsewhere")) == first
