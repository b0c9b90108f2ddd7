"""The walk over blocks: each site is quantised behind the already quantised prefix, in order of execution."""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from covercal.activations import quantize_inputs, static_scale
from covercal.block_pass import BlockPass, expert_of
from covercal.calibration import (
    IN_MEMORY,
    Calibration,
    Memory,
    Tokens,
    block_sums,
    passes_fit,
    round_parameters,
    site_sums,
    start_calibration,
)
from covercal.decoder import DTYPES, Decoder, Site, linear_of, stays_wide
from covercal.errors import QuantizationError, naming
from covercal.gram import SiteStatistics, Wanted
from covercal.hidden_states import HiddenStates, aligned
from covercal.input_scaling import ScaledSite, scale_block
from covercal.memory import keeping_less, release_freed
from covercal.quantization_settings import Dtype, Quantization, Target
from covercal.quantizers.grid import representable
from covercal.quantizers.pieces import Solved
from covercal.quantizers.salient import scope_size
from covercal.quantizers.solver import SolvedSite, solve_site

VALIDATED_ALONE = "validated on the calibration samples alone: the pool is one shard, of which nothing is held out"
RELEASED_CHANNELS = 2048  # memory that was freed is given back before every step of a block so wide


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One quantised linear as a checkpoint keeps it.

    Attributes
    ----------
    name
        Name inside the model.
    codes
        uint8 (outputs, inputs), in [0, 2**bits).
    scale
        (outputs, groups), in the checkpoint's dtype.
    zero
        uint8 (outputs, groups).
    salient
        Mask, bool (outputs, inputs), and values of the weights that are not on the grid; None when all are.
    input_scale
        Step of the static grid of its inputs, a single number; None when they are not quantised so.
    widened
        Whether readers multiply codes and scales in the dtype they compute in, not in that of the scales: transformers
        does so where activations are quantised, too.
    """

    name: str
    codes: Tensor
    scale: Tensor
    zero: Tensor
    salient: tuple[Tensor, Tensor] | None = None
    input_scale: Tensor | None = None
    widened: bool = False


@dataclass(frozen=True, slots=True)
class LinearReport:
    """How well one linear was quantised.

    Attributes
    ----------
    output_error
        ||W X - Q X|| / ||W X|| on the inputs that it was calibrated on, W what rounding aims at (with
        `target: coreq` the corrected weights); NaN without calibration.
    weight_error
        ||W - Q|| / ||W||.
    damping, attempts, dead
        See `Factor`.
    shrinkage, gamma
        How the Gram matrix was regularised, see `Regularization`; NaN where there is none.
    alpha
        Of the mismatch-corrected target; NaN where there is none.
    scaling
        Power of the input scale that was chosen; NaN where inputs were not scaled.
    tokens
        Calibration tokens that it read.
    note
        What was done otherwise than asked, and why; empty when nothing was.
    seconds
        Solver time, shared evenly by the linears of a site.
    """

    name: str
    outputs: int
    inputs: int
    output_error: float
    weight_error: float
    damping: float
    attempts: int
    dead: int
    shrinkage: float = math.nan
    gamma: float = math.nan
    alpha: float = math.nan
    scaling: float = math.nan
    tokens: int = 0
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """One finished block.

    Attributes
    ----------
    index
        Its place.
    linears, reports
        Its linears as the checkpoint keeps them, and how well each was quantised.
    others
        All its other weights, by their name in the model; a scale may have been folded into them.
    leaving
        What leaves it and enters the next block, for each batch of calibration sequences: behind the quantised prefix,
        and in the original model where the two are compared. With them the walk can be resumed. Empty after the last
        block; what lies in files is only good until the next block is asked for.
    """

    index: int
    linears: tuple[QuantizedLinear, ...]
    reports: tuple[LinearReport, ...]
    others: Mapping[str, Tensor]
    leaving: tuple[HiddenStates, ...]


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a walk that was cut short goes on.

    Attributes
    ----------
    index
        The first block that is not finished.
    entering
        `QuantizedBlock.leaving` of the block before it, stream by stream.
    """

    index: int
    entering: tuple[Sequence[Tensor], ...]


class PoolSource(Protocol):
    """What is cached of the pool."""

    def statistics(self, site: Site) -> SiteStatistics:
        """Return what the settings read of a site's inputs in the original model, over the whole pool."""
        ...

    def input_scale(self, site: Site, scale: Tensor | None) -> float:
        """Return the step of a static grid of a site's inputs, which are divided by `scale` (channels,) before."""
        ...


