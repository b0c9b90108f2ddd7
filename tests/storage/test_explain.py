"""The reason of a miss names what changed since the nearest artifact."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.explain import changed_fields, explain_miss, flatten

OLD = {"quantization": {"method": "gptq", "bits": 4, "group_size": 64}, "seed": 0}

leaves = st.booleans() | st.integers() | st.text(max_size=5)
trees = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.recursive(leaves, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=6),
    min_size=1,
    max_size=5,
)


def other_than(old: dict[str, Any], **quantization: Any) -> dict[str, Any]:
    return {**old, "quantization": {**old["quantization"], **quantization}}


def paths(lines: list[str]) -> list[str]:
    return [line.split(": ")[0] for line in lines]


def test_a_changed_leaf_is_named_by_its_dotted_path() -> None:
    assert changed_fields(OLD, other_than(OLD, bits=3)) == ["quantization.bits: 4 -> 3"]


def test_a_changed_field_at_the_top_is_named_alone() -> None:
    assert changed_fields({"bits": 4}, {"bits": 3}) == ["bits: 4 -> 3"]


def test_a_new_field_was_none_before() -> None:
    assert changed_fields({"a": 1}, {"a": 1, "damping": 0.01}) == ["damping: none -> 0.01"]


def test_a_field_that_went_is_none_now() -> None:
    assert changed_fields({"a": 1, "damping": 0.01}, {"a": 1}) == ["damping: 0.01 -> none"]


def test_an_element_of_a_list_is_named_by_its_index() -> None:
    assert changed_fields({"lengths": [128, 256]}, {"lengths": [128, 512]}) == ["lengths[1]: 256 -> 512"]


def test_a_list_and_a_tuple_of_the_same_values_do_not_differ() -> None:
    assert changed_fields({"lengths": [1, 2]}, {"lengths": (1, 2)}) == []


def test_another_upstream_artifact_is_one_line() -> None:
    old, new = ({"pool": {"stage": "pool", "key": digit * 64}} for digit in "ab")
    assert changed_fields(old, new) == ["pool: pool aaaaaaaa -> pool bbbbbbbb"]


def test_a_reference_by_digest_is_one_leaf_too() -> None:
    assert flatten({"tokens": {"stage": "pool", "digest": "c" * 64}}) == {"tokens": "pool cccccccc"}


def test_two_long_values_are_told_apart() -> None:
    (line,) = changed_fields({"m": "HuggingFaceTB/SmolLM2-135M-Instruct"}, {"m": "HuggingFaceTB/SmolLM2-360M-Instruct"})
    old, new = line.removeprefix("m: ").split(" -> ")
    assert old != new


def test_empty_material_has_no_field() -> None:
    assert changed_fields({}, {"seed": 0}) == ["seed: none -> 0"]


def test_a_long_value_is_cut() -> None:
    (line,) = changed_fields({"name": "x" * 500}, {"name": "short"})
    assert len(line) < 60


@given(tree=trees)
def test_the_same_material_has_no_changed_field(tree: dict[str, Any]) -> None:
    assert changed_fields(tree, dict(reversed(tree.items()))) == []


@given(old=trees, new=trees)
def test_the_changed_fields_are_the_same_in_both_directions(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert paths(changed_fields(old, new)) == paths(changed_fields(new, old))


@given(tree=trees, data=st.data())
def test_one_changed_leaf_is_exactly_one_line(tree: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(tree)))
    lines = changed_fields({**tree, name: "was"}, {**tree, name: "is now"})
    assert lines == [f"{name}: was -> is now"]


@given(tree=trees)
def test_every_leaf_has_a_path_of_its_own(tree: dict[str, Any]) -> None:
    def count(value: Any) -> int:
        return (
            sum(map(count, value.values() if isinstance(value, dict) else value))
            if isinstance(value, dict | list)
            else 1
        )

    assert len(flatten(tree)) == count(tree)


def test_the_first_of_a_stage_says_so() -> None:
    assert explain_miss(1, OLD, []) == "first of its stage"


def test_the_nearest_artifact_is_the_one_with_the_fewest_changes() -> None:
    far = {**other_than(OLD, bits=8, method="rtn"), "seed": 5}
    near = other_than(OLD, bits=8)
    assert explain_miss(1, OLD, [(1, far, "2025-02-02"), (1, near, "2025-01-01")]) == "quantization.bits: 8 -> 4"


def test_of_two_equally_near_the_newest_is_chosen() -> None:
    others = [(1, other_than(OLD, bits=bits), f"2025-01-0{bits}") for bits in (3, 8, 2)]
    assert explain_miss(1, OLD, others) == "quantization.bits: 8 -> 4"


def test_the_same_stage_version_is_nearer() -> None:
    assert explain_miss(2, {"a": 1}, [(2, {"a": 2}, "2025-01-01"), (1, {"a": 3}, "2025-02-02")]) == "a: 2 -> 1"


def test_the_order_of_the_others_does_not_matter() -> None:
    others = [(1, other_than(OLD, bits=bits), f"2025-01-0{bits}") for bits in (3, 8, 2)]
    assert explain_miss(1, OLD, others[::-1]) == explain_miss(1, OLD, others)


def test_a_change_of_the_stage_version_is_named() -> None:
    assert explain_miss(3, OLD, [(2, OLD, "2025-01-01")]) == "stage version 2 -> 3"


def test_a_change_of_the_stage_version_comes_before_the_fields() -> None:
    found = explain_miss(3, OLD, [(2, other_than(OLD, bits=8), "2025-01-01")])
    assert found == "stage version 2 -> 3, quantization.bits: 8 -> 4"


def test_three_changes_are_all_named() -> None:
    new, old = (dict.fromkeys("abc", value) for value in (1, 0))
    assert explain_miss(1, new, [(1, old, "2025-01-01")]) == "a: 0 -> 1, b: 0 -> 1, c: 0 -> 1"


def test_of_more_than_three_changes_the_rest_is_counted() -> None:
    new, old = (dict.fromkeys("abcde", value) for value in (1, 0))
    assert explain_miss(1, new, [(1, old, "2025-01-01")]) == "a: 0 -> 1, b: 0 -> 1, c: 0 -> 1, and 2 more"


@pytest.mark.parametrize(("old", "new"), [({"x": 1}, {"x": 1.0}), ({"x": 1}, {"x": True}), ({}, {"x": None})])
def test_whatever_changes_a_key_is_named(old: dict, new: dict) -> None:
    assert explain_miss(1, new, [(1, old, "2025-01-01")]) != ""
