"""The choices of quantisation: how presets and short forms spell them, which go together, and what goes into a key."""

from itertools import combinations
from typing import Any

import pytest
from pydantic import ValidationError

from covercal.quantization_settings import PRESETS, SECTIONS, Quantization, conflicts, with_defaults

every_preset = pytest.mark.parametrize("method", PRESETS)


def settings(method: str = "gptq", **fields: Any) -> Quantization:
    return Quantization(method=method, **fields)


def changed(base: Quantization, section: str, **fields: Any) -> Quantization:
    """Return settings with some fields of one section, or of the whole, changed."""
    value = base.model_dump()
    value |= {section: value[section] | fields} if section else fields
    return Quantization(**value)


def complaint(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        settings(**fields)
    return str(caught.value)


# --- presets -------------------------------------------------------------------------------------------------------


@every_preset
def test_every_preset_is_valid_by_itself(method: str) -> None:
    assert conflicts(settings(method=method)) == []


@pytest.mark.parametrize(
    "fields",
    [{}, {"bits": 3}, {"shrinkage": 0.3}, {"rounding": "nearest"}, {"ranges": {"refit": 0}}, {"gram": "blend"}],
)
def test_without_a_method_it_is_covercal(fields: dict[str, Any]) -> None:
    assert Quantization(**fields) == settings(method="covercal", **fields)


def test_cached_and_covercal_share_grids_and_rounding() -> None:
    cached, covercal = (settings(method=method).model_dump() for method in ("cached", "covercal"))
    assert {name for name in cached if cached[name] != covercal[name]} == {"method", "gram", "shrinkage", "target"}
    assert cached["gram"] == covercal["gram"] | {"source": "pool"}
    assert covercal["target"] == cached["target"] | {"kind": "coreq"}


@pytest.mark.parametrize(
    ("method", "section", "expected"),
    [
        ("rtn", "rounding", {"kind": "nearest"}),
        ("gptq", "rounding", {"kind": "sequential"}),
        ("awq", "scaling", {"search": "awq", "loss": "linear"}),
        ("awq", "ranges", {"search": "output"}),
        ("awq", "rounding", {"kind": "nearest"}),
        ("gptaq", "target", {"kind": "gptaq", "alpha": 0.25}),
        ("maca", "gram", {"source": "calibration", "weight": "sequence"}),
        ("sarqc_gs", "scaling", {"search": "duo", "regularization": "saliency"}),
        ("sarqc_gs", "rounding", {"kind": "nearest"}),
        ("sarqc_gbs", "damping", {"strength": "validated", "weights": "saliency", "gamma": "validated"}),
        ("coreq", "target", {"kind": "coreq", "alpha": "closed_form"}),
        ("coreq", "rounding", {"kind": "sequential"}),
        ("k_coreq", "target", {"kind": "coreq"}),
        ("k_coreq", "rounding", {"kind": "beam"}),
        ("precal", "salient", {"share": 0.08}),
        ("precal", "rounding", {"kind": "nearest"}),
        ("w8a8_static", "activations", {"kind": "static", "bits": 8, "source": "calibration"}),
        ("w8a8_static", "rounding", {"kind": "nearest"}),
        ("cached", "gram", {"source": "pool"}),
        ("cached", "target", {"kind": "weights"}),
        ("covercal", "gram", {"source": "calibration"}),
        ("covercal", "target", {"kind": "coreq", "alpha": "closed_form"}),
        *(
            (method, section, expected)
            for method, share in (("cached", 0.1), ("covercal", 0.25))
            for section, expected in (
                ("shrinkage", {"strength": share, "towards": "own"}),
                ("ranges", {"search": "output", "refit": 3}),
                ("rounding", {"kind": "sequential", "polish": 2}),
            )
        ),
    ],
)
def test_a_preset_sets_what_its_paper_changed(method: str, section: str, expected: dict[str, Any]) -> None:
    found = getattr(settings(method=method), section).model_dump()
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("w8a8_static", {"bits": 8, "group_size": None, "symmetric": True, "activation_order": True}),
        ("sarqc_gbs", {"bits": 4, "group_size": 128, "symmetric": False, "activation_order": False}),
    ],
)
def test_a_preset_may_set_the_grid_and_the_order(method: str, expected: dict[str, Any]) -> None:
    assert settings(method=method).model_dump(include=set(expected)) == expected