def check_group_size(linears: dict[str, tuple[int, int]], group_size: int | None) -> None:
    """Raise when the group size does not divide the input of some linear.

    Raises
    ------
    QuantizationError
        Naming the first such linear and group sizes that would do.
    """
    if group_size is None:
        return
    common = math.gcd(*(inputs for _, inputs in linears.values()))
    for name, (_, inputs) in linears.items():
        if inputs % group_size:
            fitting = [size for size in (32, 64, 96, 128, 256) if common % size == 0]
            raise QuantizationError(
                f"quantization.group_size {group_size} does not divide the {inputs} inputs of {name}; "
                f"it must divide {common}" + (f", for example {', '.join(map(str, fitting))}." if fitting else ".")
            )


def check_salient(linears: dict[str, tuple[int, int]], settings: Quantization) -> None:
    """Raise when the share of salient weights is so small that it marks none in some linear.

    Raises
    ------
    QuantizationError
        Naming the linear whose scope is the smallest, and the least share that marks a weight there.
    """
    share, scope = settings.salient.share, settings.salient.scope
    sizes = {name: scope_size(shape, scope, settings.group_size) for name, shape in linears.items()}
    name = min(sizes, key=sizes.__getitem__)
    if share and not round(share * sizes[name]):
        raise QuantizationError(
            f"quantization.salient.share {share:g} marks no weight in a {scope} of {sizes[name]} weights of {name}: "
            f"give at least {1 / sizes[name]:.3g}, or another salient.scope."
        )


def quantize_blocks(
    decoder: Decoder,
    sequences: Sequence[Tokens],
    settings: Quantization,
    storage_dtype: Dtype,
    resumed: Resumed | None = None,
    pool: PoolSource | None = None,
    memory: Memory = IN_MEMORY,
) -> Iterator[QuantizedBlock]:
    """Quantise block by block and yield each when it is done; the decoder itself is not changed.

    Parameters
    ----------
    decoder
        The original model.
    sequences
        Calibration samples; not used by settings without calibration.
    settings
        All choices.
    storage_dtype
        Dtype in which the checkpoint keeps scales and all other weights; they are rounded to it here too, so
        that later blocks are calibrated behind what the checkpoint will hold.
    resumed
        Goes on behind blocks that were finished earlier, with the same result to the bit.
    pool
        What is cached of the pool, for settings that read it.
    memory
        Where hidden states go.

    Raises
    ------
    QuantizationError
        Naming the linear that cannot be quantised.
    """
    job = _Job(decoder, settings, storage_dtype, pool)
    running = _start(job, sequences, memory) if settings.calibrated else None
    first = 0
    if resumed is not None:
        first = resumed.index
        if running is not None:
            _enter(running, resumed)
    for index in range(first, len(decoder.blocks)):
        yield _quantize_block(job, index, running)


@torch.inference_mode()
def quantize_one_block(
    decoder: Decoder, index: int, settings: Quantization, storage_dtype: Dtype, pool: PoolSource | None
) -> QuantizedBlock:
    """Quantise one block by itself, for settings without calibration: nothing depends on the blocks before it.

    Raises
    ------
    QuantizationError
        Naming the linear that cannot be quantised.
    """
    if settings.calibrated:
        raise ValueError("these settings calibrate behind the quantised prefix")
    return _quantize_block(_Job(decoder, settings, storage_dtype, pool), index, None)


