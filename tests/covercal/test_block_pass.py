"""A pass that waits before every site, against passes of whole blocks made anew for each site."""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from covercal.block_call import run_block
from covercal.block_pass import BlockPass, expert_of
from covercal.calibration import IN_MEMORY, Calibration, start_calibration
from covercal.decoder import Decoder, Site, linear_of, make_decoder
from tests.tiny import random_tokens, tiny_model

SAMPLES = [*random_tokens(3, 12, 1), *random_tokens(2, 7, 2)]  # two batches
both_ways = pytest.mark.parametrize("keep", [True, False])
some_models = pytest.mark.parametrize("architecture", ["llama", "mixtral"])


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def calibration(decoder: Decoder) -> Calibration:
    return start_calibration(
        decoder, SAMPLES, by_sequence=False, compares=False, storage_dtype="float32", memory=IN_MEMORY
    )


def coarsened(block: nn.Module, site: Site) -> None:
    """Do to a site's linears what quantisation does: give them other weights."""
    for name in site.linears:
        linear = linear_of(block, name)
        linear.weight.data = (linear.weight.data * 4).round() / 4


def read_anew(block: nn.Module, site: Site, running: Calibration) -> list[Tensor]:
    """Return what a site reads of every batch in a pass from the block's start to its end."""
    found: list[Tensor] = []
    hook = linear_of(block, site.linears[0]).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    for batch in running.batches:
        run_block(block, running.hidden[batch.number], batch.arguments[site.block])
    hook.remove()
    return found


def assert_read_as_anew(passing: BlockPass, plain: nn.Module, site: Site, running: Calibration) -> None:
    """Make sure that a site reads, to the bit, what it reads in a pass of another block from its start."""
    expected = read_anew(plain, site, running)
    found = [read.x for _, read in passing.inputs(site)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@both_ways
@some_models
def test_each_site_is_read_behind_the_changed_sites_before_it(architecture: str, keep: bool) -> None:
    decoder = make_decoder(tiny_model(architecture))
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    plain = copy.deepcopy(block)
    with BlockPass(block, sites, running.hidden, running.batches, keep=keep) as passing:
        for site in sites:
            assert_read_as_anew(passing, plain, site, running)
            for each in (block, plain):
                coarsened(each, site)
        entering = list(running.hidden)
        leaving = list(passing.finish())
    for hidden, batch, left in zip(entering, running.batches, leaving, strict=True):
        assert torch.equal(left, run_block(plain, hidden, batch.arguments[0]))


@both_ways
def test_an_experts_tokens_are_those_of_the_batch(keep: bool) -> None:
    decoder = make_decoder(tiny_model("mixtral"))
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    experts = [site for site in sites if expert_of(block, site) is not None]
    assert len(experts) > 2
    with BlockPass(block, sites, running.hidden, running.batches, keep=keep) as passing:
        for site in experts:
            for batch, read in passing.inputs(site):
                assert read.tokens is not None
                assert len(read.tokens) == len(read.x)
                assert int(read.tokens.max()) < batch.shape[0] * batch.shape[1]


def test_held_passes_compute_every_linear_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tiny_model())
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    counts: Counter[nn.Module] = Counter()
    plain = nn.Linear.forward

    def counted(linear: nn.Linear, x: Tensor) -> Tensor:
        counts[linear] += 1
        return plain(linear, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    with BlockPass(block, sites, running.hidden, running.batches, keep=True) as passing:
        for site in sites:
            assert len(list(passing.inputs(site))) == len(running.batches)
        passing.finish()
    assert counts == {linear_of(block, n): len(running.batches) for site in sites for n in site.linears}


def test_a_pass_that_ended_before_a_site_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(tiny_model())
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    never = Site(0, len(sites), ("self_attn.q_proj",), sites[0].channels)  # behind all others
    calls: list[nn.Module] = []
    block.register_forward_pre_hook(lambda module, _: calls.append(module))
    with BlockPass(block, sites, running.hidden, running.batches, keep=True) as passing:
        assert not list(passing.inputs(never))
        passing.finish()
    assert len(calls) == len(running.batches)


@both_ways
def test_a_hook_that_is_added_while_a_site_waits_is_heard(keep: bool) -> None:
    decoder = make_decoder(tiny_model())
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    first = linear_of(block, sites[0].linears[0])
    with BlockPass(block, sites, running.hidden, running.batches, keep=keep) as passing:
        list(passing.inputs(sites[0]))
        first.register_forward_pre_hook(lambda _, inputs: (torch.zeros_like(inputs[0]),))
        entering = list(running.hidden)
        leaving = list(passing.finish())
    expected = [run_block(block, h, b.arguments[0]) for h, b in zip(entering, running.batches, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(leaving, expected, strict=True))
    assert not torch.equal(leaving[0], run_block(decoder.own_block(0), entering[0], running.batches[0].arguments[0]))


@both_ways
@some_models
def test_the_hooks_of_a_finished_site_are_heard_once(architecture: str, keep: bool) -> None:
    """As the rounding of its inputs, which a second time would not leave them as they are."""
    decoder = make_decoder(tiny_model(architecture))
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    plain = copy.deepcopy(block)
    with BlockPass(block, sites, running.hidden, running.batches, keep=keep) as passing:
        for site in sites:
            assert_read_as_anew(passing, plain, site, running)
            for each in (block, plain):
                for name in site.linears:
                    linear_of(each, name).register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.75,))
        entering = list(running.hidden)
        leaving = list(passing.finish())
    for hidden, batch, left in zip(entering, running.batches, leaving, strict=True):
        assert torch.equal(left, run_block(plain, hidden, batch.arguments[0]))


