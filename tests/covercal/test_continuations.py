"""Continuations against one forward pass for each pair, on every architecture."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from covercal import continuations
from covercal.continuations import (
    MIN_HEAD,
    Answer,
    Pair,
    Tokens,
    clustered,
    prompts_of,
    score_continuations,
    truncated,
    unshareable,
)
from covercal.decoder import Decoder, make_decoder
from covercal.errors import EvaluationError
from tests import tiny

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=70).map(tuple)


def drawn(draw: random.Random, low: int, high: int) -> Tokens:
    return tuple(draw.randrange(3, tiny.VOCABULARY) for _ in range(draw.randrange(low, high + 1)))


def some_pairs(seed: int = 0) -> list[Pair]:
    """Return pairs of every kind: shared contexts, shared examples, single tokens, long texts after one token."""
    draw = random.Random(seed)
    examples = drawn(draw, 60, 60)
    pairs: list[Pair] = []
    for _ in range(5):
        context = examples + drawn(draw, 25, 30)
        pairs += [(context, drawn(draw, 1, 6)) for _ in range(4)]
    for _ in range(4):
        context = examples[:50] + drawn(draw, 1, 12)
        pairs += [(context, drawn(draw, 1, 1)) for _ in range(4)]
    for _ in range(6):
        context = drawn(draw, 1, 20)
        pairs += [(context, drawn(draw, 1, 9)) for _ in range(draw.randrange(1, 4))]
    pairs += [(examples, drawn(draw, 2, 4)), (drawn(draw, 1, 1), drawn(draw, 200, 200)), pairs[0]]
    draw.shuffle(pairs)
    return pairs


def one_by_one(decoder: Decoder, pairs: list[Pair]) -> list[Answer]:
    answers = []
    for context, continuation in pairs:
        with torch.no_grad():
            logits = decoder.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
        wanted = torch.tensor(continuation)
        chances = torch.log_softmax(logits, -1).gather(1, wanted[:, None])
        answers.append((float(chances.sum()), bool((logits.argmax(-1) == wanted).all())))
    return answers


UNCACHED = ("rwkv", "mamba", "qwen3_next", "lfm2_moe", "nemotron_h", "openai-gpt")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens of every pass, filled-up ones among them."""
    counted: list[int] = []
    own = continuations._run

    def counting(decoder: Decoder, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        counted.append(ids.numel())
        return own(decoder, ids, cache)

    monkeypatch.setattr(continuations, "_run", counting)
    return counted


@pytest.mark.parametrize(
    "architecture", [*tiny.ARCHITECTURES, *tiny.MIXTURES, *(name for name in tiny.OTHERS if name not in UNCACHED)]
)
def test_every_pair_has_the_likelihood_that_a_pass_of_its_own_gives(architecture: str) -> None:
    decoder = make_decoder(tiny.tiny_model(architecture))
    pairs = some_pairs()
    greedy = [(context, (int(decoder.model(torch.tensor([context])).logits[0, -1].argmax()),)) for context, _ in pairs]
    assert unshareable(decoder) == ""
    found, expected = score_continuations(decoder, pairs + greedy), one_by_one(decoder, pairs + greedy)
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4, rel=1e-6)
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]
    assert sum(answer[1] for answer in found) >= len(greedy)


@pytest.mark.parametrize("architecture", UNCACHED)
def test_a_state_that_is_no_cache_of_keys_and_values_is_not_shared(architecture: str) -> None:
    assert "cache" in unshareable(make_decoder(tiny.tiny_model(architecture)))