@every_preset
def test_a_preset_leaves_every_section_that_it_does_not_name_at_its_default(method: str) -> None:
    found = settings(method=method)
    assert all(getattr(found, name) == section() for name, section in SECTIONS.items() if name not in PRESETS[method])


def test_every_preset_can_be_told_from_every_other() -> None:
    keys = {method: settings(method=method).key_material() for method in PRESETS}
    assert not [(a, b) for a, b in combinations(keys, 2) if keys[a] == keys[b]]


@pytest.mark.parametrize(
    ("given", "nearest"), [("gtpq", "gptq"), ("awqs", "awq"), ("sarqc_g", "sarqc_gs"), ("k-coreq", "k_coreq")]
)
def test_an_unknown_preset_names_the_nearest(given: str, nearest: str) -> None:
    found = complaint(method=given)
    assert f"did you mean {nearest!r}?" in found


def test_an_unknown_preset_that_is_like_none_lists_them_all() -> None:
    assert f"known: {', '.join(sorted(PRESETS))}." in complaint(method="???")


# --- what is given and what the preset says ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"shrinkage": 0.3}, {"shrinkage": {"strength": 0.3}}),
        ({"shrinkage": "ledoit_wolf"}, {"shrinkage": {"strength": "ledoit_wolf"}}),
        ({"rounding": "nearest"}, {"rounding": {"kind": "nearest"}}),
        ({"target": "coreq"}, {"target": {"kind": "coreq"}}),
        ({"gram": "pool"}, {"gram": {"source": "pool"}}),
        ({"damping": 0.1}, {"damping": {"strength": 0.1}}),
        ({"damping": 1}, {"damping": {"strength": 1.0}}),
        ({"scaling": "duo"}, {"scaling": {"search": "duo"}}),
        ({"ranges": "mse"}, {"ranges": {"search": "mse"}}),
        ({"salient": 0.01}, {"salient": {"share": 0.01}}),
        ({"activations": "dynamic"}, {"activations": {"kind": "dynamic"}}),
    ],
)
def test_a_section_may_be_written_as_its_main_value(short: dict[str, Any], long: dict[str, Any]) -> None:
    assert settings(**short) == settings(**long)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_yes_or_no_is_no_short_form_of_any_section(section: str) -> None:
    assert section in complaint(**{section: True})


@pytest.mark.parametrize(
    ("fields", "section", "expected"),
    [
        (
            {"method": "k_coreq", "rounding": {"width": 9}},
            "rounding",
            {"kind": "beam", "width": 9, "polish": 0},
        ),
        ({"method": "k_coreq", "rounding": "sequential"}, "rounding", {"kind": "sequential", "width": 4, "polish": 0}),
        ({"method": "gptaq", "target": {"alpha": 0.5}}, "target", {"kind": "gptaq", "alpha": 0.5}),
        ({"method": "gptaq", "target": "coreq"}, "target", {"kind": "coreq", "alpha": 0.25}),
        ({"method": "cached", "shrinkage": 0.3}, "shrinkage", {"strength": 0.3, "towards": "own"}),
        ({"method": "cached", "ranges": "mse"}, "ranges", {"search": "mse", "refit": 3}),
        ({"method": "covercal", "ranges": {"refit": 1}}, "ranges", {"search": "output", "refit": 1}),
        ({"method": "covercal", "rounding": "beam"}, "rounding", {"kind": "beam", "width": 4, "polish": 2}),
        ({"method": "covercal", "target": {"alpha": 0.5}}, "target", {"kind": "coreq", "alpha": 0.5}),
        ({"method": "precal", "salient": {"bits": 8}}, "salient", {"share": 0.08, "bits": 8}),
        ({"method": "w8a8_static", "activations": "dynamic"}, "activations", {"kind": "dynamic", "bits": 8}),
        ({"method": "sarqc_gbs", "damping": {"strength": 0.5}}, "damping", {"strength": 0.5, "weights": "saliency"}),
    ],
)
def test_a_given_field_wins_over_the_presets_and_leaves_the_others_of_its_section(
    fields: dict[str, Any], section: str, expected: dict[str, Any]
) -> None:
    found = getattr(settings(**fields), section).model_dump()
    assert {name: found[name] for name in expected} == expected


def test_changing_one_section_leaves_the_presets_other_sections() -> None:
    found = settings(method="awq", ranges="min_max")
    assert (found.ranges.search, found.scaling.search, found.rounding.kind) == ("min_max", "awq", "nearest")


