"""Blocks, sites, the walk over blocks and the head, against the models' own forward passes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    JetMoeConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
)

from covercal.block_call import run_block
from covercal.decoder import (
    Decoder,
    batches,
    block_inputs,
    describe_decoder,
    final_hidden,
    find_blocks,
    head_logits,
    linear_of,
    load_decoder,
    make_decoder,
    most_positions,
    pick_device,
    token_tensor,
)
from covercal.errors import InputError
from tests.tiny import ARCHITECTURES, BLOCKS, INNER, WIDTH, random_tokens, save_model, tiny_model

CPU = torch.device("cpu")
GATED = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), WIDTH),
    (("self_attn.o_proj",), WIDTH),
    (("mlp.gate_proj", "mlp.up_proj"), WIDTH),
    (("mlp.down_proj",), INNER),
)
SITES = dict.fromkeys(ARCHITECTURES, GATED) | {
    "opt": (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), WIDTH),
        (("self_attn.out_proj",), WIDTH),
        (("fc1",), WIDTH),
        (("fc2",), INNER),
    )
}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tokens(count: int = 3, length: int = 20, seed: int = 0) -> Tensor:
    return token_tensor(random_tokens(count, length, seed), CPU)


def own_hidden_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return what enters the first block and what leaves each block in the model's own forward pass."""
    states: list[Tensor] = []
    blocks = make_decoder(model).blocks

    def note_input(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states.append(positional[0] if positional else keywords["hidden_states"])

    def note_output(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [blocks[0].register_forward_pre_hook(note_input, with_kwargs=True)]
    hooks += [block.register_forward_hook(note_output) for block in blocks]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


# --- sites ---------------------------------------------------------------------------------------------------------


@every_architecture
def test_every_block_has_the_sites_of_its_architecture(architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    for block in range(BLOCKS):
        found = tuple((site.linears, site.channels) for site in decoder.sites if site.block == block)
        assert [(set(names), channels) for names, channels in found] == [
            (set(names), channels) for names, channels in SITES[architecture]
        ]


@every_architecture
def test_sites_are_numbered_in_order_of_execution(architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    assert [(s.block, s.order) for s in decoder.sites] == [(b, o) for b in range(BLOCKS) for o in range(4)]


@every_architecture
def test_every_linear_of_every_block_belongs_to_one_site(architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    names = sorted(decoder.full_name(site, name) for site in decoder.sites for name in site.linears)
    linears = sorted(
        name
        for name, module in decoder.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(decoder.blocks_path)
    )
    assert names == linears


@every_architecture
def test_full_names_lead_to_the_linears_of_the_sites(architecture: str) -> None:
    decoder = make_decoder(tiny_model(architecture))
    for site in decoder.sites:
        for name in site.linears:
            assert decoder.model.get_submodule(decoder.full_name(site, name)) is decoder.linear(site, name)


def test_a_sites_name_says_the_block_and_the_linears() -> None:
    site = make_decoder(tiny_model("opt")).sites[7]
    assert site.name == "block 1, input of fc2"


def test_finding_sites_leaves_no_hook_behind() -> None:
    model = make_decoder(tiny_model()).model
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_finding_sites_leaves_the_models_outputs_as_they_were() -> None:
    model = tiny_model("gemma2")
    with torch.inference_mode():
        before = model(input_ids=tokens()).logits
        make_decoder(model)
        assert torch.equal(model(input_ids=tokens()).logits, before)


def test_a_loaded_decoder_is_in_evaluation_mode() -> None:
    assert not any(module.training for module in make_decoder(tiny_model().train()).model.modules())


class Sharing(nn.Module):
    """A block whose linears get one tensor by different routes, and an equal copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.ModuleDict({"second": nn.Linear(WIDTH, INNER)})
        self.viewed = nn.Linear(WIDTH, WIDTH)
        self.copied = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(INNER, WIDTH)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        renamed = hidden_states
        wide = self.inner["second"](renamed)
        viewed = self.viewed(hidden_states.reshape(-1, WIDTH)).reshape(hidden_states.shape)
        return self.first(hidden_states) + viewed + self.copied(hidden_states.clone()) + self.last(wide.relu())


def with_blocks(block: type[nn.Module]) -> PreTrainedModel:
    model = tiny_model()
    model.model.layers = nn.ModuleList(block() for _ in range(BLOCKS))
    return model


def test_linears_that_read_one_tensor_by_different_routes_share_a_site() -> None:
    sites = make_decoder(with_blocks(Sharing)).sites
    assert [set(s.linears) for s in sites if s.block == 1] == [
        {"inner.second", "viewed", "first"},
        {"copied"},
        {"last"},
    ]


class Twice(nn.Module):
    """A block that runs one linear on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.shared(self.shared(hidden_states).relu())


def test_a_linear_that_reads_two_inputs_is_refused() -> None:
    with pytest.raises(InputError, match="shared"):
        make_decoder(with_blocks(Twice))


class Idle(nn.Module):
    """A block with a linear that a short text does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self.used(hidden_states)


def test_a_linear_that_no_input_reaches_is_refused() -> None:
    with pytest.raises(InputError, match="unused"):
        make_decoder(with_blocks(Idle))


class Prompted(nn.Module):
    """A block that puts a token of its own before the text."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        prompt = torch.ones(len(hidden_states), 1, WIDTH)
        return self.used(torch.cat([prompt, hidden_states], dim=1))[:, 1:]


def test_a_linear_that_reads_more_than_the_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"reads 5 rows with `used` in a text of 4 tokens"):
        make_decoder(with_blocks(Prompted))


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_block_with_weights_outside_linears_is_refused_by_name_and_class() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.more = nn.Bilinear(WIDTH, WIDTH, WIDTH)
    with pytest.raises(InputError, match=r"Block 1 of LlamaForCausalLM .*mlp\.more\.weight` \(Bilinear, .*nn\.Linear"):
        make_decoder(model)


def test_a_block_of_linears_of_its_own_kind_is_told_by_what_it_keeps() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    model = tiny_model()
    model.model.layers[1] = nn.ModuleDict({"proj": Own()})
    with pytest.raises(InputError, match=r"Block 1 of LlamaForCausalLM keeps weights in `proj\.weight` \(Own"):
        make_decoder(model)


def test_a_block_without_a_linear_is_refused_by_its_number() -> None:
    model = tiny_model()
    model.model.layers[1] = nn.Identity()
    with pytest.raises(InputError, match="Block 1 of LlamaForCausalLM has no linear layer"):
        make_decoder(model)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (GPT2Config(hidden_size=32, n_layer=1, n_head=2, n_positions=64), 64),
        (OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=48), 48),
        (GPTJConfig(hidden_size=32, n_layer=1, n_head=2, n_positions=64, rotary_dim=8), 64),
        (LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64), None),
        (BloomConfig(hidden_size=32, n_layer=1, n_head=2), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_a_table_of_positions_ends(config: Any, most: int | None) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert most_positions(Decoder(model, *find_blocks(model), ())) == most


def test_a_model_whose_blocks_cannot_be_found_is_refused() -> None:
    model = tiny_model()
    model.model.layers = model.model.layers[:2]
    with pytest.raises(InputError, match=r"blocks of LlamaForCausalLM cannot be found.*num_hidden_layers = 3"):
        make_decoder(model)


def test_something_else_than_a_linear_is_not_taken_for_one() -> None:
    with pytest.raises(TypeError, match="input_layernorm is a LlamaRMSNorm, not a linear"):
        linear_of(make_decoder(tiny_model()).blocks[0], "input_layernorm")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"device 'cuda:99' is not available here.*use auto or cpu"):
        pick_device("cuda:99")


# --- folders -------------------------------------------------------------------------------------------------------


@every_architecture
def test_linears_described_without_weights_are_those_of_the_loaded_model(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, architecture)
    decoder = load_decoder(folder, "float32", CPU)
    shapes = {
        decoder.full_name(site, name): tuple(decoder.linear(site, name).weight.shape)
        for site in decoder.sites
        for name in site.linears
    }
    assert describe_decoder(folder).linear_shapes == shapes


def test_describing_a_model_with_other_weights_than_linears_is_refused(tmp_path: Path) -> None:
    config = JetMoeConfig(hidden_size=WIDTH, num_hidden_layers=2, architectures=["JetMoeForCausalLM"])
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="JetMoeParallelExperts"):
        describe_decoder(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "nonsense"},
        {"model_type": "llama", "hidden_size": "32"},
        {"model_type": "llama", "num_hidden_layers": None},
        {"model_type": "llama", "hidden_size": 33, "num_attention_heads": 0},
        {"model_type": "llama", "dtype": "float8_e4m3fn"},
    ],
)
def test_a_configuration_that_transformers_makes_nothing_of_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"transformers cannot make a model of .*config\.json"):
        describe_decoder(tmp_path)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_model_is_loaded_in_the_dtype_asked_for(dtype: Any, expected: torch.dtype, tmp_path: Path) -> None:
    decoder = load_decoder(save_model(tmp_path), dtype, CPU)
    assert {parameter.dtype for parameter in decoder.model.parameters()} == {expected}