@pytest.mark.parametrize(("name", "value"), [("PASS_TOKENS", 1), ("CACHED_TOKENS", 1), ("LOGIT_TOKENS", 1)])
@pytest.mark.parametrize("saved", [0, 10**9])
def test_how_much_is_held_at_once_changes_nothing(
    name: str, value: int, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(tiny.tiny_model())
    expected = score_continuations(decoder, some_pairs())
    monkeypatch.setattr(continuations, name, value)
    monkeypatch.setattr(continuations, "MIN_SAVED", saved)
    found = score_continuations(decoder, some_pairs())
    assert [answer[0] for answer in found] == pytest.approx([answer[0] for answer in expected], abs=1e-4, rel=1e-6)


def test_the_choices_of_a_long_context_run_it_once(passes: list[int]) -> None:
    context, choices = tuple(range(3, 203)), [(5, 6, 7), (8, 9, 10), (11, 12, 13), (14, 15, 16)]
    score_continuations(make_decoder(tiny.tiny_model()), [(context, choice) for choice in choices])
    assert sum(passes) == 200 + 4 * 2


def test_what_the_questions_of_a_subject_begin_with_runs_once(passes: list[int]) -> None:
    examples = tuple(range(3, 103))
    contexts = [examples + (question,) * 10 for question in (200, 201, 202)]
    pairs = [(context, (choice,)) for context in contexts for choice in (5, 6, 7, 8)]
    score_continuations(make_decoder(tiny.tiny_model()), pairs)
    assert sum(passes) == 100 + 3 * 10


def test_contexts_without_anything_in_common_run_together(passes: list[int]) -> None:
    pairs = [((first, *range(60, 70)), (5, 6)) for first in range(3, 53)]
    score_continuations(make_decoder(tiny.tiny_model()), pairs)
    assert (len(passes), sum(passes)) == (1, 50 * 12)


def test_logits_are_made_of_no_more_tokens_than_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    own = continuations.head_logits

    def counting(decoder: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        counted.append(hidden.shape[1])
        return own(decoder, hidden)

    monkeypatch.setattr(continuations, "head_logits", counting)
    pairs = some_pairs()
    score_continuations(make_decoder(tiny.tiny_model()), pairs)
    assert sum(counted) == sum(len(continuation) for _, continuation in set(pairs))


def test_progress_counts_every_pair_that_was_asked() -> None:
    done: list[int] = []
    pairs = some_pairs()
    score_continuations(make_decoder(tiny.tiny_model()), pairs, advance=done.append)
    assert sum(done) == len(pairs)


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=12))
@settings(deadline=None)
def test_clusters_hold_every_pair_once_and_begin_as_all_their_contexts_do(pairs: list[Pair]) -> None:
    clusters = clustered(prompts_of(pairs))
    held = [(p.context, each) for c in clusters for p in c.prompts for each in p.continuations]
    assert sorted(held) == sorted(set(pairs))
    for cluster in clusters:
        assert all(p.context[: len(cluster.head)] == cluster.head for p in cluster.prompts)
        assert all(len(p.context) > len(cluster.head) for p in cluster.prompts)
        assert not cluster.head or (len(cluster.head) >= MIN_HEAD and len(cluster.prompts) > 1)


def test_what_is_too_long_loses_its_beginning() -> None:
    assert truncated((1, 2, 3), (4, 5), 4) == ((1, 2, 3), (4, 5))
    assert truncated((1, 2, 3), (4, 5), 3) == ((2, 3), (4, 5))
    assert truncated((1, 2, 3), (4, 5), 2) == ((3,), (4, 5))


@pytest.mark.parametrize("continuation", [(), (4, 5, 6)])
def test_a_continuation_that_does_not_fit_is_an_error(continuation: Tokens) -> None:
    with pytest.raises(EvaluationError, match=f"A continuation of {len(continuation)} tokens cannot be scored"):
        truncated((1, 2), continuation, 2)


def test_a_model_that_forgets_what_it_is_given_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tiny.tiny_model())
    monkeypatch.setattr(continuations, "_run", lambda d, ids, cache: d.body(input_ids=ids, use_cache=False)[0])
    monkeypatch.setattr(continuations.DynamicCache, "batch_repeat_interleave", lambda self, rows: None)
    assert unshareable(decoder) == "LlamaForCausalLM gives other outputs when it goes on from its cache"


def test_a_cache_that_cannot_have_more_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, rows: int) -> None:
        raise NotImplementedError("no rows")

    monkeypatch.setattr(continuations.DynamicCache, "batch_repeat_interleave", refuse)
    assert unshareable(make_decoder(tiny.tiny_model())) == "the cache of LlamaForCausalLM cannot be shared: no rows"