@pytest.mark.parametrize(("field", "value"), [("bits", 4), ("group_size", 32), ("symmetric", False)])
def test_a_given_field_outside_the_sections_wins_over_the_presets(field: str, value: Any) -> None:
    found = settings(method="w8a8_static", **{field: value})
    preset = settings(method="w8a8_static").model_dump()
    assert found.model_dump() == preset | {field: value}


@every_preset
def test_settings_are_read_back_from_what_they_are_written_as(method: str) -> None:
    found = settings(method=method, bits=3)
    assert Quantization(**found.model_dump(mode="json")) == found


def test_a_section_that_is_given_as_an_object_is_taken_as_it_is() -> None:
    assert with_defaults({"rounding": SECTIONS["rounding"](kind="beam")}, PRESETS["rtn"])["rounding"].kind == "beam"


def test_what_was_given_is_not_changed_by_the_presets() -> None:
    given = {"method": "k_coreq", "rounding": {"width": 2}}
    Quantization(**given)
    assert given == {"method": "k_coreq", "rounding": {"width": 2}}


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("gram", {"prefixes": [8, 8]}),
        ("gram", {"prefixes": [1]}),
        ("gram", {"pool_share": 1.0}),
        ("gram", {"expert_tokens": 0}),
        ("shrinkage", {"strength": 1.5}),
        ("shrinkage", {"strength": "oas"}),
        ("damping", {"strength": float("nan")}),
        ("target", {"alpha": -0.1}),
        ("rounding", {"width": 0}),
        ("salient", {"share": 1.0}),
        ("activations", {"percentile": 50}),
        ("scaling", {"power": 1.1}),
        ("ranges", {"shrink": 1.0}),
        ("ranges", {"step": 3}),
    ],
)
def test_a_value_that_means_nothing_is_refused(section: str, fields: dict[str, Any]) -> None:
    assert section in complaint(**{section: fields})


# --- what does not go together -------------------------------------------------------------------------------------

CONFLICTS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    *(
        (
            {**fields, "gram": "pool"},
            f"target {target} compares the quantised prefix with the original; `gram: pool` has no prefix: use "
            "`gram: calibration`, or `target: weights`",
            instead,
        )
        for fields, target, instead in (
            ({"target": "coreq"}, "coreq", {"gram": "calibration"}),
            ({"method": "covercal"}, "coreq", {"gram": "calibration"}),
            ({"method": "covercal"}, "coreq", {"target": "weights"}),
            ({"method": "gptaq"}, "gptaq", {"gram": "calibration"}),
            ({"method": "gptaq"}, "gptaq", {"target": "weights"}),
        )
    ),
    (
        {"method": "gptaq", "rounding": "nearest"},
        "target gptaq acts within sequential rounding; `rounding: nearest` has none",
        {"rounding": "sequential"},
    ),
    (
        {"method": "gptaq", "rounding": "beam"},
        "target gptaq acts within sequential rounding; use `target: coreq` with `rounding: beam`",
        {"target": "coreq"},
    ),
    (
        {"target": "gptaq"},
        "target.alpha of gptaq is a number, 0.25 in its paper; closed_form belongs to coreq",
        {"target": {"kind": "gptaq", "alpha": 0.25}},
    ),
    *(
        (
            {"gram": "pool", "scaling": {"search": search, "loss": "module"}},
            "scaling.loss: module runs the module on the chosen samples; `gram: pool` needs `loss: linear`",
            {"scaling": {"search": search, "loss": "linear"}},
        )
        for search in ("awq", "duo")
    ),
    (
        {"method": "cached", "shrinkage": {"towards": "pool"}},
        "with `gram: pool` the Gram matrix's own diagonal is the pool's: leave shrinkage.towards at own",
        {"shrinkage": {"towards": "own"}},
    ),
    (
        {"method": "cached", "shrinkage": "ledoit_wolf", "scaling": "awq"},
        "shrinkage: ledoit_wolf is not known for scaled inputs of the pool; give a number, or no scaling",
        {"shrinkage": 0.3},
    ),
    (
        {"gram": {"source": "pool", "prefixes": [8]}},
        "gram.prefixes are of the chosen samples; `gram: pool` calibrates on none",
        {"gram": {"source": "pool", "prefixes": []}},
    ),
    (
        {"method": "precal", "activations": "dynamic"},
        "no format holds quantised activations beside salient weights",
        {"activations": "none"},
    ),
]


