"""The reason of a miss names what changed since the nearest artifact, followed up to the field that someone changed."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.explain import DEEPEST, LONGEST, Finder, Known, Leaf, changed_fields, differences, explain_miss, flatten
from storage.keys import canonical_json

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


def key(name: str) -> str:
    """Return a key that shows which artifact it stands for."""
    return f"{name:0<64}"


def digest(name: str) -> str:
    return f"{name:x<64}"


def by_key(stage: str, name: str) -> dict[str, str]:
    return {"stage": stage, "key": key(name)}


def by_digest(stage: str, name: str) -> dict[str, str]:
    return {"stage": stage, "digest": digest(name)}


def made_from(material: Mapping[str, Any], *inputs: tuple[str, str], version: int = 1) -> Known:
    """Return what an artifact was made from; `inputs` are stage and name of what it reads."""
    return Known(version, material, [(stage, key(name), digest(name)) for stage, name in inputs])


def among(artifacts: Mapping[tuple[str, str], Known]) -> Finder:
    """Return a finder that knows these artifacts, by stage and name."""
    known = {(stage, key(name)): each for (stage, name), each in artifacts.items()}
    return lambda stage, wanted: known.get((stage, wanted))


def nothing(stage: str, wanted: str) -> None:
    """Find no artifact."""


def reason(wanted: Known, *others: tuple[Known, str], find: Finder = nothing) -> str:
    return explain_miss("statistics", wanted, others, find)


def reason_of(old: Mapping[str, Any], new: Mapping[str, Any], find: Finder = nothing) -> str:
    """Return the reason that `new` is not there when `old` is all there is."""
    return reason(made_from(new), (made_from(old), "2025-01-01"), find=find)


# --- fields --------------------------------------------------------------------------------------------------------


def test_a_changed_leaf_is_named_by_its_dotted_path() -> None:
    assert changed_fields(OLD, other_than(OLD, bits=3)) == ["quantization.bits: 4 -> 3"]


def test_a_changed_field_at_the_top_is_named_alone() -> None:
    assert changed_fields({"bits": 4}, {"bits": 3}) == ["bits: 4 -> 3"]


def test_a_new_field_was_none_before() -> None:
    assert changed_fields({"a": 1}, {"a": 1, "damping": 0.01}) == ["damping: none -> 0.01"]


def test_a_field_that_went_is_none_now() -> None:
    assert changed_fields({"a": 1, "damping": 0.01}, {"a": 1}) == ["damping: 0.01 -> none"]


def test_a_field_that_was_nothing_and_now_has_parts_is_told_by_its_parts_alone() -> None:
    parts = {"calibration": {"tokens": "abc"}}
    assert changed_fields({"calibration": None}, parts) == ["calibration.tokens: none -> abc"]
    assert changed_fields(parts, {"calibration": None}) == ["calibration.tokens: abc -> none"]


def test_an_element_of_a_list_is_named_by_its_index() -> None:
    assert changed_fields({"lengths": [128, 256]}, {"lengths": [128, 512]}) == ["lengths[1]: 256 -> 512"]


def test_a_list_and_a_tuple_of_the_same_values_do_not_differ() -> None:
    assert changed_fields({"lengths": [1, 2]}, {"lengths": (1, 2)}) == []


def test_another_upstream_artifact_is_one_line() -> None:
    old, new = ({"pool": {"stage": "pool", "key": digit * 64}} for digit in "ab")
    assert changed_fields(old, new) == ["pool: pool aaaaaaaa -> pool bbbbbbbb"]


def test_a_reference_is_one_leaf_by_key_and_by_digest() -> None:
    found = flatten({"pool": {"stage": "pool", "key": "a" * 64}, "tokens": {"stage": "pool", "digest": "c" * 64}})
    assert found == {"pool": Leaf("pool", key="a" * 64), "tokens": Leaf("pool", digest="c" * 64)}
    assert [str(each) for each in found.values()] == ["pool aaaaaaaa", "pool cccccccc"]


def test_what_has_more_than_a_stage_and_a_key_is_no_reference() -> None:
    assert flatten({"a": {"stage": "pool", "key": "k", "seed": 1}}) == {"a.stage": "pool", "a.key": "k", "a.seed": 1}


def test_empty_material_has_no_field() -> None:
    assert changed_fields({}, {"seed": 0}) == ["seed: none -> 0"]


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


# --- long values ---------------------------------------------------------------------------------------------------


def told(old: str, new: str) -> tuple[str, str]:
    """Return what a reason shows of an old and a new value."""
    (line,) = changed_fields({"m": old}, {"m": new})
    before, _, after = line.removeprefix("m: ").partition(" -> ")
    return before, after


def test_a_value_of_at_most_24_characters_is_shown_whole() -> None:
    assert told("a" * 23 + "b", "a" * 24) == ("a" * 23 + "b", "a" * 24)


def test_a_long_value_is_cut() -> None:
    assert told("x" * 500, "short") == ("xxxxxxxxxxxx…", "short")


def test_two_long_values_with_equal_beginnings_are_shown_where_they_part() -> None:
    found = told("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct")
    assert found == ("…LM2-135M-Instruc…", "…LM2-360M-Instruc…")


def test_two_long_values_that_part_at_once_are_shown_from_their_beginnings() -> None:
    assert told("1" + "0" * 63, "2" + "0" * 63) == ("100000000000…", "200000000000…")


def test_a_long_value_that_goes_on_where_the_other_ends_is_shown_there() -> None:
    assert told("a" * 30, "a" * 30 + "/tail") == ("…aaaa", "…aaaa/tail")


def test_a_long_value_beside_a_short_one_with_an_equal_beginning_is_shown_where_they_part() -> None:
    assert told("a" * 20, "a" * 20 + "b" * 20) == ("a" * 20, "…aaaabbbbbbbbbbbb…")


@given(
    start=st.text("ab/-", max_size=60),
    first=st.text("ab/-", max_size=60),
    second=st.text("ab/-", max_size=60),
)
def test_two_values_never_look_the_same_and_never_take_much_room(start: str, first: str, second: str) -> None:
    if first != second:
        before, after = told(start + first, start + second)
        assert before != after
        assert max(len(before), len(after)) <= LONGEST


# --- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [by_key, by_digest])
def test_a_changed_input_is_told_by_the_field_that_changed_in_it(by: Any) -> None:
    find = among({("pool", "a"): made_from({"seed": 0}), ("pool", "b"): made_from({"seed": 7})})
    old, new = (made_from({"pool": by("pool", name)}, ("pool", name)) for name in "ab")
    assert reason(new, (old, ""), find=find) == "seed: 0 -> 7"


def test_an_input_that_counts_now_by_its_digest_is_followed_too() -> None:
    find = among({("pool", "a"): made_from({"seed": 0}), ("pool", "b"): made_from({"seed": 7})})
    old = made_from({"pool": by_key("pool", "a")}, ("pool", "a"))
    new = made_from({"pool": by_digest("pool", "b")}, ("pool", "b"))
    assert reason(new, (old, ""), find=find) == "seed: 0 -> 7"


def test_an_input_is_found_by_its_digest_among_several() -> None:
    find = among(
        {
            ("pool", "a"): made_from({"seed": 0}),
            ("pool", "b"): made_from({"seed": 7}),
            ("model", "c"): made_from({"weights": "w"}),
        }
    )
    old, new = (
        made_from({"pool": by_digest("pool", name)}, ("model", "c"), ("pool", name), ("texts", "d")) for name in "ab"
    )
    assert reason(new, (old, ""), find=find) == "seed: 0 -> 7"


def chain(length: int, by: Any, change: Any) -> tuple[dict[tuple[str, str], Known], Known]:
    """Return artifacts that read each other, the first made from `change`, and what reads the last of them."""
    artifacts: dict[tuple[str, str], Known] = {}
    here = made_from({"seed": change, "same": 1})
    for step in range(length):
        name = f"{step}{change}"
        artifacts[("stage", name)] = here
        here = made_from({"input": by("stage", name), "same": 1}, ("stage", name))
    return artifacts, here


@pytest.mark.parametrize("by", [by_key, by_digest])
@pytest.mark.parametrize("length", range(1, DEEPEST + 1))
def test_a_change_is_followed_through_a_chain_of_stages(length: int, by: Any) -> None:
    (old, nearest), (new, wanted) = (chain(length, by, change) for change in (3, 5))
    assert reason(wanted, (nearest, ""), find=among(old | new)) == "seed: 3 -> 5"


def test_a_change_that_is_too_far_up_is_told_by_the_last_input_that_was_followed() -> None:
    (old, nearest), (new, wanted) = (chain(DEEPEST + 1, by_key, change) for change in (3, 5))
    assert reason(wanted, (nearest, ""), find=among(old | new)) == "input: stage 03000000 -> stage 05000000"


def test_inputs_that_go_round_in_a_circle_come_to_an_end() -> None:
    find = among({("pool", name): made_from({"pool": by_key("pool", name)}) for name in "ab"})
    found = reason_of({"pool": by_key("pool", "a")}, {"pool": by_key("pool", "b")}, find)
    assert found == "pool: pool a0000000 -> pool b0000000"


def test_a_changed_stage_version_of_an_input_is_named_with_its_stage() -> None:
    find = among({("pool", "a"): made_from({"seed": 0}), ("pool", "b"): made_from({"seed": 0}, version=3)})
    found = reason_of({"pool": by_key("pool", "a")}, {"pool": by_key("pool", "b")}, find)
    assert found == "pool stage version 1 -> 3"


def test_a_changed_stage_version_and_a_changed_field_of_an_input_are_both_named() -> None:
    find = among({("pool", "a"): made_from({"seed": 0}), ("pool", "b"): made_from({"seed": 1}, version=3)})
    found = reason_of({"pool": by_key("pool", "a")}, {"pool": by_key("pool", "b")}, find)
    assert found == "pool stage version 1 -> 3, seed: 0 -> 1"


@pytest.mark.parametrize("unknown", ["a", "b", "ab"])
def test_an_input_of_which_nothing_is_known_is_told_by_its_key(unknown: str) -> None:
    known = {("pool", "a"): made_from({"seed": 0}), ("pool", "b"): made_from({"seed": 7})}
    find = among({name: each for name, each in known.items() if name[1] not in unknown})
    found = reason_of({"pool": by_key("pool", "a")}, {"pool": by_key("pool", "b")}, find)
    assert found == "pool: pool a0000000 -> pool b0000000"


def test_an_input_whose_key_is_not_known_is_told_by_its_digest() -> None:
    find = among({("pool", "a"): made_from({"seed": 0}), ("pool", "b"): made_from({"seed": 7})})
    found = reason_of({"pool": by_digest("pool", "a")}, {"pool": by_digest("pool", "b")}, find)
    assert found == "pool: pool axxxxxxx -> pool bxxxxxxx"


def test_an_input_of_another_content_that_was_made_from_the_same_is_told_by_its_digest() -> None:
    find = among({("pool", "a"): made_from({"seed": 0})})
    old, new = (
        Known(1, {"pool": by_digest("pool", name)}, [("pool", key("a"), digest(name))]) for name in ("one", "two")
    )
    assert reason(new, (old, ""), find=find) == "pool: pool onexxxxx -> pool twoxxxxx"


def test_an_input_of_another_stage_is_not_followed() -> None:
    find = among({("pool", "a"): made_from({"seed": 0}), ("texts", "b"): made_from({"seed": 7})})
    found = reason_of({"from": by_key("pool", "a")}, {"from": by_key("texts", "b")}, find)
    assert found == "from: pool a0000000 -> texts b0000000"


def test_an_input_that_was_not_there_before_was_none() -> None:
    assert reason_of({"pool": None}, {"pool": by_key("pool", "a")}) == "pool: none -> pool a0000000"


def test_what_changed_in_an_input_stands_beside_what_changed_here() -> None:
    find = among({("pool", "a"): made_from({"seed": 0}), ("pool", "b"): made_from({"seed": 7})})
    old, new = {"pool": by_key("pool", "a"), "skip": 1}, {"pool": by_key("pool", "b"), "skip": 0}
    assert reason_of(old, new, find) == "seed: 0 -> 7, skip: 1 -> 0"


def test_a_field_that_changed_in_two_inputs_is_named_once() -> None:
    find = among(
        {
            **{("pool", name): made_from({"seed": seed}) for name, seed in (("a", 0), ("b", 7))},
            **{
                (stage, name): made_from({"pool": by_key("pool", name)})
                for stage in ("statistics", "texts")
                for name in "ab"
            },
        }
    )
    old, new = ({"s": by_key("statistics", name), "t": by_key("texts", name)} for name in "ab")
    assert reason_of(old, new, find) == "seed: 0 -> 7"


# --- lists of inputs -----------------------------------------------------------------------------------------------


def shards(names: Sequence[str], by: Any = by_key) -> Known:
    return made_from({"statistics": [by("statistics", name) for name in names]}, *(("statistics", n) for n in names))


@pytest.mark.parametrize("by", [by_key, by_digest])
def test_more_inputs_of_a_list_are_counted(by: Any) -> None:
    assert differences("outliers", shards("ab", by), shards("abcdef", by), nothing) == ["statistics: 4 more"]


@pytest.mark.parametrize("by", [by_key, by_digest])
def test_fewer_inputs_of_a_list_are_counted(by: Any) -> None:
    assert differences("outliers", shards("abcdef", by), shards("abcd", by), nothing) == ["statistics: 2 fewer"]


def test_more_than_ten_inputs_are_counted_together() -> None:
    assert differences("outliers", shards("ab"), shards("abcdefghijklmn"), nothing) == ["statistics: 12 more"]


def test_inputs_of_two_lists_are_counted_apart() -> None:
    old = made_from({"one": [by_key("pool", "a")], "two": [by_key("pool", name) for name in "abc"]})
    new = made_from({"one": [by_key("pool", name) for name in "abc"], "two": [by_key("pool", "a")]})
    assert differences("outliers", old, new, nothing) == ["one: 2 more", "two: 2 fewer"]


def test_shards_that_changed_in_one_way_are_one_line() -> None:
    find = among(
        {
            ("statistics", f"{skip}{shard}"): made_from({"skip": skip, "shard": shard})
            for skip in (0, 1)
            for shard in range(6)
        }
    )
    old, new = (shards([f"{skip}{shard}" for shard in range(6)]) for skip in (0, 1))
    assert differences("outliers", old, new, find) == ["skip: 0 -> 1"]


def test_a_list_whose_inputs_changed_and_grew_is_told_by_both() -> None:
    find = among({("statistics", f"{skip}"): made_from({"skip": skip}) for skip in (0, 1)})
    found = differences("outliers", shards(["0"]), shards(["1", "c", "d"]), find)
    assert found == ["skip: 0 -> 1", "statistics: 2 more"]


def test_a_longer_list_of_values_is_told_value_by_value() -> None:
    found = differences("pool", made_from({"lengths": [1]}), made_from({"lengths": [1, 2, 3]}), nothing)
    assert found == ["lengths[1]: none -> 2", "lengths[2]: none -> 3"]


@given(old=trees, new=trees)
def test_no_difference_is_told_twice(old: dict[str, Any], new: dict[str, Any]) -> None:
    lines = differences("pool", made_from(old), made_from(new), nothing)
    assert len(lines) == len(set(lines))
    assert bool(lines) == (canonical_json(old) != canonical_json(new))


# --- the nearest artifact ------------------------------------------------------------------------------------------


def test_the_first_of_a_stage_says_so() -> None:
    assert reason(made_from(OLD)) == "first of its stage"


def test_the_nearest_artifact_is_the_one_with_the_fewest_changes() -> None:
    far = made_from({**other_than(OLD, bits=8, method="rtn"), "seed": 5})
    near = made_from(other_than(OLD, bits=8))
    assert reason(made_from(OLD), (far, "2025-02-02"), (near, "2025-01-01")) == "quantization.bits: 8 -> 4"


OTHERS = [(made_from(other_than(OLD, bits=bits)), f"2025-01-0{bits}") for bits in (3, 8, 2)]


def test_of_two_equally_near_the_newest_is_chosen() -> None:
    assert reason(made_from(OLD), *OTHERS) == "quantization.bits: 8 -> 4"


def test_the_same_stage_version_is_nearer() -> None:
    same, other = made_from({"a": 2}, version=2), made_from({"a": 3})
    assert reason(made_from({"a": 1}, version=2), (same, "2025-01-01"), (other, "2025-02-02")) == "a: 2 -> 1"


def test_the_order_of_the_others_does_not_matter() -> None:
    assert reason(made_from(OLD), *OTHERS[::-1]) == reason(made_from(OLD), *OTHERS)


def test_a_change_of_the_stage_version_is_named_with_its_stage() -> None:
    assert reason(made_from(OLD, version=3), (made_from(OLD, version=2), "")) == "statistics stage version 2 -> 3"


def test_a_change_of_the_stage_version_comes_before_the_fields() -> None:
    found = reason(made_from(OLD, version=3), (made_from(other_than(OLD, bits=8), version=2), ""))
    assert found == "statistics stage version 2 -> 3, quantization.bits: 8 -> 4"


def test_three_changes_are_all_named() -> None:
    new, old = (dict.fromkeys("abc", value) for value in (1, 0))
    assert reason_of(old, new) == "a: 0 -> 1, b: 0 -> 1, c: 0 -> 1"


def test_of_more_than_three_changes_the_rest_is_counted() -> None:
    new, old = (dict.fromkeys("abcde", value) for value in (1, 0))
    assert reason_of(old, new) == "a: 0 -> 1, b: 0 -> 1, c: 0 -> 1, and 2 more"


def test_changes_of_an_input_count_as_those_that_they_are() -> None:
    old, new = (dict.fromkeys("abcde", value) for value in (0, 1))
    find = among({("pool", "a"): made_from(old), ("pool", "b"): made_from(new)})
    found = reason_of({"pool": by_key("pool", "a")}, {"pool": by_key("pool", "b")}, find)
    assert found == "a: 0 -> 1, b: 0 -> 1, c: 0 -> 1, and 2 more"


@pytest.mark.parametrize(("old", "new"), [({"x": 1}, {"x": 1.0}), ({"x": 1}, {"x": True}), ({}, {"x": None})])
def test_whatever_changes_a_key_is_named(old: dict, new: dict) -> None:
    assert reason_of(old, new) != ""
