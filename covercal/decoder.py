"""A decoder-only language model as a row of blocks, each with linears grouped by the input they share."""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from covercal.block_call import BlockArguments, Left, hidden_of, run_and_tell, run_block
from covercal.errors import InputError
from covercal.experts import is_fused, is_linear, is_router, probing, unfuse_experts, unfused
from covercal.model_files import check_shards
from covercal.quantization_settings import Dtype
from covercal.streaming import StreamedWeights, body_of, empty_model, loader_for
from covercal.transposed import Straightened, is_turned, straighten

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_TOKENS = 4
POSITIONS_AHEAD = 2  # rows of a table of positions before that of the first token: OPT
CONFIGURATION_ERRORS = (  # what transformers raises for a configuration that it can make nothing of
    ValueError,
    KeyError,
    OSError,
    ImportError,
    RuntimeError,
    AttributeError,
    TypeError,
    ArithmeticError,
    StrictDataclassError,
)
SMALL_SHARE = 0.05  # of the weights of a block's linears: what else has matrices may stay as it is
SAME_HIDDEN = 1e-2  # between a model's own pass and its blocks one by one: nothing but the order of sums may differ


@dataclass(frozen=True, slots=True)
class Site:
    """Linears of one block that read the same input tensor.

    Attributes
    ----------
    block
        Index of the block.
    order
        Position in the block's order of execution.
    linears
        Names of the linears, relative to the block.
    channels
        Size of the input.
    """

    block: int
    order: int
    linears: tuple[str, ...]
    channels: int

    @property
    def name(self) -> str:
        """Return the site's name: block and the linears that read it."""
        return f"block {self.block}, input of {', '.join(self.linears)}"


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded decoder.

    Attributes
    ----------
    model
        The transformers model, in evaluation mode.
    blocks_path
        Name of the list of blocks inside the model.
    blocks
        The blocks in order.
    sites
        Every site of every block, in order of execution.
    weights
        Where the blocks' weights are read when they are needed; None when all of them are loaded.
    probe
        A few tokens on their way into the first block.
    returned
        How many things a block returns in a tuple, hidden states first; None where it returns these alone.
    """

    model: PreTrainedModel
    blocks_path: str
    blocks: tuple[nn.Module, ...]
    sites: tuple[Site, ...]
    weights: StreamedWeights | None = None
    probe: "Probe | None" = None
    returned: int | None = None

    @property
    def device(self) -> torch.device:
        """Return where the model computes."""
        return torch.device(self.model.device) if self.weights is None else self.weights.device

    @property
    def body(self) -> nn.Module:
        """Return the model without its language-model head."""
        return body_of(self.model, self.blocks_path)

    def probed(self) -> "Probe":
        """Return the probe of a model that was loaded, not described."""
        if self.probe is None:
            raise ValueError("the decoder was described, not loaded")
        return self.probe

    def block(self, index: int) -> nn.Module:
        """Return a block with its weights, not to be changed; of a streamed model it is read now."""
        return self.blocks[index] if self.weights is None else self.own_block(index)

    def around(self, *, head: bool = False) -> AbstractContextManager[None]:
        """Have the weights outside the blocks for a while, of a streamed model; the head only when it is asked for."""
        return nullcontext() if self.weights is None else self.weights.rest(head=head)

    def own_block(self, index: int) -> nn.Module:
        """Return a copy of a block, with its weights and with experts as linears, that the caller may change."""
        if self.weights is None:
            return copy.deepcopy(self.blocks[index])
        block = self.weights.block(index)
        _make_linears(block)
        return block

    def block_sites(self, index: int) -> tuple[Site, ...]:
        """Return the sites of a block, in order of execution."""
        return tuple(site for site in self.sites if site.block == index)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (outputs, inputs) of every linear in the blocks, by name."""
        found: dict[str, tuple[int, int]] = {}
        for index, block in enumerate(self.blocks):
            shapes = {n: (m.out_features, m.in_features) for n, m in _linears(block)}
            found |= {f"{self.blocks_path}.{index}.{name}": shape for name, shape in shapes.items()}
        return found

    @property
    def unread(self) -> tuple[str, ...]:
        """Return the names of the linears in the blocks that no text reads: they stay as they are."""
        read = {self.full_name(site, name) for site in self.sites for name in site.linears}
        return tuple(name for name in self.linear_shapes if name not in read)

    def linear(self, site: Site, name: str) -> nn.Linear:
        """Return a linear of a site, of a model that is loaded whole."""
        return linear_of(self.blocks[site.block], name)

    def full_name(self, site: Site, name: str) -> str:
        """Return the name of a linear inside the model."""
        return f"{self.blocks_path}.{site.block}.{name}"


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """Return a linear of a block by its name there."""
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is a {type(module).__name__}, not a linear")
    return module