@pytest.mark.parametrize(("fields", "sentence", "_"), CONFLICTS)
def test_choices_that_do_not_go_together_are_refused_with_the_reason(
    fields: dict[str, Any], sentence: str, _: Any
) -> None:
    assert sentence in complaint(**fields)


@pytest.mark.parametrize(("fields", "_", "instead"), CONFLICTS)
def test_what_the_reason_proposes_is_accepted(fields: dict[str, Any], _: Any, instead: dict[str, Any]) -> None:
    assert conflicts(settings(**fields | instead)) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"target": "coreq", "gram": "blend"},
        {"scaling": {"search": "awq", "loss": "module"}, "gram": "blend"},
        {"scaling": {"search": "smooth", "loss": "module"}, "gram": "pool"},
        {"shrinkage": {"strength": 0.3, "towards": "pool"}, "gram": "blend"},
        {"gram": {"source": "blend", "prefixes": [8]}},
        {"target": {"kind": "gptaq", "alpha": 0.5}, "salient": 0.01},
        {"target": "coreq", "rounding": "nearest"},
        {"shrinkage": "ledoit_wolf", "scaling": "awq"},
        {"method": "cached", "shrinkage": "ledoit_wolf"},
        {"group_size": 64, "salient": {"share": 0.0, "scope": "group"}},
        {"group_size": None, "salient": {"share": 0.005, "scope": "group"}},
    ],
)
def test_choices_that_only_look_like_those_are_accepted(fields: dict[str, Any]) -> None:
    assert conflicts(settings(**fields)) == []


# --- keys ----------------------------------------------------------------------------------------------------------


@every_preset
def test_a_presets_name_does_not_matter_in_a_key(method: str) -> None:
    spelled_out = settings(**PRESETS[method])
    assert spelled_out.method == "gptq"
    assert spelled_out.key_material() == settings(method=method).key_material()


def test_covercal_has_the_key_of_coreq_with_the_same_sections() -> None:
    sections = {"shrinkage": 0.25, "ranges": {"search": "output", "refit": 3}, "rounding": {"polish": 2}}
    assert settings(method="coreq", **sections).key_material() == settings(method="covercal").key_material()


def test_cached_has_the_key_of_gptq_on_the_pools_gram_matrix_with_the_same_sections() -> None:
    sections = {"shrinkage": 0.1, "ranges": {"search": "output", "refit": 3}, "rounding": {"polish": 2}}
    assert settings(method="gptq", gram="pool", **sections).key_material() == settings(method="cached").key_material()


NOT_READ: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"method": "rtn"}, "damping", {"strength": 0.5}),
    ({"method": "rtn"}, "shrinkage", {"strength": 0.5}),
    ({"method": "rtn"}, "gram", {"weight": "sequence"}),
    ({"method": "rtn"}, "", {"activation_order": False}),
    ({"method": "rtn"}, "gram", {"prefixes": [8]}),
    ({"method": "rtn", "activations": "dynamic"}, "gram", {"prefixes": [8]}),
    *(
        ({"method": "w8a8_static", "gram": {"prefixes": prefixes}}, "gram", fields)
        for prefixes in ([], [8])
        for fields in ({"weight": "sequence"}, {"expert_tokens": 8}, {"source": "blend"}, {"pool_share": 0.2})
    ),
    ({"method": "w8a8_static", "activations": {"source": "statistics"}}, "gram", {"prefixes": [8]}),
    ({"method": "awq"}, "damping", {"strength": 0.5}),
    ({"method": "awq"}, "shrinkage", {"strength": 0.5}),
    ({"method": "awq"}, "", {"activation_order": False}),
    ({"method": "gptq"}, "scaling", {"steps": 5}),
    ({"method": "gptq"}, "target", {"alpha": 0.5}),
    ({"method": "gptq"}, "salient", {"bits": 8}),
    ({"method": "gptq"}, "activations", {"bits": 4}),
    ({"method": "rtn", "ranges": "mse"}, "", {"activation_order": False}),
    ({}, "ranges", {"steps": 5}),
    ({}, "ranges", {"shrink": 0.7}),
    ({"scaling": "smooth"}, "scaling", {"steps": 5}),
    ({"scaling": "smooth"}, "scaling", {"loss": "module"}),
    ({"scaling": "smooth"}, "scaling", {"regularization": "identity"}),
    ({"scaling": "awq"}, "scaling", {"power": 0.8}),
    ({"scaling": "duo"}, "scaling", {"strength": 0.1}),
    ({}, "gram", {"pool_share": 0.2}),
    ({"gram": "pool"}, "gram", {"pool_share": 0.2}),
    ({}, "shrinkage", {"towards": "pool"}),
    ({}, "damping", {"gamma": 0.5}),
    ({}, "rounding", {"width": 8}),
    ({"activations": "dynamic"}, "activations", {"ranges": "mse"}),
    ({"activations": "dynamic"}, "activations", {"source": "statistics"}),
    ({"activations": "static"}, "activations", {"percentile": 90}),
    ({"activations": {"kind": "static", "ranges": "mse"}}, "activations", {"percentile": 90}),
]


