"""Scores against float64 formulas and transformers' own loss."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from covercal.decoder import Decoder, head_logits, make_decoder
from covercal.evaluation import (
    HEAD_TOKENS,
    SequenceScores,
    kl_divergence,
    mean_and_error,
    mean_losses,
    next_token_losses,
    perplexity,
    reference_outputs,
    score,
)
from tests.tiny import ARCHITECTURES, WIDTH, random_tokens, tiny_model

Floats = npt.NDArray[np.float64]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def log_softmax(values: Floats) -> Floats:
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(original: Floats, quantized: Floats) -> Floats:
    p, q = log_softmax(original), log_softmax(quantized)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def model_logits(decoder: Decoder, sequence: npt.NDArray[np.int32]) -> Floats:
    with torch.inference_mode():
        return decoder.model(input_ids=torch.from_numpy(sequence.astype(np.int64))[None]).logits[0].double().numpy()


def random_logits(seed: int, tokens: int, vocabulary: int, size: float) -> Tensor:
    return size * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


logit_pairs = st.builds(
    lambda seed, tokens, vocabulary, size, step: (
        random_logits(seed, tokens, vocabulary, size),
        random_logits(seed, tokens, vocabulary, size) + random_logits(seed + 1, tokens, vocabulary, step),
    ),
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(2, 400),
    st.sampled_from([0.1, 1.0, 10.0]),
    st.sampled_from([1e-4, 0.1, 1.0, 10.0]),
)


def _divergence_of_logits(original: Tensor, quantized: Tensor) -> Tensor:
    return kl_divergence(torch.log_softmax(original, dim=-1), torch.log_softmax(quantized, dim=-1))


# --- divergence and losses -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(logit_pairs)
def test_divergence_is_the_float64_formula(pair: tuple[Tensor, Tensor]) -> None:
    original, quantized = pair
    expected = divergence(original.double().numpy(), quantized.double().numpy())
    np.testing.assert_allclose(_divergence_of_logits(original, quantized).numpy(), expected, rtol=1e-5, atol=2e-6)


@settings(deadline=None, max_examples=100)
@given(logit_pairs)
def test_divergence_is_not_negative_beyond_float32_rounding(pair: tuple[Tensor, Tensor]) -> None:
    assert (_divergence_of_logits(*pair) >= -2e-6).all()


@settings(deadline=None, max_examples=50)
@given(logit_pairs)
def test_divergence_of_equal_logits_is_zero(pair: tuple[Tensor, Tensor]) -> None:
    assert (_divergence_of_logits(pair[0], pair[0]) == 0).all()


def test_divergence_of_known_distributions_is_known() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert _divergence_of_logits(p, q).item() == pytest.approx(0.5 * math.log(2) - 0.5 * math.log(1.5), rel=1e-6)


def test_divergence_is_taken_from_the_original_to_the_quantised() -> None:
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert _divergence_of_logits(p, q).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)


def test_adding_a_constant_to_all_logits_of_a_token_changes_no_divergence() -> None:
    p, q = random_logits(0, 4, 50, 1.0), random_logits(1, 4, 50, 1.0)
    torch.testing.assert_close(_divergence_of_logits(p + 7, q - 3), _divergence_of_logits(p, q), rtol=1e-5, atol=1e-6)


def test_losses_are_negative_log_likelihoods() -> None:
    logits, targets = random_logits(3, 6, 40, 3.0), torch.tensor([0, 39, 7, 7, 1, 20])
    expected = -log_softmax(logits.double().numpy())[np.arange(6), targets.numpy()]
    np.testing.assert_allclose(next_token_losses(logits, targets).numpy(), expected, rtol=1e-5, atol=1e-6)


# --- means ---------------------------------------------------------------------------------------------------------


def test_perplexity_weighs_sequences_by_their_tokens() -> None:
    scores = [SequenceScores(3, math.log(2.0)), SequenceScores(1, math.log(32.0))]
    assert perplexity(scores) == pytest.approx(4.0)  # (8 * 32) ** (1 / 4)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_the_standard_error_is_the_sample_deviation_over_the_root_of_the_count(values: list[float]) -> None:
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    assert mean_and_error(values) == pytest.approx((mean, error), rel=1e-9, abs=1e-9)


def test_a_single_value_has_no_standard_error() -> None:
    mean, error = mean_and_error([2.5])
    assert mean == 2.5
    assert math.isnan(error)


# --- the original model --------------------------------------------------------------------------------------------


@every_architecture
def test_perplexity_is_exp_of_transformers_own_loss(architecture: str) -> None:
    decoder, sequences = make_decoder(tiny_model(architecture)), random_tokens(4, 24, 5)
    ids = torch.from_numpy(np.stack(sequences).astype(np.int64))
    with torch.inference_mode():
        expected = math.exp(decoder.model(input_ids=ids, labels=ids).loss)
    assert perplexity(score(decoder, decoder, sequences, None)) == pytest.approx(expected, rel=1e-5)


def test_the_reference_keeps_the_loss_of_every_token() -> None:
    decoder, sequences = make_decoder(tiny_model()), random_tokens(3, 12, 5)
    losses = reference_outputs(decoder, sequences, keep_hidden=False).losses
    assert losses.shape == (3, 11)
    for row, sequence in zip(losses, sequences, strict=True):
        expected = -log_softmax(model_logits(decoder, sequence)[:-1])[np.arange(11), sequence[1:]]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)


def test_sequences_longer_than_one_piece_of_the_head_lose_no_token() -> None:
    decoder, (sequence,) = make_decoder(tiny_model()), random_tokens(1, HEAD_TOKENS + 45, 6)
    losses = reference_outputs(decoder, [sequence], keep_hidden=False).losses
    targets = sequence[1:]
    expected = -log_softmax(model_logits(decoder, sequence)[:-1])[np.arange(targets.size), targets]
    np.testing.assert_allclose(losses[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_architecture
def test_the_models_logits_follow_exactly_from_the_hidden_states_kept(architecture: str, dtype: torch.dtype) -> None:
    decoder, sequences = make_decoder(tiny_model(architecture).to(dtype)), random_tokens(3, 12, 5)
    hidden = reference_outputs(decoder, sequences, keep_hidden=True).hidden
    for index, sequence in enumerate(sequences):
        rows = torch.from_numpy(hidden[index * 12 : (index + 1) * 12]).to(dtype)[None]
        found = head_logits(decoder, rows)[0].double().numpy()
        np.testing.assert_array_equal(found, model_logits(decoder, sequence))


def test_hidden_states_are_kept_in_float32_one_row_a_token() -> None:
    decoder = make_decoder(tiny_model().to(torch.bfloat16))
    hidden = reference_outputs(decoder, random_tokens(3, 12, 5), keep_hidden=True).hidden
    assert (hidden.dtype, hidden.shape) == (np.float32, (36, WIDTH))


def test_hidden_states_are_not_kept_when_only_losses_are_asked_for() -> None:
    assert reference_outputs(make_decoder(tiny_model()), random_tokens(2, 9), keep_hidden=False).hidden is None


# --- mean losses of samples ----------------------------------------------------------------------------------------

LENGTHS = (24, 5, 2, 24, HEAD_TOKENS, HEAD_TOKENS + 1, HEAD_TOKENS + 2, 31)


def mixed() -> list[npt.NDArray[np.int32]]:
    """Return samples of mixed lengths, two of them longer than one piece of the head."""
    return [random_tokens(1, length, 20 + index)[0] for index, length in enumerate(LENGTHS)]


def own_loss(decoder: Decoder, sample: npt.NDArray[np.int32]) -> float:
    """Return the model's cross-entropy of one sample as transformers computes it."""
    ids = torch.from_numpy(sample.astype(np.int64))[None]
    with torch.inference_mode():
        return float(decoder.model(input_ids=ids, labels=ids).loss)