def _linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linears of a block, those of fused experts as if they had been taken apart."""
    for name, each in block.named_modules():
        module = Straightened(each) if is_turned(each) else each
        if is_linear(module):
            yield name, module
        elif is_fused(module):
            for inner, linear in unfused(module).named_modules():
                if is_linear(linear):
                    yield f"{name}.{inner}", linear


def stays_wide(model: PreTrainedModel, storage_dtype: Dtype) -> Callable[[str], bool]:
    """Return what tells which tensors, by name, transformers reads as float32 though the others have 16 bits.

    Biases that choose experts, for one: rounded, they choose others.
    """
    names = model._get_dtype_plan(DTYPES[storage_dtype])
    pattern = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in names) or r"(?!)")
    return lambda name: pattern.search(name) is not None


def check_device_name(device: str) -> None:
    """Raise when a device is called so on no machine.

    Raises
    ------
    InputError
        Naming it.
    """
    try:
        torch.device("cpu" if device == "auto" else device)
    except RuntimeError as cause:
        raise _no_device(device, cause) from cause


def pick_device(device: str) -> torch.device:
    """Return the device for `auto` or a name; `auto` is the first CUDA device, else the CPU.

    Raises
    ------
    InputError
        When the named device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as cause:
        raise _no_device(device, cause) from cause
    return torch.device(device)