@pytest.mark.parametrize(("base", "section", "fields"), NOT_READ)
def test_what_nothing_reads_is_not_in_a_key(base: dict[str, Any], section: str, fields: dict[str, Any]) -> None:
    plain = settings(**base)
    other = changed(plain, section, **fields)
    assert other != plain
    assert other.key_material() == plain.key_material()


READ: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({}, "", {"bits": 3}),
    ({}, "", {"group_size": None}),
    ({}, "", {"symmetric": True}),
    ({}, "", {"activation_order": False}),
    ({}, "", {"storage_dtype": "float16"}),
    ({}, "ranges", {"search": "mse"}),
    ({"ranges": "mse"}, "ranges", {"steps": 5}),
    ({}, "scaling", {"search": "awq"}),
    ({"scaling": "awq"}, "scaling", {"loss": "module"}),
    ({"scaling": "awq"}, "scaling", {"steps": 5}),
    ({"scaling": "smooth"}, "scaling", {"power": 0.8}),
    ({"method": "sarqc_gs"}, "scaling", {"strength": 0.1}),
    ({}, "gram", {"source": "pool"}),
    ({}, "gram", {"weight": "sequence"}),
    ({}, "gram", {"prefixes": [8]}),
    ({}, "gram", {"expert_tokens": 8}),
    ({"method": "w8a8_static"}, "gram", {"prefixes": [8]}),
    ({"method": "w8a8_static", "gram": {"prefixes": [8]}}, "gram", {"prefixes": [4, 8]}),
    ({"gram": "blend"}, "gram", {"pool_share": 0.2}),
    ({"method": "rtn", "ranges": "output"}, "gram", {"weight": "sequence"}),
    ({}, "shrinkage", {"strength": 0.2}),
    ({"shrinkage": 0.2}, "shrinkage", {"towards": "pool"}),
    ({}, "damping", {"strength": 0.2}),
    ({"method": "rtn", "rounding": {"polish": 1}}, "damping", {"strength": 0.2}),
    ({"method": "rtn", "rounding": {"polish": 1}}, "shrinkage", {"strength": 0.2}),
    ({"method": "rtn", "rounding": {"polish": 1}}, "", {"activation_order": False}),
    ({"method": "rtn", "ranges": {"refit": 1}}, "", {"activation_order": False}),
    ({"method": "rtn", "ranges": {"refit": 1}}, "damping", {"strength": 0.2}),
    ({"method": "rtn", "target": "coreq"}, "damping", {"strength": 0.2}),
    ({"method": "rtn", "target": "coreq"}, "gram", {"weight": "sequence"}),
    ({}, "ranges", {"refit": 1}),
    ({"method": "sarqc_gbs"}, "damping", {"gamma": 0.5}),
    ({}, "target", {"kind": "coreq"}),
    ({"target": "coreq"}, "target", {"alpha": 0.5}),
    ({}, "rounding", {"kind": "nearest"}),
    ({"method": "k_coreq"}, "rounding", {"width": 8}),
    ({}, "rounding", {"polish": 1}),
    ({}, "salient", {"share": 0.01}),
    ({"salient": 0.01}, "salient", {"scope": "row"}),
    ({}, "activations", {"kind": "dynamic"}),
    ({"activations": "static"}, "activations", {"ranges": "mse"}),
    ({"activations": "static"}, "activations", {"source": "statistics"}),
    ({"activations": {"kind": "static", "ranges": "percentile"}}, "activations", {"percentile": 90}),
    ({"activations": "dynamic"}, "activations", {"bits": 6}),
    ({"scaling": "awq"}, "scaling", {"regularization": "identity"}),
    ({"ranges": "mse"}, "ranges", {"shrink": 0.7}),
    ({"shrinkage": "validated"}, "shrinkage", {"towards": "pool"}),
    ({"shrinkage": "ledoit_wolf"}, "shrinkage", {"towards": "pool"}),
    ({"damping": {"weights": "saliency"}}, "damping", {"gamma": 0.5}),
]


