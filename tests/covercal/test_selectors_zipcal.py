"""Greedy cover of words against sets of words."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal.selectors.registry import Evidence, Order, selector


def zipcal(texts: list[str], extent: int | None = None) -> Order:
    return selector("zipcal").order(Evidence(len(texts), texts=texts), len(texts) if extent is None else extent, seed=0)


def plain_greedy(texts: list[str]) -> tuple[list[int], list[int], list[int]]:
    """Recompute every gain at every step; return order, gains and rounds."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    left, covered, current = list(range(len(texts))), set(), 0
    order, gains, rounds = [], [], []
    while left:
        best = max(left, key=lambda s: (len(words[s] - covered), len(words[s]), -s))
        if not words[best] - covered and covered:
            covered, current = set(), current + 1
            continue
        if not words[best]:
            best = left[0]
        left.remove(best)
        order.append(best)
        gains.append(len(words[best] - covered))
        rounds.append(current)
        covered |= words[best]
    return order, gains, rounds


texts_of_few_words = st.lists(
    st.lists(st.sampled_from(list("abcdefghAB")), max_size=7).map(" ".join), min_size=1, max_size=14
)


@settings(deadline=None, max_examples=300)
@given(texts_of_few_words)
def test_the_order_is_plain_greedys(texts: list[str]) -> None:
    order, gains, _ = plain_greedy(texts)
    found = zipcal(texts)
    assert found.samples.tolist() == order
    assert found.gains.tolist() == gains


@settings(deadline=None, max_examples=200)
@given(texts_of_few_words)
def test_rounds_of_samples_with_words_are_plain_greedys(texts: list[str]) -> None:
    _, gains, rounds = plain_greedy(texts)
    speaking = [r for r, g in zip(rounds, gains, strict=True) if g]
    assert zipcal(texts).rounds[: len(speaking)].tolist() == speaking


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_vocabulary_gives_plain_greedys_order(seed: int) -> None:
    generator = np.random.default_rng(seed)
    texts = [" ".join(f"w{w}" for w in np.minimum(generator.zipf(1.3, 40), 400)) for _ in range(60)]
    assert zipcal(texts).samples.tolist() == plain_greedy(texts)[0]


def test_among_equal_gains_the_sample_with_most_words_is_chosen() -> None:
    texts = ["a b c d", "a e f", "a b e f", "e f"]
    assert zipcal(texts).samples.tolist()[:2] == [0, 2]


def test_case_and_punctuation_do_not_make_words() -> None:
    assert zipcal(["Word, word! WORD?", "two words"]).gains.tolist() == [2.0, 1.0]


def test_letters_of_any_script_make_words() -> None:
    assert zipcal(["Größe größe ÉTÉ été слово 数 2 _x"]).gains.tolist() == [6.0]


def test_texts_without_words_come_last_by_index() -> None:
    found = zipcal(["", "...", "a", " \n", "a b"])
    assert found.samples.tolist() == [4, 2, 0, 1, 3]
    assert found.gains.tolist() == [2.0, 1.0, 0.0, 0.0, 0.0]


def test_when_nothing_new_is_left_the_next_round_begins() -> None:
    found = zipcal(["a b", "a b", "c"])
    assert (found.samples.tolist(), found.rounds.tolist()) == ([0, 2, 1], [0, 0, 1])


def test_words_come_from_the_text_and_nothing_else() -> None:
    evidence = Evidence(2, texts=["a", "a b"], domains=["x y z", ""])
    other = replace(evidence, domains=["", ""])
    assert all(selector("zipcal").order(e, 2, 0).samples.tolist() == [1, 0] for e in (evidence, other))