@every_architecture
def test_the_mean_loss_of_a_sample_is_the_models_own_cross_entropy(architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    expected = [own_loss(decoder, sample) for sample in mixed()]
    np.testing.assert_allclose(mean_losses(decoder, mixed()), expected, rtol=1e-5)


def test_the_mean_loss_of_a_sample_is_the_float64_formula() -> None:
    decoder = make_decoder(tiny_model())
    for sample, found in zip(mixed(), mean_losses(decoder, mixed()), strict=True):
        rows = log_softmax(model_logits(decoder, sample)[:-1])
        assert found == pytest.approx(-rows[np.arange(sample.size - 1), sample[1:]].mean(), rel=1e-5)


def test_a_16_bit_models_mean_losses_are_taken_from_float32_logits() -> None:
    decoder = make_decoder(tiny_model().to(torch.bfloat16))
    expected = [own_loss(decoder, sample) for sample in mixed()]
    found = mean_losses(decoder, mixed())
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_samples_mean_loss_does_not_depend_on_the_others() -> None:
    decoder = make_decoder(tiny_model())
    together, turned = mean_losses(decoder, mixed()), mean_losses(decoder, mixed()[::-1])
    assert turned[::-1].tolist() == together.tolist()
    assert [mean_losses(decoder, [sample])[0] for sample in mixed()] == together.tolist()


def test_the_mean_loss_is_that_of_the_reference() -> None:
    decoder, samples = make_decoder(tiny_model()), random_tokens(3, 24, 5)
    expected = reference_outputs(decoder, samples, keep_hidden=False).losses.mean(axis=1, dtype=np.float64)
    assert mean_losses(decoder, samples).tolist() == expected.tolist()


def test_no_sample_has_no_loss() -> None:
    assert mean_losses(make_decoder(tiny_model()), []).shape == (0,)


def test_progress_counts_every_sample_whose_loss_is_there() -> None:
    counted: list[int] = []
    mean_losses(make_decoder(tiny_model()), mixed(), advance=counted.append)
    assert counted == [1] * len(LENGTHS)


# --- the original against another ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_architecture
def test_the_original_does_not_diverge_from_itself(architecture: str, dtype: torch.dtype) -> None:
    decoder, sequences = make_decoder(tiny_model(architecture).to(dtype)), random_tokens(3, 24, 5)
    hidden = reference_outputs(decoder, sequences, keep_hidden=True).hidden
    for each in score(decoder, decoder, sequences, hidden):
        assert abs(each.divergence) < 1e-6
        assert each.agreement == 1.0


@pytest.fixture(scope="module")
def pair() -> tuple[Decoder, Decoder]:
    """An original, and a copy with noisy weights, head included, in the place of a quantised one."""
    original, noisy = tiny_model(), tiny_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return make_decoder(noisy), make_decoder(original)


def scored(pair: tuple[Decoder, Decoder], sequences: list[npt.NDArray[np.int32]]) -> list[SequenceScores]:
    quantized, original = pair
    hidden = reference_outputs(original, sequences, keep_hidden=True).hidden
    return score(quantized, original, sequences, hidden)


@pytest.mark.parametrize("length", [24, HEAD_TOKENS + 1, HEAD_TOKENS + 45])
def test_a_sequences_divergence_is_the_mean_over_its_predicted_tokens(
    length: int, pair: tuple[Decoder, Decoder]
) -> None:
    sequences = random_tokens(2, length, 7)
    for each, sequence in zip(scored(pair, sequences), sequences, strict=True):
        q, p = (model_logits(decoder, sequence)[:-1] for decoder in pair)
        assert each.divergence == pytest.approx(float(divergence(p, q).mean()), rel=1e-4)


@pytest.mark.parametrize("length", [24, HEAD_TOKENS + 45])
def test_agreement_is_the_share_of_tokens_with_the_same_most_likely_successor(
    length: int, pair: tuple[Decoder, Decoder]
) -> None:
    sequences = random_tokens(2, length, 7)
    for each, sequence in zip(scored(pair, sequences), sequences, strict=True):
        q, p = (model_logits(decoder, sequence)[:-1].argmax(axis=1) for decoder in pair)
        assert each.agreement == pytest.approx(float((p == q).mean()))


@pytest.mark.parametrize("length", [24, HEAD_TOKENS + 45])
def test_a_sequences_loss_is_the_quantised_models_own(length: int, pair: tuple[Decoder, Decoder]) -> None:
    sequences = random_tokens(2, length, 7)
    for each, sequence in zip(scored(pair, sequences), sequences, strict=True):
        q = log_softmax(model_logits(pair[0], sequence)[:-1])
        assert each.loss == pytest.approx(float(-q[np.arange(length - 1), sequence[1:]].mean()), rel=1e-4)


def test_the_loss_is_the_same_with_and_without_a_comparison(pair: tuple[Decoder, Decoder]) -> None:
    sequences = random_tokens(3, 24, 7)
    alone = score(*pair, sequences, None)
    assert [s.loss for s in alone] == pytest.approx([s.loss for s in scored(pair, sequences)], rel=1e-6)


def test_without_hidden_states_nothing_is_compared(pair: tuple[Decoder, Decoder]) -> None:
    (alone,) = score(*pair, random_tokens(1, 24, 7), None)
    assert math.isnan(alone.divergence)
    assert math.isnan(alone.agreement)


def test_a_sequence_predicts_all_its_tokens_but_the_first(pair: tuple[Decoder, Decoder]) -> None:
    assert [s.tokens for s in scored(pair, random_tokens(3, 24, 7))] == [23, 23, 23]


def test_a_sequences_scores_do_not_depend_on_the_others(pair: tuple[Decoder, Decoder]) -> None:
    sequences = random_tokens(3, 24, 7)
    assert scored(pair, sequences)[1] == scored(pair, sequences[1:2])[0]


def test_progress_counts_every_sequence(pair: tuple[Decoder, Decoder]) -> None:
    counted: list[int] = []
    score(*pair, random_tokens(3, 24, 7), None, counted.append)
    assert sum(counted) == 3