def test_whole_samples_are_not_named_in_the_key_of_static_ranges() -> None:
    assert "gram" not in settings(method="w8a8_static").key_material()


@pytest.mark.parametrize(("base", "section", "fields"), READ)
def test_a_choice_that_is_read_is_in_the_key(base: dict[str, Any], section: str, fields: dict[str, Any]) -> None:
    plain = settings(**base)
    assert changed(plain, section, **fields).key_material() != plain.key_material()


def test_a_key_holds_no_name_of_a_preset() -> None:
    assert "method" not in settings(method="awq").key_material()


# --- what settings read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        (
            "calibrated",
            {"gptq", "awq", "gptaq", "maca", "sarqc_gs", "sarqc_gbs", "coreq", "k_coreq", "w8a8_static", "covercal"},
        ),
        (
            "reads_inputs",
            {"gptq", "awq", "gptaq", "maca", "sarqc_gs", "sarqc_gbs", "coreq", "k_coreq", "cached", "covercal"},
        ),
        ("reads_pool_gram", {"cached"}),
        ("reads_statistics", set()),
        ("validates", {"sarqc_gbs"}),
        ("static_from_calibration", {"w8a8_static"}),
    ],
)
def test_what_a_preset_reads_follows_from_its_choices(name: str, methods: set[str]) -> None:
    assert {method for method in PRESETS if getattr(settings(method=method), name)} == methods


@pytest.mark.parametrize(
    ("fields", "name", "expected"),
    [
        ({"gram": "blend"}, "calibrated", True),
        ({"gram": "blend"}, "reads_pool_gram", True),
        ({"method": "rtn", "gram": "pool"}, "reads_pool_gram", False),
        ({"method": "rtn", "rounding": {"polish": 1}}, "reads_inputs", True),
        ({"method": "rtn", "ranges": "weighted"}, "reads_inputs", True),
        ({"method": "rtn", "ranges": {"refit": 1}}, "calibrated", True),
        ({"method": "rtn", "target": "coreq"}, "calibrated", True),
        ({"method": "rtn", "target": "coreq"}, "rounds", True),
        ({"method": "awq"}, "rounds", False),
        ({"method": "rtn", "ranges": "mse"}, "reads_inputs", False),
        ({"method": "w8a8_static", "activations": {"source": "statistics"}}, "calibrated", False),
        ({"method": "w8a8_static", "activations": {"source": "statistics"}}, "reads_statistics", True),
        ({"method": "w8a8_static", "activations": "dynamic"}, "calibrated", False),
        ({"shrinkage": {"strength": 0.3, "towards": "pool"}}, "reads_statistics", True),
        ({"shrinkage": {"strength": 0.0, "towards": "pool"}}, "reads_statistics", False),
        ({"method": "rtn", "shrinkage": {"strength": 0.3, "towards": "pool"}}, "reads_statistics", False),
        ({"shrinkage": {"strength": "validated", "towards": "pool"}}, "reads_statistics", True),
        ({"method": "rtn", "shrinkage": "validated"}, "validates", False),
        ({"method": "awq", "damping": {"weights": "saliency"}}, "validates", False),
        ({"method": "rtn", "shrinkage": "validated", "rounding": {"polish": 1}}, "validates", True),
        ({"method": "rtn", "shrinkage": "validated", "ranges": {"refit": 1}}, "validates", True),
        ({"shrinkage": "ledoit_wolf"}, "reads_spread", True),
        ({"shrinkage": 0.3}, "reads_spread", False),
        ({"method": "awq", "shrinkage": "ledoit_wolf"}, "reads_spread", False),
        ({"method": "rtn", "ranges": {"refit": 1}}, "rounds", True),
        ({"shrinkage": "validated"}, "validates", True),
        ({"damping": "validated"}, "validates", True),
        ({"damping": {"weights": "saliency", "gamma": 0.5}}, "validates", False),
        ({"damping": {"gamma": "validated"}}, "validates", False),
    ],
)
def test_what_settings_read_follows_from_their_choices(fields: dict[str, Any], name: str, expected: bool) -> None:
    assert getattr(settings(**fields), name) is expected
