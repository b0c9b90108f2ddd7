"""The pool's Gram matrices against the inputs of the model's own forward passes, in float64."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from covercal.calibration import IN_MEMORY, Memory
from covercal.decoder import Decoder, make_decoder, token_tensor
from covercal.pool_gram import PoolBlock, PoolSite, Resumed, merged, sum_pool, symmetric, upper_triangle
from tests.tiny import BLOCKS, random_tokens, tiny_model

CPU = torch.device("cpu")
Floats = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]
Places = dict[tuple[int, int], PoolSite]
SHARDS: list[list[Tokens]] = [
    [*random_tokens(3, 14, 1), *random_tokens(2, 6, 2)],
    random_tokens(4, 9, 3),
    [*random_tokens(2, 6, 4), *random_tokens(1, 20, 5)],
]
ALL = [sample for shard in SHARDS for sample in shard]


@cache
def decoder_of(architecture: str) -> Decoder:
    return make_decoder(tiny_model(architecture))


def summed(
    shards: Sequence[Sequence[Tokens]],
    kept: Places | None = None,
    architecture: str = "llama",
    **options: Any,
) -> Iterator[PoolBlock]:
    chosen = {"by_sequence": False, "spread": False, "memory": IN_MEMORY} | options
    earlier = kept or {}
    return sum_pool(decoder_of(architecture), shards, lambda site: earlier.get((site.block, site.order)), **chosen)


def places(blocks: Iterator[PoolBlock] | Sequence[PoolBlock]) -> Places:
    return {(block.index, order): site for block in blocks for order, site in block.sites.items()}


def bits(site: PoolSite) -> list[Any]:
    return [part.tobytes() if isinstance(part, np.ndarray) else part for part in astuple(site)]


def inputs_of(architecture: str, samples: Sequence[Tokens]) -> dict[tuple[int, int], list[Floats]]:
    """Return what every site of the original model reads of each sample, (tokens, channels)."""
    decoder = decoder_of(architecture)
    seen: dict[tuple[int, int], list[Floats]] = {(site.block, site.order): [] for site in decoder.sites}

    def note(place: tuple[int, int]) -> Any:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[place].append(args[0].reshape(-1, args[0].shape[-1]).double().numpy())

        return before

    hooks = [
        decoder.linear(site, site.linears[0]).register_forward_pre_hook(note((site.block, site.order)))
        for site in decoder.sites
    ]
    with torch.inference_mode():
        for sample in samples:
            decoder.model(input_ids=token_tensor([sample], CPU), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def full(site: PoolSite) -> Floats:
    return symmetric(site.gram, len(site.magnitude), torch.float64, CPU).numpy()


# --- half of a symmetric matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 32, 600])
def test_a_symmetric_matrix_is_got_back_from_half_of_it(size: int) -> None:
    half = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    matrix = half + half.T
    triangle = upper_triangle(matrix)
    assert triangle.shape == (size * (size + 1) // 2,)
    assert torch.equal(symmetric(triangle, size, torch.float32, CPU), matrix)
    assert torch.equal(symmetric(triangle, size, torch.float64, CPU), matrix.double())


def test_the_upper_triangle_is_read_row_by_row() -> None:
    matrix = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert upper_triangle(matrix).tolist() == [1, 2, 3, 4, 5, 6]


def test_half_of_a_float64_matrix_is_rounded_to_float32_once() -> None:
    matrix = torch.full((2, 2), 1 / 3).double()
    triangle = upper_triangle(matrix)
    assert triangle.dtype == np.float32
    assert triangle.tolist() == [float(np.float32(1 / 3))] * 3


# --- merging -------------------------------------------------------------------------------------------------------


def pool_site(x: list[Floats], weights: list[float]) -> PoolSite:
    """Return the site of sequences of tokens that weigh as given, computed here."""
    masses = np.array([weight * len(each) for weight, each in zip(weights, x, strict=True)])
    own = [each.T @ each / len(each) for each in x]
    squares = [np.square(each).sum() - np.square(np.diag(each)).sum() for each in own]
    gram = sum(mass * each for mass, each in zip(masses, own, strict=True)) / masses.sum()
    magnitude = sum(mass * np.abs(each).mean(axis=0) for mass, each in zip(masses, x, strict=True)) / masses.sum()
    return PoolSite(
        gram=upper_triangle(torch.from_numpy(gram)),
        magnitude=magnitude,
        peak=np.abs(np.concatenate(x)).max(axis=0),
        weight=float(masses.sum()),
        mean_square=float(masses @ squares / masses.sum()),
        concentration=float(np.square(masses).sum() / masses.sum() ** 2),
        sequences=len(x),
        tokens=sum(map(len, x)),
    )


def nothing() -> PoolSite:
    return PoolSite(
        gram=np.zeros(15, np.float32),
        magnitude=np.zeros(5),
        peak=np.zeros(5),
        weight=0.0,
        mean_square=0.0,
        concentration=0.0,
        sequences=0,
        tokens=0,
    )


def random_inputs(seed: int, count: int) -> list[Floats]:
    generator = np.random.default_rng(seed)
    return [generator.normal(0, 1 + seed, (generator.integers(3, 9), 5)) for _ in range(count)]


def assert_same(found: PoolSite, expected: PoolSite, tolerance: float) -> None:
    scale = float(np.abs(expected.gram).max())
    np.testing.assert_allclose(found.gram, expected.gram, rtol=tolerance, atol=tolerance * scale)
    np.testing.assert_allclose(found.magnitude, expected.magnitude, rtol=tolerance)
    np.testing.assert_allclose(found.peak, expected.peak, rtol=tolerance)
    assert found.weight == pytest.approx(expected.weight, rel=1e-12)
    assert found.mean_square == pytest.approx(expected.mean_square, rel=1e-4)
    assert found.concentration == pytest.approx(expected.concentration, rel=1e-9)
    assert (found.sequences, found.tokens) == (expected.sequences, expected.tokens)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5)])
def test_merging_two_sets_gives_the_site_over_both(weights: tuple[float, float]) -> None:
    one, other = random_inputs(1, 3), random_inputs(2, 5)
    each = [[weight] * len(x) for weight, x in zip(weights, (one, other), strict=True)]
    found = merged(pool_site(one, each[0]), pool_site(other, each[1]))
    assert_same(found, pool_site(one + other, each[0] + each[1]), 1e-6)


def test_merging_does_not_change_what_is_merged() -> None:
    one, other = pool_site(random_inputs(1, 3), [1.0] * 3), pool_site(random_inputs(2, 2), [1.0] * 2)
    before = bits(one), bits(other)
    merged(one, other)
    assert (bits(one), bits(other)) == before


def test_merging_nothing_changes_nothing() -> None:
    one = pool_site(random_inputs(1, 3), [1.0] * 3)
    assert bits(merged(one, nothing())) == bits(one)
    assert bits(merged(nothing(), one)) == bits(one)


def test_two_sites_of_nothing_give_nothing() -> None:
    assert bits(merged(nothing(), nothing())) == bits(nothing())


# --- the pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "gemma4_text"])
def test_every_site_is_summed_over_the_originals_inputs(architecture: str, by_sequence: bool) -> None:
    found = places(summed([SHARDS[0]], None, architecture, by_sequence=by_sequence, spread=True))
    expected = inputs_of(architecture, SHARDS[0])
    weights = [1 / len(sample) if by_sequence else 1.0 for sample in SHARDS[0]]
    assert found.keys() == expected.keys()
    for place, x in expected.items():
        assert_same(found[place], pool_site(x, weights), 2e-5)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_every_token_of_a_pool_reaches_two_experts_of_a_block(architecture: str) -> None:
    found = places(summed([SHARDS[0]], None, architecture))
    decoder = decoder_of(architecture)
    reached = 0
    for site in decoder.sites:
        tokens = found[site.block, site.order].tokens
        if ".experts." not in site.linears[0]:
            assert tokens == sum(map(len, SHARDS[0]))
        elif site.linears[0].endswith("down_proj"):
            reached += tokens
    assert reached == 2 * BLOCKS * sum(map(len, SHARDS[0]))


@pytest.mark.parametrize("by_sequence", [False, True])
def test_shards_that_are_summed_together_are_the_mean_over_all_their_sequences(by_sequence: bool) -> None:
    found = places(summed(SHARDS, by_sequence=by_sequence, spread=True))  # the longest sequence differs by shard
    weights = [1 / len(sample) if by_sequence else 1.0 for sample in ALL]
    for place, x in inputs_of("llama", ALL).items():
        assert_same(found[place], pool_site(x, weights), 2e-5)


def test_where_every_sequence_weighs_the_same_the_weight_of_a_site_is_their_number() -> None:
    found = places(summed(SHARDS, by_sequence=True))
    assert {place: round(site.weight, 9) for place, site in found.items()} == dict.fromkeys(found, len(ALL))


@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("earlier", [1, 2])
def test_a_pool_that_grew_has_the_bits_of_one_that_was_summed_at_once(
    earlier: int, architecture: str, spread: bool, by_sequence: bool
) -> None:
    chosen = {"spread": spread, "by_sequence": by_sequence}
    kept = places(summed(SHARDS[:earlier], None, architecture, **chosen))
    grown = places(summed(SHARDS[earlier:], kept, architecture, **chosen))
    at_once = places(summed(SHARDS, None, architecture, **chosen))
    assert {place: bits(site) for place, site in grown.items()} == {p: bits(site) for p, site in at_once.items()}


def test_without_asking_for_it_no_spread_is_measured() -> None:
    found = places(summed([SHARDS[0]])).values()
    assert {(site.mean_square, site.concentration) for site in found} == {(0.0, 0.0)}


def test_blocks_come_in_order_and_only_the_last_leaves_nothing() -> None:
    blocks = list(summed(SHARDS))
    assert [block.index for block in blocks] == list(range(BLOCKS))
    assert [len(block.leaving) for block in blocks] == [*[len(SHARDS)] * (BLOCKS - 1), 0]


def test_the_model_is_not_changed() -> None:
    decoder = decoder_of("llama")
    before = {name: value.clone() for name, value in decoder.model.state_dict().items()}
    list(summed(SHARDS))
    assert all(torch.equal(before[name], value) for name, value in decoder.model.state_dict().items())


@pytest.mark.parametrize("first", range(1, BLOCKS))
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gemma4_text"])
def test_a_pass_that_is_resumed_at_any_block_gives_the_same_bits(architecture: str, first: int, tmp_path: Path) -> None:
    whole = list(summed(SHARDS, None, architecture))
    entering = []
    for number, stream in enumerate(whole[first - 1].leaving):
        path = tmp_path / str(number)
        save_file({str(batch): hidden.contiguous() for batch, hidden in enumerate(stream)}, path)
        found = load_file(path)
        entering.append([found[str(batch)] for batch in range(len(found))])
    rest = places(summed(SHARDS, None, architecture, resumed=Resumed(first, tuple(entering))))
    assert {place: bits(site) for place, site in rest.items()} == {
        place: bits(site) for place, site in places(whole[first:]).items()
    }


@pytest.mark.parametrize("limit", [0, 4000])
def test_a_pass_whose_hidden_states_go_to_files_gives_the_same_bits(limit: int, tmp_path: Path) -> None:
    in_files = places(summed(SHARDS, memory=Memory(limit, tmp_path)))
    in_memory = places(summed(SHARDS))
    assert {place: bits(site) for place, site in in_files.items()} == {p: bits(s) for p, s in in_memory.items()}
    assert list(tmp_path.rglob("*.safetensors"))


def test_two_passes_give_the_same_bits() -> None:
    first, second = (places(summed(SHARDS, spread=True)) for _ in range(2))
    assert {place: bits(site) for place, site in first.items()} == {place: bits(s) for place, s in second.items()}


def test_the_matrix_of_a_site_is_positive_on_its_diagonal_and_has_no_negative_eigenvalue() -> None:
    for site in places(summed(SHARDS)).values():
        values = np.linalg.eigvalsh(full(site))
        assert values.min() > -1e-5 * values.max()
        assert np.diag(full(site)).min() > 0


def test_a_finished_block_is_let_go_before_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[weakref.ref[npt.NDArray[np.float32]]] = []
    held: list[bool] = []
    whole_block = Decoder.block

    def watched(self: Decoder, index: int) -> nn.Module:
        held.extend(gram() is not None for gram in done)
        return whole_block(self, index)

    monkeypatch.setattr(Decoder, "block", watched)
    for block in summed(SHARDS):
        done.append(weakref.ref(block.sites[0].gram))
        del block
    assert held == [False] * sum(range(BLOCKS))