# --- the walk over blocks ------------------------------------------------------------------------------------------


@every_architecture
def test_walking_block_by_block_reproduces_the_models_hidden_states(architecture: str) -> None:
    model = tiny_model(architecture)
    expected = own_hidden_states(model, tokens())
    decoder = make_decoder(model)
    hidden, arguments = block_inputs(decoder, tokens())
    walked = [hidden]
    for block, argument in zip(decoder.blocks, arguments, strict=True):
        walked.append(run_block(block, walked[-1], argument))
    assert len(walked) == len(expected) == BLOCKS + 1
    assert all(torch.equal(a, b) for a, b in zip(walked, expected, strict=True))


def test_the_blocks_of_a_model_with_two_kinds_of_attention_get_their_own_masks() -> None:
    decoder = make_decoder(tiny_model("gemma2"))
    _, arguments = block_inputs(decoder, tokens(1, 20))
    masks = [each.keywords["attention_mask"] for each in arguments]
    assert not torch.equal(masks[0], masks[1])


def test_a_model_whose_blocks_share_a_linear_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(InputError, match=r"^Block 2 of LlamaForCausalLM shares the weights of `mlp.up_proj` with bloc"):
        make_decoder(model)


def test_a_model_whose_blocks_share_their_experts_is_refused() -> None:
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    with pytest.raises(
        InputError, match=r"^Block 1 of MixtralForCausalLM shares the weights of `mlp.experts` with bloc"
    ):
        make_decoder(model)