def dequantized(linear: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    """Return the weight as readers of the checkpoint do: (codes - zero) * scale in the scale's dtype, then `dtype`."""
    repeat = linear.codes.shape[1] // linear.scale.shape[1]
    zero = linear.zero.repeat_interleave(repeat, dim=1).to(torch.int16)
    scale = linear.scale.repeat_interleave(repeat, dim=1).to(dtype if linear.widened else linear.scale.dtype)
    plain = (linear.codes.to(torch.int16) - zero).to(scale.dtype) * scale
    if linear.salient is not None:
        plain = plain.masked_scatter(*linear.salient)
    return plain.to(dtype)


@dataclass(frozen=True, slots=True)
class _Job:
    """What all blocks are quantised with."""

    decoder: Decoder
    settings: Quantization
    storage_dtype: Dtype
    pool: PoolSource | None

    @property
    def compares(self) -> bool:
        """Return whether the original model runs beside the quantised one."""
        return self.settings.target.kind != "weights"

    @property
    def sequential(self) -> bool:
        """Return whether a site is calibrated behind the quantised sites before it in its block."""
        return self.settings.rounds or self.settings.static_from_calibration

    def known(self, site: Site) -> SiteStatistics:
        """Return what is cached of the pool for a site."""
        if self.pool is None:
            raise ValueError("these settings read what is cached of the pool")
        return self.pool.statistics(site)


@torch.inference_mode()
def _start(job: _Job, sequences: Sequence[Tokens], memory: Memory) -> Calibration:
    gram = job.settings.gram
    samples: list[int] | None = None
    if gram.prefixes:
        cut = [[sequence[:length] for length in gram.prefixes if length <= len(sequence)] for sequence in sequences]
        used = [prefixes for prefixes in cut if prefixes]
        sequences = [prefix for prefixes in used for prefix in prefixes]
        samples = [sample for sample, prefixes in enumerate(used) for _ in prefixes]
    if not sequences:
        shortest = f" of at least {min(gram.prefixes)} tokens (quantization.gram.prefixes)" if gram.prefixes else ""
        raise QuantizationError(f"There is no calibration sample{shortest}.")
    return start_calibration(
        job.decoder,
        sequences,
        by_sequence=gram.weight == "sequence",
        compares=job.compares,
        storage_dtype=job.storage_dtype,
        memory=memory,
        samples=samples,
        one_by_one=job.settings.reads_spread and len(gram.prefixes) > 1,
    )


def _enter(running: Calibration, resumed: Resumed) -> None:
    """Let the walk go on behind finished blocks."""
    streams = (running.hidden, running.original)
    for stream, entering in zip(streams, resumed.entering, strict=False):
        if len(stream) != len(entering):
            raise ValueError(f"{len(stream)} batches resumed as {len(entering)}")
        for number, hidden in enumerate(entering):
            wanted = (*stream[number].shape[:-1], running.batches[number].arguments[resumed.index].stream_width)
            if hidden.shape != wanted:
                raise ValueError(f"batch of shape {wanted} resumed as {tuple(hidden.shape)}")
            stream[number] = aligned(hidden)


@torch.inference_mode()  # not around the generator: that would hold each block while the next one is made
def _quantize_block(job: _Job, index: int, running: Calibration | None) -> QuantizedBlock:
    decoder, settings = job.decoder, job.settings
    block = decoder.own_block(index)
    original = _sharing(block) if job.compares else None
    stays = stays_wide(decoder.model, job.storage_dtype)
    round_parameters(block, job.storage_dtype, stays)
    sites = decoder.block_sites(index)
    seen = _first_look(job, block, sites, running)
    scaled: dict[int, ScaledSite] = {}
    if settings.scaling.search != "none":
        scaled = scale_block(decoder, block, sites, seen, settings, job.storage_dtype, running)
        round_parameters(block, job.storage_dtype, stays)
    linears: list[QuantizedLinear] = []
    reports: list[LinearReport] = []
    leaving: tuple[HiddenStates, ...] = ()
    wide = any(site.channels >= RELEASED_CHANNELS for site in sites)
    release_freed()
    with _passes(block, original, sites, running) as passes, keeping_less() if wide else nullcontext():
        for site in sites:
            how = scaled.get(site.order, ScaledSite())
            for linear, report in _take_site(job, block, site, passes, seen.get(site.order), how, wide=wide):
                linears.append(linear)
                reports.append(report)
        if passes and index + 1 < len(decoder.blocks):
            leaving = tuple(each.finish() for each in passes)
    return QuantizedBlock(index, tuple(linears), tuple(reports), _others(decoder, block, index, sites), leaving)


def _take_site(
    job: _Job,
    block: nn.Module,
    site: Site,
    passes: tuple[BlockPass, ...],
    seen: SiteStatistics | None,
    scaled: ScaledSite,
    *,
    wide: bool,
) -> Iterator[tuple[QuantizedLinear, LinearReport]]:
    """Measure a site's inputs and quantise its linears, in as little memory as can be where a block is wide."""
    if wide:
        release_freed()
    statistics = _site_statistics(job, block, site, passes, seen, scaled.scale).single()
    for each in passes:
        each.forget(site)
    if wide:
        release_freed()
    yield from _quantize_site(job, block, site, statistics, scaled)


def _sharing(block: nn.Module) -> nn.Module:
    """Return a copy of a block that has its weights in common with it until one of the two is given others."""
    shared = {id(each): nn.Parameter(each.data, requires_grad=False) for each in block.parameters()}
    return copy.deepcopy(block, shared)


@contextmanager
def _passes(
    block: nn.Module, original: nn.Module | None, sites: Sequence[Site], running: Calibration | None
) -> Iterator[tuple[BlockPass, ...]]:
    """Return the pass of the block, and that of the original model's where the two are compared; none to calibrate."""
    if running is None:
        yield ()
        return
    keep = passes_fit(block, sites, running, compares=original is not None)
    with ExitStack() as stack:
        passes = [stack.enter_context(BlockPass(block, sites, running.hidden, running.batches, keep=keep))]
        if original is not None:
            reference = BlockPass(original, sites, running.original, running.batches, keep=keep)
            passes.append(stack.enter_context(reference))
        yield tuple(passes)


def _others(decoder: Decoder, block: nn.Module, index: int, sites: Sequence[Site]) -> dict[str, Tensor]:
    quantized = {f"{name}.weight" for site in sites for name in site.linears}
    prefix = f"{decoder.blocks_path}.{index}."
    return {f"{prefix}{name}": value for name, value in block.state_dict().items() if name not in quantized}


def _first_look(
    job: _Job, block: nn.Module, sites: Sequence[Site], running: Calibration | None
) -> dict[int, SiteStatistics]:
    """Return what is known of every site's inputs before anything in the block is quantised, if something asks."""
    settings = job.settings
    scales = settings.scaling.search != "none"
    if not settings.reads_inputs or (job.sequential and not scales):
        return {}
    if running is None or settings.gram.source == "pool":
        return {site.order: job.known(site) for site in sites}
    smooth = settings.scaling.search == "smooth"
    wanted = Wanted(gram=not smooth or not job.sequential, magnitude=scales, peak=smooth)
    found = {order: sums.statistics() for order, sums in block_sums(block, sites, running, wanted).items()}
    if settings.gram.source == "blend":
        return {site.order: blended(found[site.order], job.known(site), settings.gram.pool_share) for site in sites}
    return found


def _site_statistics(
    job: _Job,
    block: nn.Module,
    site: Site,
    passes: tuple[BlockPass, ...],
    seen: SiteStatistics | None,
    scale: Tensor | None,
) -> SiteStatistics:
    """Return what rounding a site's weights reads of its inputs, which are divided by `scale` by now."""
    settings = job.settings
    if not passes or not job.sequential:
        if seen is None:
            seen = job.known(site) if settings.reads_inputs else SiteStatistics()
        return seen if scale is None else seen.scaled(scale)
    wanted, weights = wanted_sums(settings), list[Tensor]()
    if expert_of(block, site) is not None:
        wanted = replace(wanted, drift=False, drift_energy=False)
    elif settings.target.kind == "coreq":  # GPTAQ goes by the inputs' drift itself
        weights = [linear_of(block, name).weight.data for name in site.linears]
    found = site_sums(site, *passes, wanted=wanted, weights=weights, scale=scale).statistics()
    if not settings.reads_pool_gram and not settings.reads_statistics:
        return found
    known = job.known(site)
    known = known if scale is None else known.scaled(scale)
    if settings.gram.source == "pool":  # the samples are only asked how large inputs get
        return replace(known, histogram=found.histogram, largest=found.largest)
    if settings.reads_pool_gram:
        found = blended(found, known, settings.gram.pool_share)
    return replace(found, pool_energy=known.pool_energy)


def wanted_sums(settings: Quantization) -> Wanted:
    """Return what rounding reads of the calibration inputs."""
    return Wanted(
        gram=settings.reads_inputs and settings.gram.source != "pool",
        validation=settings.validates,
        spread=settings.reads_spread,
        nested=len(settings.gram.prefixes) > 1,
        magnitude=settings.damping.weights == "saliency",
        drift=settings.target.kind != "weights",
        drift_energy=settings.target.kind == "coreq" and settings.target.alpha == "closed_form",
        histogram=settings.static_from_calibration,
    )


def blended(found: SiteStatistics, known: SiteStatistics, share: float) -> SiteStatistics:
    """Return the statistics of calibration inputs with a share of each mean taken from the pool's, and larger peaks.

    The pool's part has no drift: its inputs are the original model's. How sequences differ, and how often an input is
    how large, is the calibration inputs' alone.
    """
    rest = 1.0 - share

    def mix(own: Tensor | None, pool: Tensor | None) -> Tensor | None:
        return own if own is None or pool is None else rest * own + share * pool.to(own.dtype)

    def part(own: Tensor | None) -> Tensor | None:
        return None if own is None else rest * own

    def larger(own: Tensor | None, pool: Tensor | None) -> Tensor | None:
        return own if own is None or pool is None else torch.maximum(own, pool.to(own.dtype))

    return replace(
        found,
        gram=mix(found.gram, known.gram),
        training=mix(found.training, known.training),
        validation=mix(found.validation, known.validation),
        magnitude=mix(found.magnitude, known.magnitude),
        peak=larger(found.peak, known.peak),
        drift=part(found.drift),
        drift_energy=part(found.drift_energy),
        outputs_drift=found.outputs_drift and tuple(rest * each for each in found.outputs_drift),
        outputs_drift_energy=found.outputs_drift_energy and tuple(rest * each for each in found.outputs_drift_energy),
        note=VALIDATED_ALONE if found.validation is not None and known.validation is None else "",
    )


def _quantize_site(
    job: _Job, block: nn.Module, site: Site, statistics: SiteStatistics, scaled: ScaledSite
) -> Iterator[tuple[QuantizedLinear, LinearReport]]:
    """Quantise the linears of a site together: rows are independent, so one factorisation serves all."""
    started = time.perf_counter()
    settings, notes = job.settings, [scaled.note, statistics.note]
    modules = [linear_of(block, name) for name in site.linears]
    widened = settings.activations.kind != "none"
    is_expert = expert_of(block, site) is not None
    few = is_expert and statistics.tokens < settings.gram.expert_tokens
    if few and settings.reads_inputs:
        notes = [f"rounded to nearest: {statistics.tokens} calibration tokens reached this expert"]
        settings = without_inputs(settings)
        statistics = SiteStatistics(
            tokens=statistics.tokens, histogram=statistics.histogram, largest=statistics.largest
        )
    elif is_expert and settings.target.kind != "weights":
        notes.append(f"target {settings.target.kind} left out: an expert's tokens are not the same in both models")
        settings = settings.model_copy(update={"target": Target()})
    with naming(job.decoder.full_name(site, site.linears[0])):
        solved = solve_site([m.weight.data for m in modules], statistics, settings, DTYPES[job.storage_dtype])
        input_scale = _input_scale(job, site, statistics, scaled.scale)
    seconds = (time.perf_counter() - started) / len(modules)
    for name, module, weight in zip(site.linears, modules, solved.weights, strict=True):
        full_name = job.decoder.full_name(site, name)
        linear = QuantizedLinear(
            full_name, weight.codes, weight.scale, weight.zero, weight.salient, input_scale, widened
        )
        said = "; ".join(filter(None, (*notes, solved.note)))
        report = _report(full_name, weight, solved, statistics, scaled, said)
        module.weight.data = dequantized(linear, module.weight.dtype)
        if settings.activations.kind != "none":
            step = None if input_scale is None else input_scale.to(module.weight.dtype)
            quantize_inputs(module, step, settings.activations.bits)
        yield linear, replace(report, seconds=seconds)


def without_inputs(settings: Quantization) -> Quantization:
    """Return settings for the same grid that read nothing of the inputs: round to nearest."""
    kept = {"bits", "group_size", "symmetric", "storage_dtype", "salient", "activations"}
    searched = settings.ranges.model_dump(include={"search", "shrink", "steps"})
    ranges = {"ranges": searched} if settings.ranges.search == "mse" else {}
    return Quantization(method="rtn", **settings.model_dump(include=kept), **ranges)


def _input_scale(job: _Job, site: Site, statistics: SiteStatistics, scale: Tensor | None) -> Tensor | None:
    activations = job.settings.activations
    if activations.kind != "static":
        return None
    if activations.source == "calibration":
        if statistics.histogram is None:
            raise ValueError("static ranges read a histogram of the inputs, which was not made")
        if not math.isfinite(statistics.largest):
            raise QuantizationError("its inputs hold NaN or infinity")
        step = static_scale(statistics.histogram, statistics.largest, activations)
    elif job.pool is None:
        raise ValueError("static ranges read what is cached of the pool")
    else:
        step = job.pool.input_scale(site, scale)
    dtype = DTYPES[job.storage_dtype]
    return representable(torch.tensor([step], dtype=torch.float64), dtype).to(job.decoder.device, dtype)


def _report(
    name: str, weight: Solved, solved: SolvedSite, statistics: SiteStatistics, scaled: ScaledSite, note: str
) -> LinearReport:
    chosen = solved.regularization
    return LinearReport(
        name=name,
        outputs=weight.codes.shape[0],
        inputs=weight.codes.shape[1],
        output_error=weight.output_error,
        weight_error=weight.weight_error,
        damping=solved.factor_damping,
        attempts=solved.attempts,
        dead=solved.dead,
        shrinkage=chosen.shrinkage if chosen is not None else math.nan,
        gamma=chosen.gamma if chosen is not None and chosen.gamma is not None else math.nan,
        alpha=weight.alpha,
        scaling=scaled.power,
        tokens=statistics.tokens,
        note=note,
    )