@both_ways
def test_an_error_leaves_the_block_as_it_was(keep: bool) -> None:
    decoder = make_decoder(tiny_model())
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    before = list(running.hidden)
    held: list[BlockPass] = []
    with (
        contextlib.suppress(ZeroDivisionError),
        BlockPass(block, sites, running.hidden, running.batches, keep=keep) as passing,
    ):
        held.append(passing)
        list(passing.inputs(sites[1]))
        raise ZeroDivisionError
    assert not held[0]._waiting
    assert all("forward" not in vars(module) and not module._forward_hooks for module in block.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, running.hidden, strict=True))


def test_an_error_inside_the_block_reaches_whoever_asked() -> None:
    decoder = make_decoder(tiny_model())
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)

    def fail(*_: object) -> None:
        raise ValueError("out of luck")

    linear_of(block, sites[1].linears[0]).register_forward_pre_hook(fail)
    with BlockPass(block, sites, running.hidden, running.batches, keep=True) as passing:
        assert len(list(passing.inputs(sites[0]))) == len(running.batches)
        with pytest.raises(ValueError, match="out of luck"):
            list(passing.inputs(sites[1]))


@some_models
def test_what_is_left_behind_can_be_forgotten(architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    expected = [run_block(block, h, b.arguments[0]) for h, b in zip(running.hidden, running.batches, strict=True)]
    everywhere = set[str]()
    with BlockPass(block, sites, running.hidden, running.batches, keep=True) as passing:
        for site in sites:
            if len(list(passing.inputs(site))) == len(running.batches) and site is not sites[-1]:
                everywhere.update(site.linears)
            passing.forget(site)
            assert all(linear_of(block, name).weight.numel() for name in site.linears)
        empty = {name for site in sites for name in site.linears if not linear_of(block, name).weight.numel()}
        leaving = list(passing.finish())
    assert all(torch.equal(a, b) for a, b in zip(leaving, expected, strict=True))
    assert empty == everywhere
    assert {name.split(".")[-1] for name in empty} >= {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_linear_that_computes_behind_the_next_site_is_not_forgotten() -> None:
    """As in blocks whose attention and feed-forward part read the same input."""
    decoder = make_decoder(tiny_model())
    running, block, (first, second, *_) = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    late = Site(0, first.order, (*first.linears, "mlp.down_proj"), first.channels)
    with BlockPass(block, (late, second), running.hidden, running.batches, keep=True) as passing:
        list(passing.inputs(second))
        passing.forget(second)
        assert [linear_of(block, name).weight.numel() > 0 for name in late.linears] == [False, False, False, True]


def test_nothing_is_forgotten_where_passes_begin_anew() -> None:
    decoder = make_decoder(tiny_model())
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    with BlockPass(block, sites, running.hidden, running.batches, keep=False) as passing:
        for site in sites:
            list(passing.inputs(site))
            passing.forget(site)
    assert all(linear_of(block, name).weight.numel() for site in sites for name in site.linears)


def test_nothing_is_forgotten_before_all_batches_have_come_by() -> None:
    decoder = make_decoder(tiny_model())
    running, block, sites = calibration(decoder), decoder.own_block(0), decoder.block_sites(0)
    with BlockPass(block, sites, running.hidden, running.batches, keep=True) as passing:
        next(passing.inputs(sites[1]))
        passing.forget(sites[1])
    assert all(linear_of(block, name).weight.numel() for site in sites for name in site.linears)