def test_the_body_of_a_model_that_calls_all_of_itself_so_is_what_holds_its_blocks() -> None:
    model = tiny_model("llama")
    model.get_decoder = lambda: model
    assert make_decoder(model).body is model.model


def test_a_model_whose_body_is_all_of_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr("covercal.decoder.body_of", lambda whole, _: whole)
    with pytest.raises(InputError, match=r"^The head of LlamaForCausalLM computes other logits than the model"):
        make_decoder(model)


def test_reading_block_inputs_runs_no_block() -> None:
    decoder = make_decoder(tiny_model())
    ran: list[int] = []
    for linear in (m for block in decoder.blocks for m in block.modules() if isinstance(m, nn.Linear)):
        linear.register_forward_pre_hook(lambda *_: ran.append(1))
    block_inputs(decoder, tokens())
    assert ran == []


def test_reading_block_inputs_leaves_the_blocks_as_they_were() -> None:
    model = tiny_model()
    expected = own_hidden_states(model, tokens())
    block_inputs(make_decoder(model), tokens())
    assert all(torch.equal(a, b) for a, b in zip(own_hidden_states(model, tokens()), expected, strict=True))


# --- the head ------------------------------------------------------------------------------------------------------


@every_architecture
def test_head_logits_of_the_final_hidden_states_are_the_models_logits(architecture: str) -> None:
    model = tiny_model(architecture)
    decoder = make_decoder(model)
    with torch.inference_mode():
        expected = model(input_ids=tokens(), use_cache=False).logits
    assert torch.equal(head_logits(decoder, final_hidden(decoder, tokens())), expected)


def test_head_logits_are_soft_capped_as_the_model_does() -> None:
    decoder = make_decoder(tiny_model("gemma2"))
    hidden = 100 * torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    logits = head_logits(decoder, hidden)
    capped = 5 * torch.tanh(hidden @ decoder.model.lm_head.weight.T / 5)
    torch.testing.assert_close(logits, capped)
    assert logits.abs().max() > 4.9


def test_head_logits_are_float32_for_a_model_of_another_dtype() -> None:
    decoder = make_decoder(tiny_model().to(torch.bfloat16))
    assert head_logits(decoder, final_hidden(decoder, tokens())).dtype == torch.float32


def test_head_logits_leave_the_body_as_it_was() -> None:
    decoder = make_decoder(tiny_model())
    before = final_hidden(decoder, tokens())
    head_logits(decoder, torch.zeros(1, 4, WIDTH))
    assert torch.equal(final_hidden(decoder, tokens()), before)


# --- batches -------------------------------------------------------------------------------------------------------


def sequences(*lengths: int) -> list[np.ndarray]:
    return [np.full(length, index, dtype=np.int32) for index, length in enumerate(lengths)]


def test_batches_hold_every_sequence_once() -> None:
    found = list(batches(sequences(3, 5, 3, 8, 5, 3, 3), 10))
    assert sorted(index for members in found for index in members) == list(range(7))


def test_a_batch_holds_sequences_of_one_length() -> None:
    given = sequences(3, 5, 3, 8, 5, 3, 3)
    assert all(len({given[i].size for i in members}) == 1 for members in batches(given, 10))


def test_a_batch_holds_as_many_sequences_as_its_tokens_allow() -> None:
    assert list(batches(sequences(3, 3, 3, 3, 5, 5), 9)) == [[0, 1, 2], [3], [4], [5]]


def test_a_sequence_longer_than_a_batch_goes_alone() -> None:
    assert list(batches(sequences(50, 50), 10)) == [[0], [1]]


def test_a_token_tensor_holds_the_sequences_as_rows() -> None:
    given = random_tokens(3, 7)
    tensor: Tensor = token_tensor(given, CPU)
    assert tensor.dtype == torch.int64
    np.testing.assert_array_equal(tensor.numpy(), np.stack(given))


def test_a_decoder_says_where_it_computes() -> None:
    decoder: Decoder = make_decoder(tiny_model())
    assert decoder.device == CPU
