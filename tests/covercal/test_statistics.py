"""Activation statistics against float64 sums over what independent hooks see, one sample at a time."""

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from covercal import statistics
from covercal.decoder import Decoder, make_decoder
from covercal.errors import ActivationError
from covercal.statistics import ActivationStatistics, capture, column_norms, measured_sites
from tests.tiny import ARCHITECTURES, BLOCKS, INNER, WIDTH, random_tokens, tiny_model

Floats = npt.NDArray[np.float64]
Sequences = list[npt.NDArray[np.int32]]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
MIXED = [*random_tokens(4, 12, 1), *random_tokens(3, 9, 2), *random_tokens(2, 12, 3), *random_tokens(1, 5, 4)]


def seen_inputs(decoder: Decoder, sequence: npt.NDArray[np.int32]) -> dict[str, Floats]:
    """Return the input of every linear in the blocks for one sample alone, float64 (tokens, channels), by full name."""
    seen: dict[str, Floats] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            seen[name] = inputs[0].reshape(sequence.size, -1).double().numpy()

        return hook

    hooks = [
        module.register_forward_hook(note(name))
        for name, module in decoder.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(decoder.blocks_path)
    ]
    with torch.inference_mode():
        decoder.model(input_ids=torch.from_numpy(sequence.astype(np.int64))[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def oracle(decoder: Decoder, sequences: Sequences, skip: int, sites: str = "linear_inputs") -> dict[str, Floats | int]:
    rows: list[list[Floats]] = []
    for sequence in sequences:
        seen = seen_inputs(decoder, sequence)
        chosen = [s for s in decoder.sites if sites == "linear_inputs" or s.order == 0]
        inputs = [seen[decoder.full_name(s, s.linears[-1])][skip:] for s in chosen]
        reduced = [np.concatenate([reduce(np.abs(x)) for x in inputs]) for reduce in REDUCTIONS]
        means = [x.mean(axis=0) for x, site in zip(inputs, chosen, strict=True) if site.order == 0]
        directions = np.concatenate([mean / np.linalg.norm(mean) for mean in means])
        whole = [np.array([reduce(x) for x in inputs]) for reduce in (np.var, lambda x: np.abs(x).mean())]
        rows.append([*reduced, *whole, directions])
    peak, energy, absolute, square, variance, magnitude, directions = (
        np.stack(each) for each in zip(*rows, strict=True)
    )
    return {
        "peak": peak,
        "energy": energy,
        "variance": variance,
        "magnitude": magnitude,
        "directions": directions,
        "sketch": directions @ np.concatenate([projection(block) for block in range(BLOCKS)]),
        "absolute_sum": absolute.sum(axis=0),
        "square_sum": square.sum(axis=0),
        "tokens": sum(s.size - skip for s in sequences),
    }


def projection(block: int, channels: int = WIDTH) -> Floats:
    """Return the Gaussian matrix of a block, (channels, 64): one for all pools, so that sketches of two compare."""
    drawn = np.random.default_rng([0, block]).standard_normal((channels, 64), dtype=np.float32)
    return drawn.astype(np.float64) / 8


FIELDS = ("peak", "energy", "variance", "magnitude", "sketch", "absolute_sum", "square_sum")
OF_SAMPLES = FIELDS[:5]
every_field = pytest.mark.parametrize("field", FIELDS)
REDUCTIONS: tuple[Callable[[Floats], Floats], ...] = (
    lambda x: x.max(axis=0),
    lambda x: (x**2).mean(axis=0),
    lambda x: x.sum(axis=0),
    lambda x: (x**2).sum(axis=0),
)


def names(sequences: Sequences) -> list[str]:
    return [f"sample-{index}" for index in range(len(sequences))]


def captured(
    decoder: Decoder, sequences: Sequences, skip: int = 1, sites: str = "linear_inputs"
) -> ActivationStatistics:
    return capture(decoder, sequences, names(sequences), sites=sites, skip_tokens=skip)


# --- against the oracle --------------------------------------------------------------------------------------------


@every_architecture
@every_field
def test_statistics_are_those_of_each_sample_alone(field: str, architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    expected = oracle(decoder, MIXED, 1)[field]
    found = getattr(captured(decoder, MIXED), field)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("field", [*FIELDS, "tokens"])
def test_skipped_tokens_do_not_count(field: str, skip: int) -> None:
    decoder = make_decoder(tiny_model())
    expected = oracle(decoder, MIXED, skip)[field]
    np.testing.assert_allclose(getattr(captured(decoder, MIXED, skip), field), expected, rtol=1e-5, atol=1e-5)


@every_architecture
def test_block_inputs_are_the_first_site_of_every_block(architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    found = captured(decoder, MIXED, sites="block_inputs")
    assert found.peak.shape == (len(MIXED), BLOCKS * WIDTH)
    np.testing.assert_allclose(found.peak, oracle(decoder, MIXED, 1, "block_inputs")["peak"], rtol=1e-5, atol=1e-5)


def test_linear_inputs_have_one_column_for_every_channel_of_every_site() -> None:
    found = captured(make_decoder(tiny_model()), MIXED)
    assert found.peak.shape == found.energy.shape == (len(MIXED), BLOCKS * (3 * WIDTH + INNER))


@pytest.mark.parametrize(("sites", "count"), [("linear_inputs", 4 * BLOCKS), ("block_inputs", BLOCKS)])
def test_variance_and_magnitude_have_one_column_for_every_site(sites: str, count: int) -> None:
    found = captured(make_decoder(tiny_model()), MIXED, sites=sites)
    assert found.variance.shape == found.magnitude.shape == (len(MIXED), count)


def test_a_variance_is_never_negative() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)  # what enters the first block is the same everywhere
    found = captured(make_decoder(model), [*MIXED, *random_tokens(1, 300)])
    np.testing.assert_allclose(found.variance[:, 0], 0, atol=1e-5)
    assert (found.variance >= 0).all()


def test_neither_the_variance_nor_the_squared_magnitude_exceeds_the_mean_square() -> None:
    found = captured(make_decoder(tiny_model()), MIXED)
    mean_square = found.energy[:, :WIDTH].mean(axis=1, dtype=np.float64)
    assert (found.variance[:, 0] <= mean_square * (1 + 1e-6)).all()
    assert (found.magnitude[:, 0] ** 2 <= mean_square * (1 + 1e-6)).all()


def test_a_sample_that_peaks_in_its_first_token_only_loses_that_peak_when_it_is_skipped() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
        model.model.embed_tokens.weight[7, 3] = 50  # after normalisation, channel 3 stands out wherever token 7 is
    decoder = make_decoder(model)
    sample = random_tokens(1, 10)[0]
    sample[0], sample[1:] = 7, 9
    with_first, without = captured(decoder, [sample], 0).peak[0, 3], captured(decoder, [sample], 1).peak[0, 3]
    assert with_first == pytest.approx(WIDTH**0.5, rel=1e-3)
    assert without < with_first / 2


# --- sketches ------------------------------------------------------------------------------------------------------


def distortion(sketch: Floats, inner: Floats, blocks: int) -> Floats:
    """Return by how much inner products of sketches miss those of the whole, in standard deviations.

    For vectors of length sqrt(blocks), the projection to 64 numbers has variance (blocks**2 + inner**2) / 64.
    """
    wide = sketch.astype(np.float64)
    return (wide @ wide.T - inner) / np.sqrt((blocks**2 + inner**2) / 64)


def test_inner_products_of_sketches_are_the_sums_of_cosines_as_far_as_64_numbers_can_tell() -> None:
    decoder, samples = make_decoder(tiny_model()), random_tokens(40, 8, 3)
    directions = oracle(decoder, samples, 1)["directions"]
    missed = distortion(captured(decoder, samples).sketch, directions @ directions.T, BLOCKS)
    assert np.abs(missed).max() < 5
    assert np.sqrt((missed**2).mean()) < 1.5


@pytest.mark.parametrize("common", [0.0, 0.7, 3.0])
def test_sketches_of_wide_blocks_keep_sums_of_cosines_within_johnson_and_lindenstrauss(common: float) -> None:
    generator, blocks = np.random.default_rng(1), 6
    sketch, inner = np.zeros((60, 64)), np.zeros((60, 60))
    for block in range(blocks):
        sums = (generator.standard_normal((60, 700)) + common * generator.standard_normal(700)).astype(np.float32)
        directions = sums / np.linalg.norm(sums.astype(np.float64), axis=1, keepdims=True)
        sketch += statistics._projected(sums, block)
        inner += directions @ directions.T
    missed = distortion(sketch, inner, blocks)
    assert np.abs(missed).max() < 5
    assert np.sqrt((missed**2).mean()) < 1.5


def test_a_sketch_is_made_of_the_first_sites_of_the_blocks_alone() -> None:
    decoder = make_decoder(tiny_model())
    of_blocks, of_linears = (captured(decoder, MIXED, sites=s).sketch for s in ("block_inputs", "linear_inputs"))
    assert of_blocks.shape == (len(MIXED), 64)
    np.testing.assert_array_equal(of_blocks, of_linears)


def test_every_block_has_a_projection_of_its_own() -> None:
    sums = np.random.default_rng(0).standard_normal((1, 500)).astype(np.float32)
    first, second = (statistics._projected(sums, block)[0].astype(np.float64) for block in (0, 1))
    assert np.abs(first @ second) < 0.5 * np.linalg.norm(first) * np.linalg.norm(second)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_length_of_a_mean_token_does_not_count(scale: float) -> None:
    sums = np.random.default_rng(0).standard_normal((5, 90)).astype(np.float32)
    plain, scaled = (statistics._projected(sums * np.float32(factor), 2) for factor in (1.0, scale))
    np.testing.assert_allclose(scaled, plain, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(statistics._projected(-sums, 2), -plain, rtol=1e-6, atol=1e-7)


def test_a_block_whose_mean_token_is_zero_adds_nothing() -> None:
    sums = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32)
    sums[1] = 0
    found = statistics._projected(sums, 0)
    assert (found[1] == 0).all()
    np.testing.assert_allclose(found[[0, 2]], statistics._projected(sums[[0, 2]], 0), rtol=1e-6, atol=1e-7)


# --- batching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 24, 10_000])
@every_field
def test_the_size_of_batches_does_not_matter(field: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tiny_model())
    expected = getattr(captured(decoder, MIXED), field)
    monkeypatch.setattr(statistics, "BATCH_TOKENS", limit)
    np.testing.assert_allclose(getattr(captured(decoder, MIXED), field), expected, rtol=1e-5, atol=1e-6)


def test_rows_stay_with_their_samples_when_lengths_are_mixed() -> None:
    decoder = make_decoder(tiny_model())
    turned, plain = captured(decoder, list(reversed(MIXED))), captured(decoder, MIXED)
    for field in OF_SAMPLES:
        np.testing.assert_allclose(getattr(turned, field)[::-1], getattr(plain, field), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field", OF_SAMPLES)
def test_a_sample_has_the_same_statistics_in_another_pool(field: str) -> None:
    decoder = make_decoder(tiny_model())
    others = [*random_tokens(5, 12, 8), *random_tokens(2, 30, 9)]
    alone = [getattr(captured(decoder, [sample]), field)[0] for sample in MIXED]
    np.testing.assert_allclose(getattr(captured(decoder, MIXED), field), alone, rtol=1e-5, atol=1e-6)
    found = getattr(captured(decoder, [*others, *MIXED]), field)[len(others) :]
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)


def test_sums_over_shards_add_up_to_the_whole() -> None:
    decoder = make_decoder(tiny_model())
    whole, parts = captured(decoder, MIXED), [captured(decoder, MIXED[:4]), captured(decoder, MIXED[4:])]
    np.testing.assert_allclose(sum(p.absolute_sum for p in parts), whole.absolute_sum, rtol=1e-6)
    np.testing.assert_allclose(sum(p.square_sum for p in parts), whole.square_sum, rtol=1e-6)
    assert sum(p.tokens for p in parts) == whole.tokens


def test_two_captures_give_the_same_bytes() -> None:
    decoder = make_decoder(tiny_model())
    first, second = captured(decoder, MIXED), captured(decoder, MIXED)
    for field in FIELDS:
        assert getattr(first, field).tobytes() == getattr(second, field).tobytes()


def test_progress_counts_every_sample_once() -> None:
    counted: list[int] = []
    capture(make_decoder(tiny_model()), MIXED, names(MIXED), advance=counted.append)
    assert sum(counted) == len(MIXED)


def test_dtypes_are_as_promised() -> None:
    found = captured(make_decoder(tiny_model().to(torch.bfloat16)), MIXED)
    assert {getattr(found, field).dtype for field in OF_SAMPLES} == {np.dtype(np.float32)}
    assert (found.absolute_sum.dtype, found.square_sum.dtype) == (np.float64, np.float64)


def test_bfloat16_activations_are_summed_in_float32() -> None:
    decoder = make_decoder(tiny_model().to(torch.bfloat16))
    sample = random_tokens(1, 400, 5)
    expected = oracle(decoder, sample, 1)["absolute_sum"]
    np.testing.assert_allclose(captured(decoder, sample).absolute_sum, expected, rtol=1e-4)


# --- faults --------------------------------------------------------------------------------------------------------


def nan_token_model(token: int) -> Decoder:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[token, 0] = float("nan")
    return make_decoder(model)


def test_a_nan_is_reported_with_the_sample_that_caused_it() -> None:
    sequences = [sequence.copy() for sequence in MIXED]
    for sequence in sequences:
        sequence[sequence == 7] = 8
    sequences[5][4] = 7
    with pytest.raises(ActivationError, match=r"NaN or infinite for sample sample-5;"):
        captured(nan_token_model(7), sequences)


def test_a_nan_is_reported_with_the_first_site_it_reaches() -> None:
    sequence = np.full(6, 7, dtype=np.int32)
    site = "block 0, input of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
    with pytest.raises(ActivationError, match=re.escape(site)):
        captured(nan_token_model(7), [sequence])


def test_a_nan_in_a_weight_is_reported_with_the_channel_behind_it() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 2] = float("nan")
    with pytest.raises(ActivationError, match=r"at block 1, input of mlp\.down_proj, channel 5, is NaN or infinite"):
        captured(make_decoder(model), MIXED)


def test_an_overflow_of_float16_is_reported() -> None:
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight *= 3e4
    with pytest.raises(ActivationError, match=r"block 0, input of mlp\.down_proj.*wider dtype"):
        captured(make_decoder(model.to(torch.float16)), MIXED)


def test_a_failed_capture_leaves_no_hook_behind() -> None:
    decoder = nan_token_model(7)
    with pytest.raises(ActivationError):
        captured(decoder, [np.full(6, 7, dtype=np.int32)])
    assert not any(module._forward_pre_hooks for module in decoder.model.modules())


def test_capturing_leaves_the_models_outputs_as_they_were() -> None:
    model = tiny_model()
    ids = torch.from_numpy(np.stack(random_tokens(2, 9)).astype(np.int64))
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        captured(make_decoder(model), MIXED)
        assert torch.equal(model(input_ids=ids).logits, before)


# --- weights -------------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("sites", ["linear_inputs", "block_inputs"])
def test_column_norms_are_those_of_the_stacked_weights(sites: str, architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    expected = [
        np.linalg.norm(np.concatenate([decoder.linear(s, n).weight.double().numpy() for n in s.linears]), axis=0)
        for s in measured_sites(decoder, sites)
    ]
    np.testing.assert_allclose(column_norms(decoder, sites), np.concatenate(expected), rtol=1e-6)


def test_column_norms_have_the_columns_of_the_statistics() -> None:
    decoder = make_decoder(tiny_model("opt"))
    for sites in ("linear_inputs", "block_inputs"):
        assert column_norms(decoder, sites).size == captured(decoder, MIXED, sites=sites).peak.shape[1]


def test_a_norm_of_large_bfloat16_weights_does_not_lose_precision() -> None:
    decoder = make_decoder(tiny_model().to(torch.bfloat16))
    site = decoder.sites[0]
    weights = [decoder.linear(site, name).weight.double().numpy() for name in site.linears]
    expected = np.sqrt(sum((w**2).sum(axis=0) for w in weights))
    np.testing.assert_allclose(column_norms(decoder)[:WIDTH], expected, rtol=1e-6)