def _no_device(device: str, cause: Exception) -> InputError:
    return InputError(f"device {device!r} is not available here ({str(cause).splitlines()[0]}); use auto or cpu.")


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free where tensors of `device` lie."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def load_decoder(
    folder: Path, dtype: Dtype, device: torch.device, *, trust_remote_code: bool = False, streamed: bool = False
) -> Decoder:
    """Load a safetensors folder and find its blocks and sites.

    Parameters
    ----------
    streamed
        Load only what is around the blocks now, and a block when it is asked for: `Decoder.own_block`.

    Raises
    ------
    InputError
        When it is not a decoder whose blocks are made of linears.
    """
    check_shards(folder)
    if streamed:
        return _streamed_decoder(folder, dtype, device, trust_remote_code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    model, found = loader_for(config).from_pretrained(
        folder,
        dtype=DTYPES[dtype],
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        use_safetensors=True,  # never a pickle
        output_loading_info=True,
    )
    for name in sorted(found["missing_keys"]):  # transformers would go on with random numbers
        raise InputError(f"The model's files lack the weight {name}.")
    _decompress(model)
    return make_decoder(model.to(device))


def _decompress(model: PreTrainedModel) -> None:
    """Unpack integer weights now: left alone they are unpacked by the model's first forward pass, not by a block's."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.quantization_config.dequantize:
        quantizer.compressor.decompress_model(model)


def make_decoder(model: PreTrainedModel) -> Decoder:
    """Find the blocks and sites of a loaded model; puts the model in evaluation mode.

    Raises
    ------
    InputError
        When the blocks cannot be found, or hold weights that are not linears.
    """
    model.eval().requires_grad_(False)
    path, blocks = find_blocks(model)
    check_blocks(model, blocks)
    for block in blocks:
        _align_experts(block, model.dtype)
        _make_linears(block)
    decoder = _with_sites(Decoder(model, path, blocks, ()))
    _check_walk(decoder)
    return decoder


def _make_linears(block: nn.Module) -> None:
    unfuse_experts(block)
    straighten(block)


def _align_experts(block: nn.Module, dtype: torch.dtype) -> None:
    """Give fused experts the model's dtype: transformers 5.23 leaves unpacked ones in that of their scales."""
    for module in block.modules():
        if is_fused(module):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def _streamed_decoder(folder: Path, dtype: Dtype, device: torch.device, trust_remote_code: bool) -> Decoder:
    model = empty_model(folder, DTYPES[dtype], trust_remote_code=trust_remote_code)
    path, blocks = find_blocks(model)
    check_blocks(model, blocks)
    weights = StreamedWeights(folder, model, path, device)
    return _with_sites(Decoder(model, path, blocks, (), weights))


def _with_sites(decoder: Decoder) -> Decoder:
    with decoder.around(head=True):  # so that what the files lack is told now
        tokens = torch.zeros((1, PROBE_TOKENS), dtype=torch.int64, device=decoder.device)
        decoder = replace(decoder, returned=_returned(decoder, tokens))
        entering, arguments = block_inputs(decoder, tokens)
    sites, probed = _traced(decoder, entering, arguments)
    return replace(decoder, sites=sites, probe=Probe(entering, probed))


@torch.inference_mode()
def _check_walk(decoder: Decoder) -> None:
    """Raise when blocks that are run one by one, or the head alone, do not compute what the model computes.

    Raises
    ------
    InputError
        Naming the model.
    """
    tokens = torch.arange(PROBE_TOKENS, device=decoder.device)[None]
    left: list[Tensor] = []
    final: list[Tensor] = []
    with (
        decoder.blocks[-1].register_forward_hook(lambda _, __, output: left.append(hidden_of(output))),
        decoder.body.register_forward_hook(lambda _, __, output: final.append(output[0])),
    ):
        logits = decoder.model(input_ids=tokens, use_cache=False).logits
    own = head_logits(decoder, final[-1])
    if own.shape != logits.shape or _apart(own, logits.float()):
        raise _other_head(decoder)
    hidden, arguments = block_inputs(decoder, tokens)
    for block, each in zip(decoder.blocks, arguments, strict=True):
        hidden = run_block(block, hidden, each)
    if _apart(hidden[..., : arguments[-1].width].float(), left[-1].float()):
        raise _not_alone(decoder)


def _apart(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) > SAME_HIDDEN * float(expected.norm())


def _other_head(decoder: Decoder) -> InputError:
    return InputError(
        f"The head of {type(decoder.model).__name__} computes other logits than the model when it is given the "
        "hidden states that the model gives it; covercal compares models by what their heads make of hidden states."
    )


def _not_alone(decoder: Decoder) -> InputError:
    return InputError(
        f"The blocks of {type(decoder.model).__name__} do not compute by themselves what the model does: more than "
        "hidden states, keys and values goes from one to another, and covercal quantises one block after the other."
    )


def describe_decoder(folder: Path, *, trust_remote_code: bool = False) -> Decoder:
    """Return a decoder without weights and sites, from its configuration alone.

    Raises
    ------
    InputError
        As `make_decoder`.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with torch.device("meta"):
            model = loader_for(config).from_config(config, trust_remote_code=trust_remote_code)
    except CONFIGURATION_ERRORS as cause:
        said = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(
            f"transformers cannot make a model of {folder / 'config.json'}: {said} "
            "(a model that brings its own code needs model.trust_remote_code: true)."
        ) from cause
    path, blocks = find_blocks(model)
    check_blocks(model, blocks)
    return Decoder(model, path, blocks, ())


def most_positions(decoder: Decoder) -> int | None:
    """Return how many tokens a model can read that looks their positions up in a table; None where there is none.

    Rotary and linearly biased positions go on for ever; tables, learned or computed, end.
    """
    model, body = decoder.model, decoder.body
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    of_tokens = model.get_input_embeddings()
    lengths = [m.num_embeddings for m in body.modules() if isinstance(m, nn.Embedding) and m is not of_tokens]
    lengths += [len(each) for name, each in body.named_buffers() if each.ndim == 2 and "pos" in name.split(".")[-1]]
    return most if any(most <= length <= most + POSITIONS_AHEAD for length in lengths) else None


def find_blocks(model: PreTrainedModel) -> tuple[str, tuple[nn.Module, ...]]:
    """Return the name of the list of blocks and the blocks: the largest module list as long as the model is deep.

    One inside what the model calls its decoder goes before all others, of what reads images, say.

    Raises
    ------
    InputError
        When there is no such list.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside = {id(module) for module in model.get_decoder().modules()}
    lists = [
        (id(module) in inside, sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise InputError(
            f"The blocks of {type(model).__name__} cannot be found: no module list has "
            f"num_hidden_layers = {depth} entries."
        )
    *_, name, module = max(lists, key=lambda each: each[:2])
    return name, tuple(module)


def check_blocks(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """Raise when a block has no `nn.Linear`, or much of it lies outside: that would silently stay as it is.

    What is small stays unquantised: routers, and the short convolutions of hybrid models.

    Raises
    ------
    InputError
        Naming the block, the module and its class.
    """
    _check_own_weights(model, blocks)
    for index, block in enumerate(blocks):
        outside = [
            (parameter.numel(), f"{name}.{parameter_name}", type(module).__name__, tuple(parameter.shape))
            for name, module in block.named_modules()
            if not _is_quantized(module)
            for parameter_name, parameter in module.named_parameters(recurse=False)
            if parameter.squeeze().ndim >= 2 and not is_router(module, parameter)
        ]
        inside = sum(linear.weight.numel() for _, linear in _linears(block))
        if sum(size for size, *_ in outside) > SMALL_SHARE * inside:
            _, name, kind, shape = max(outside)
            raise InputError(
                f"Block {index} of {type(model).__name__} keeps weights in `{name}` ({kind}, shape {shape}); "
                "covercal quantises nn.Linear layers only."
            )
        if not inside:
            raise InputError(
                f"Block {index} of {type(model).__name__} has no linear layer to quantise; covercal quantises models "
                "all of whose blocks have some."
            )


def _is_quantized(module: nn.Module) -> bool:
    """Return whether a module is a linear, or holds some in another form."""
    return is_linear(module) or is_fused(module) or is_turned(module)


def _check_own_weights(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> None:
    """Raise when two blocks share what is quantised: each would quantise it in its own way, and one would be lost.

    Raises
    ------
    InputError
        Naming the blocks and the module.
    """
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            for parameter in module.parameters(recurse=False) if _is_quantized(module) else ():
                if owners.setdefault(id(parameter), index) != index:
                    raise InputError(
                        f"Block {index} of {type(model).__name__} shares the weights of `{name}` with block "
                        f"{owners[id(parameter)]}; covercal quantises every block by itself."
                    )


def check_sites(model: PreTrainedModel, index: int, block: nn.Module, sites: Sequence[Site]) -> None:
    """Raise when a linear of a block reads more than one input, and so has no Gram matrix of its own.

    One that no text reads stays as it is: one whose weight the block takes without calling it (Mamba), or one for
    images. Of a model that reads text alone these are small, as in `check_blocks`.

    Raises
    ------
    InputError
        Naming the block and the linear.
    """
    read = Counter(name for site in sites for name in site.linears)
    sizes = {name: module.weight.numel() for name, module in block.named_modules() if is_linear(module)}
    unread = sorted((name for name in sizes if not read[name]), key=sizes.__getitem__)
    text_only = model.config.get_text_config() is model.config
    refused = [name for name in sizes if read[name] > 1]
    if text_only and sum(map(sizes.__getitem__, unread)) > SMALL_SHARE * sum(map(sizes.__getitem__, read)):
        refused.append(unread[-1])
    if refused:
        raise InputError(
            f"Block {index} of {type(model).__name__} reads {read[refused[0]]} inputs with `{refused[0]}` in a text "
            f"of {PROBE_TOKENS} tokens; covercal quantises linears that read exactly one."
        )


def _check_rows(model: PreTrainedModel, index: int, name: str, read: Tensor) -> None:
    """Raise when a linear reads more or less than one row for each token: its tokens cannot be told from others.

    Raises
    ------
    InputError
        Naming the block and the linear.
    """
    rows = read.numel() // read.shape[-1]
    if rows != PROBE_TOKENS:
        raise InputError(
            f"Block {index} of {type(model).__name__} reads {rows} rows with `{name}` in a text of {PROBE_TOKENS} "
            "tokens; covercal quantises linears that read one row for each token."
        )


def batches(sequences: Sequence[npt.NDArray[np.int32]], tokens: int) -> Iterator[list[int]]:
    """Yield indices of sequences of one length, at most `tokens` tokens (at least one sequence) together."""
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(index)
    for length, members in sorted(by_length.items()):
        size = max(1, tokens // length)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def token_tensor(sequences: Sequence[npt.NDArray[np.int32]], device: torch.device) -> Tensor:
    """Return sequences of one length as int64 (sequences, length)."""
    return torch.from_numpy(np.stack(sequences).astype(np.int64)).to(device)


# --- one block at a time -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """A few tokens to try things on: what enters the first block, and every block's other arguments."""

    entering: Tensor
    arguments: tuple[BlockArguments, ...]

    @property
    def most(self) -> int:
        """Return how many numbers at most go from one block to the next for each token."""
        return max(each.beside * each.stream_width for each in self.arguments)


class _EnteredError(Exception):
    """A pass came to the first block."""


@torch.inference_mode()
def _returned(decoder: Decoder, tokens: Tensor) -> int | None:
    """Return how many things a block returns in a tuple: see `Decoder.returned`."""
    found: list[Any] = []
    block = decoder.block(0)
    forward = block.forward  # its own, also where it is the model's block, whose forward is replaced below

    def run_one(*positional: Any, **keywords: Any) -> None:
        with probing(block):
            found.append(forward(*positional, **keywords))
        raise _EnteredError

    with replaced_forward(decoder.blocks[0], run_one), suppress(_EnteredError):
        decoder.body(input_ids=tokens, use_cache=False)
    return len(found[0]) if isinstance(found[0], tuple | list) else None


@torch.inference_mode()
def block_inputs(decoder: Decoder, tokens: Tensor) -> tuple[Tensor, list[BlockArguments]]:
    """Return what enters the first block, and every block's other arguments (masks, positions), without running any.

    Parameters
    ----------
    decoder
        The model.
    tokens
        int64 (sequences, length).

    Returns
    -------
    hidden
        (sequences, length, model width).
    arguments
        Positional (after the hidden states) and keyword arguments for each block.
    """
    entered: list[Tensor] = []
    arguments: list[BlockArguments] = []
    left = [()] * len(decoder.blocks) if decoder.probe is None else [each.left for each in decoder.probe.arguments]

    def pass_through(*positional: Any, **keywords: Any) -> Tensor | tuple[Tensor | None, ...]:
        hidden = torch.as_tensor(positional[0] if positional else keywords.pop("hidden_states"))
        entered.append(hidden)
        earlier, beside = left[len(arguments)], hidden.shape[:-3].numel()
        arguments.append(BlockArguments(positional[1:], keywords, hidden.shape[-1], earlier, beside))
        return hidden if decoder.returned is None else (hidden, *[None] * (decoder.returned - 1))

    with ExitStack() as stack:
        for block in decoder.blocks:
            stack.enter_context(replaced_forward(block, pass_through))
        decoder.body(input_ids=tokens, use_cache=False)
    return entered[0], arguments


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` run `forward` instead of its own, for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _traced(
    decoder: Decoder, entering: Tensor, arguments: Sequence[BlockArguments]
) -> tuple[tuple[Site, ...], tuple[BlockArguments, ...]]:
    """Return the sites of every block, found by which linears receive the very same tensor in a forward pass.

    With them every block's arguments, which tell what earlier blocks left to it.
    """
    found: list[Site] = []
    probed: list[BlockArguments] = []
    left: tuple[Left, ...] = ()
    for index in range(len(decoder.blocks)):
        block = decoder.block(index)
        seen: list[tuple[Tensor, list[str]]] = []
        hooks = [
            module.register_forward_pre_hook(_note_input(seen, name))
            for name, module in block.named_modules()
            if is_linear(module)
        ]
        probed.append(replace(arguments[index], left=left))
        try:
            with probing(block):
                entering, left = run_and_tell(block, entering, probed[-1])
        except (AttributeError, LookupError, TypeError, ValueError) as cause:  # it misses what others hand to it
            raise _not_alone(decoder) from cause
        for hook in hooks:
            hook.remove()
        sites = [Site(index, order, tuple(names), tensor.shape[-1]) for order, (tensor, names) in enumerate(seen)]
        check_sites(decoder.model, index, block, sites)
        for tensor, names in seen:
            _check_rows(decoder.model, index, names[0], tensor)
        found += sites
    return tuple(found), tuple(probed)


def _note_input(seen: list[tuple[Tensor, list[str]]], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for tensor, names in seen:  # tensors are kept, so that memory is not reused and taken for the same
            if _same_memory(tensor, inputs[0]):
                names.append(name)
                return
        seen.append((inputs[0], [name]))

    return note


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1])


# --- the head ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def final_hidden(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Return what enters the language-model head, (sequences, length, width)."""
    output = decoder.body(input_ids=tokens, use_cache=False)
    hidden: Tensor = output[0]
    return hidden


class _BodyOutput(MoeModelOutputWithPast):  # type: ignore[misc]
    """What a body returns to its head: hidden states, and None for whatever else a model passes on."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@torch.inference_mode()
def head_logits(decoder: Decoder, hidden: Tensor) -> Tensor:
    """Return the model's own logits in float32 for given final hidden states, (sequences, length, vocabulary).

    The body is replaced by one that returns `hidden`, so whatever the model does after it (head, scaling,
    soft-capping) is the model's own code.
    """
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    with replaced_forward(decoder.body, lambda *_, **__: _BodyOutput(last_hidden_state=hidden)):
        logits: Tensor | None = decoder.model(input_ids=tokens, use_cache=False).logits
    if logits is None:  # of a model that calls all of itself its body
        raise _other_head(decoder)
    return logits.float()
