"""Tiny random decoders of real architectures, a tokenizer trained on the spot, and texts, all made here."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320
WIDTH = 32
INNER = 64
BLOCKS = 3

_SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "mistral": _SHAPE | {"sliding_window": 8},
    "qwen2": _SHAPE,
    "qwen3": _SHAPE,
    "gemma": _SHAPE,
    "gemma2": _SHAPE | {"sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": _SHAPE | {"sliding_window": 8},
    "opt": {
        "hidden_size": WIDTH,
        "ffn_dim": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": WIDTH,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}
EXPERTS = 4
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _SHAPE | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen3_moe": _SHAPE
    | {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
_GPT = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_inner": INNER, "n_positions": 512, "vocab_size": VOCABULARY}
_EXPERTS = {
    "num_local_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_PER_LAYER = {
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,  # the last two read the keys and values that the first two left
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
}
OTHERS: dict[str, dict[str, Any]] = {  # each with something that the ones above have not
    "bloom": {"hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": 4, "vocab_size": VOCABULARY},
    "mpt": {"d_model": WIDTH, "n_layers": BLOCKS, "n_heads": 4, "max_seq_len": 512, "vocab_size": VOCABULARY},
    "gpt2": _GPT,
    "openai-gpt": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_bigcode": _GPT,
    "gpt_neox": _SHAPE,
    "biogpt": _SHAPE,
    "modernbert-decoder": _SHAPE | {"local_attention": 16},
    "phi3": _SHAPE,
    "cohere2": _SHAPE | {"sliding_window": 8},
    "granite": _SHAPE,
    "olmo2": _SHAPE,
    "glm4": _SHAPE,
    "rwkv": _SHAPE | {"attention_hidden_size": WIDTH},
    "gemma4_text": _SHAPE | _PER_LAYER,
    "gemma3n_text": _SHAPE | _PER_LAYER,
    "qwen3_next": _SHAPE | _EXPERTS | _HYBRID | {"shared_expert_intermediate_size": INNER},
    "qwen2_moe": _SHAPE | _EXPERTS | {"shared_expert_intermediate_size": INNER},
    "deepseek_v3": _SHAPE
    | _EXPERTS
    | _LATENT
    | {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1}
    | {"first_k_dense_replace": 1},
    "ernie4_5_moe": _SHAPE | _EXPERTS | {"moe_num_experts": EXPERTS, "moe_k": 2},
    "granitemoe": _SHAPE | _EXPERTS,
    "lfm2_moe": _SHAPE
    | _EXPERTS
    | {"layer_types": ["conv", "full_attention", "full_attention"], "num_dense_layers": 1},
    "phimoe": _SHAPE | _EXPERTS,
    "gpt_oss": _SHAPE | _EXPERTS | {"layer_types": ["full_attention"] * BLOCKS},
    "minimax_m3_vl_text": _SHAPE | _EXPERTS,
    "llama4_text": _SHAPE
    | _EXPERTS
    | {"intermediate_size_mlp": INNER, "moe_layers": [1, 2], "no_rope_layers": [1, 1, 0], "attention_chunk_size": 8},
    "mamba": _SHAPE | {"hidden_size": 8 * WIDTH, "state_size": 8, "time_step_rank": 16},
    "nemotron_h": _SHAPE
    | _EXPERTS
    | {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": INNER}
    | {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 16}
    | {"n_groups": 1, "ssm_state_size": 8},
}
DOMAINS = {
    "animals": "cat dog horse sheep mouse bird fish runs sleeps eats sees chases the a quick lazy small",
    "numbers": "one two three four five six seven plus minus times equals sum is not more than less",
    "code": "def return if else for in range print self import class None True False lambda x y z ( ) : =",
}


def tiny_model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Return a random model; weights are large enough that the blocks matter, and a few input channels stand out."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **(ARCHITECTURES | MIXTURES | OTHERS)[architecture])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.3)
        kept = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in kept and buffer.is_floating_point():  # biases of routers, for one
                buffer.copy_(1 + torch.rand(buffer.shape))
    return model.eval()


def text(seed: int, domain: str, words: int = 60) -> str:
    """Return a text of one domain."""
    return " ".join(random.Random(f"{domain}{seed}").choices(DOMAINS[domain].split(), k=words))


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(seed, domain) for domain in DOMAINS for seed in range(20)], trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer without special first tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_model(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """Write a tiny model and its tokenizer as a transformers folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(architecture, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_texts(path: Path, seeds: range, words: int = 60) -> Path:
    """Write a JSONL file with one text of every domain for each seed."""
    rows = [{"text": text(seed, domain, words), "domain": domain} for seed in seeds for domain in DOMAINS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def random_tokens(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    """Return random token sequences, int32 (length,) each."""
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY, length).astype(np.int32) for _ in range(count)]


def recipe_value(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """Return a whole small recipe over files that are made in `folder`; sections can be changed by name."""
    if not (folder / "model").exists():
        save_model(folder / "model")
        write_texts(folder / "pool.jsonl", range(40))
        write_texts(folder / "heldout.jsonl", range(1000, 1010))
    value: dict[str, Any] = {
        "model": {"source": str(folder / "model"), "dtype": "float32"},
        "device": "cpu",
        "pool": {
            "sources": [{"path": str(folder / "pool.jsonl"), "domain": "domain"}],
            "sequence_length": 32,
            "samples": 16,
        },
        "statistics": {"shard_samples": 8},
        "outliers": {"k": 2.0},
        "selection": {"budget": 4},
        "quantization": {"bits": 4, "group_size": 16},
        "evaluation": {
            "divergence": [{"path": str(folder / "heldout.jsonl"), "domain": "domain", "window": 32, "limit": 6}]
        },
    }
    for section, fields in changes.items():
        value[section] = {**value.get(section, {}), **fields}
    return value


def save_gguf(path: Path, seed: int = 0, *, without: str = "no tensor") -> Path:
    """Write a tiny Llama as a GGUF file of float32 tensors, as a converter would (query and key rows interleaved)."""
    import gguf

    model = tiny_model("llama", seed)
    tokenizer = json.loads(_tokenizer_json())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if t in ("<pad>", "<s>", "</s>") else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        if heads:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stem, _, suffix = name.rpartition(".")
        if name != without:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
