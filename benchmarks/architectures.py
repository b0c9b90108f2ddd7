"""Every causal language model of transformers and every model that reads images, made tiny, through the whole chain.

`python -m benchmarks.architectures [--only TYPE ...] [--output FILE]`

With random weights each is saved, quantised to 8 bits by rounding to nearest (on both kinds of grids: transformers
reads packed experts on symmetric ones only), plain GPTQ, the default method and AWQ, read back by transformers, and
compared with the original: no method may lose much more than rounding to nearest. What covercal refuses is told with
its sentence; anything else that goes wrong is an error. Some cannot be made so small.
"""

import argparse
import copy
import json
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto as known

from benchmarks.real_model import report
from covercal.errors import CovercalError, EvaluationError
from covercal.recipe import Recipe, parse_recipe
from flows.chain import run_chain
from flows.execution import Direct, Recorder
from flows.inputs import check_model, identify
from flows.summary import summarize
from storage.artifacts import ArtifactStore
from tasks.model import quiet_transformers

VOCABULARY = 320
MOST_PARAMETERS = 20_000_000
SECONDS = 120  # for one model
USUAL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OTHER_NAMES = {
    **{"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64, "n_positions": 512, "rotary_dim": 8},
    **{"d_model": 32, "n_layers": 3, "n_heads": 4, "num_layers": 3, "max_seq_len": 512, "seq_length": 512},
    **{"ffn_dim": 64, "ffn_hidden_size": 64, "word_embed_proj_dim": 32, "num_kv_heads": 2, "sliding_window": 8},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [],
        "num_dense_layers": 1,
    },
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_num_heads": 8},
}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
PER_LAYER = {
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 1},
    **{"global_head_dim": 16, "num_global_key_value_heads": 2, "sliding_window": 8},
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
ALL = USUAL | OTHER_NAMES
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
SEEING = USUAL | {
    "depth": 2,
    "num_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
    "embed_dim": 32,
}
NO_HEAD_SIZE = {name: value for name, value in ALL.items() if name != "head_dim"}
SIZES: tuple[dict[str, Any], ...] = (  # tried in this order
    ALL,
    USUAL,
    ALL | {"num_key_value_heads": 4, "qk_head_dim": 16},
    NO_HEAD_SIZE,
    NO_HEAD_SIZE | {"attention_types": [[["global"], 3]]},
    NO_HEAD_SIZE | {"layer_types": ["full_attention"] * 3},
    NO_HEAD_SIZE | {"layer_types": ["conv", "full_attention", "full_attention"]},
    ALL | {"head_dim": 16, "num_key_value_heads": 4},
    ALL | HYBRID,
    USUAL | PER_LAYER,
    *({"text_config": text, "vision_config": SEEING} for text in (ALL | HYBRID, ALL | PER_LAYER, ALL, USUAL | ROTARY)),
)
MAMBA = {"n_groups": 1, "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_ngroups": 1}
_ONE_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LATENT = NO_HEAD_SIZE | {"num_key_value_heads": 4}
OWN_SIZES: dict[str, dict[str, Any]] = {  # what is small beside linears in a model must be so in its tiny one, too
    "cohere_compass": {
        "text_config": ALL
        | {"rope_parameters": {"full_attention": _ONE_ROPE, "sliding_attention": ROTARY["rope_parameters"]}},
        "vision_config": SEEING,
    },
    "cohere_compass_text": ALL | {"rope_parameters": {"full_attention": _ONE_ROPE, "sliding_attention": _ONE_ROPE}},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 512, "vocab_size": VOCABULARY}
    | {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}}
    | {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "ernie4_5_vl_moe": {
        "text_config": ALL
        | {"head_dim": 16, "moe_intermediate_size": [64, 32]}
        | {"rope_parameters": _ONE_ROPE | {"mrope_section": [3, 3, 2]}},
        "vision_config": SEEING,
    },
    "exaone4_5": {"text_config": ALL | {"model_type": "exaone4"}, "vision_config": SEEING},
    "falcon_mamba": USUAL | MAMBA | {"hidden_size": 256, "time_step_rank": 16},
    "gemma4_unified": {
        "text_config": ALL | PER_LAYER,
        "vision_config": {"mm_embed_dim": 32, "output_proj_dims": 32},
    },
    "glm4v_moe": {
        "text_config": ALL
        | {"rope_parameters": _ONE_ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
        "vision_config": SEEING,
    },
    "glm5_next": {
        "text_config": _LATENT
        | {"hidden_size": 384, "intermediate_size": 1536, "moe_intermediate_size": 512, "head_dim": 0}
        | {"qk_nope_head_dim": 64, "qk_rope_head_dim": 0, "v_head_dim": 64, "q_lora_rank": 128, "kv_lora_rank": 128}
        | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 32, "index_kpool": 4}
        | {"linear_head_dim": 64, "linear_num_heads": 8, "mlp_layer_types": ["dense", "sparse", "sparse"]}
        | {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"]},
        "vision_config": SEEING | {"out_hidden_size": 384, "projection_intermediate_size": 64},
    },
    "hy_v4": ALL | {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128},
    "jamba": USUAL
    | MAMBA
    | {"hidden_size": 128, "intermediate_size": 256, "mamba_dt_rank": 8, "num_experts": 4}
    | {"attn_layer_period": 3, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_k25": {
        "text_config": _LATENT,
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
    "llama4_text": ALL
    | {"intermediate_size_mlp": 64, "moe_layers": [1, 2], "no_rope_layers": [1, 1, 0], "attention_chunk_size": 8},
    "mamba": USUAL | MAMBA | {"hidden_size": 256, "time_step_rank": 16},
    "mamba2": USUAL | MAMBA | {"hidden_size": 64, "num_heads": 8, "head_dim": 16},
    "mistral4": _LATENT | {"first_k_dense_replace": 0},
    "mistral_large4": {"text_config": _LATENT, "vision_config": SEEING},
    "molmo2": {
        "text_config": ALL | {"additional_vocab_size": 8},
        "vision_config": SEEING
        | {"image_size": [28, 28], "num_position_embeddings": 5, "num_key_value_heads": 4, "head_dim": 8},
        "adapter_config": {"hidden_size": 32, "intermediate_size": 64, "text_hidden_size": 32, "head_dim": 8}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "vision_feature_layer": [-1]},
    },
    "nemotron_h": USUAL
    | MAMBA
    | {"hidden_size": 64, "head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16}
    | {"layers_block_type": ["mamba", "attention", "moe"], "n_routed_experts": 4, "moe_intermediate_size": 64}
    | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 64},
    "recurrent_gemma": USUAL | {"hidden_size": 64, "intermediate_size": 384, "lru_width": 64},
}
READING_IMAGES = (
    known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
)
METHODS: dict[str, dict[str, Any]] = {  # rounding to nearest is the yardstick of what a model loses at 8 bits
    "rtn": {"method": "rtn", "bits": 8, "group_size": 16},
    "packed": {"method": "rtn", "bits": 8, "group_size": 16, "symmetric": True},  # so are experts, too
    "gptq": {"method": "gptq", "bits": 8, "group_size": 16},
    "covercal": {"method": "covercal", "bits": 8, "group_size": 16},
    "awq": {"method": "awq", "bits": 8, "group_size": 16},
}
WORDS = ["the", "cat", "dog", "runs", "def", "return", "if", "x", "y", "=", "(", ")", "plus", "is", "not"]


class TooLongError(Exception):
    """A model took longer than its seconds."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise `TooLongError` in this thread after some seconds."""

    def stop(*_: Any) -> None:
        raise TooLongError(f"it took longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def tiny_model(kind: str) -> PreTrainedModel | str:
    """Return a small random model of a type; where none of `SIZES` makes one that runs, why the last did not."""
    why = f"larger than {MOST_PARAMETERS:,} parameters"
    loader = AutoModelForCausalLM if kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    for sizes in [OWN_SIZES[kind]] if kind in OWN_SIZES else SIZES:
        try:
            config = AutoConfig.for_model(kind, **copy.deepcopy(sizes))  # some change what they are given
            with torch.device("meta"):
                empty = loader.from_config(config)
            if sum(parameter.numel() for parameter in empty.parameters()) > MOST_PARAMETERS:
                continue
            torch.manual_seed(0)
            model = loader.from_config(config, dtype=torch.float32).eval()
            with torch.inference_mode():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.normal_(0, 0.3)
                model(input_ids=torch.arange(3, 35)[None], use_cache=False)
        except TooLongError:
            raise
        except Exception as cause:  # whatever a type has against these sizes: the next ones are tried
            why = f"{type(cause).__name__}: {str(cause)[:200]}"
            continue
        return model
    return why


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def write_texts(path: Path, seeds: range) -> None:
    texts = [" ".join(random.Random(seed).choices(WORDS, k=40)) for seed in seeds]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def recipe(folder: Path, quantization: dict[str, Any]) -> Recipe:
    value = {
        "model": {"source": "model", "dtype": "float32"},
        "device": "cpu",
        "pool": {"sources": [{"path": "pool.jsonl"}], "sequence_length": 32, "samples": 16},
        "outliers": {"k": 2.0},
        "selection": {"budget": 8},
        "quantization": quantization,
        "evaluation": {"divergence": [{"path": "heldout.jsonl", "window": 32, "limit": 6}], "random": 0},
    }
    return parse_recipe(value, folder)


def divergence(folder: Path, quantization: dict[str, Any], store: ArtifactStore) -> float:
    """Return the divergence of the original to the model quantised so."""
    wanted = recipe(folder, quantization)
    inputs, execution = identify(wanted, store), Direct(store, Recorder())
    check_model(wanted, inputs, execution)
    summary = summarize(wanted, run_chain(wanted, inputs, execution), store)
    return float(summary["evaluation"][0]["run"]["all"]["divergence"])


def outcome(kind: str) -> dict[str, Any]:
    """Return what became of a type: `outcome` (quantised, refused, not made, error), the sentence, divergences."""
    quiet_transformers()
    try:
        with at_most(SECONDS), tempfile.TemporaryDirectory(prefix="covercal-architectures-") as name:
            model = tiny_model(kind)
            if isinstance(model, str):
                return {"outcome": "not made", "sentence": model}
            folder = Path(name)
            model.save_pretrained(folder / "model")
            tokenizer().save_pretrained(folder / "model")
            write_texts(folder / "pool.jsonl", range(60))
            write_texts(folder / "heldout.jsonl", range(1000, 1020))
            store = ArtifactStore(folder / "store")
            found = {each: divergence(folder, settings, store) for each, settings in METHODS.items()}
            return {"outcome": "quantised", **found}
    except EvaluationError as late:  # all work was done by then
        return {"outcome": "error", "sentence": str(late)}
    except CovercalError as refused:
        return {"outcome": "refused", "sentence": str(refused)}
    except Exception as error:  # one type must not lose the others; the table says what it was
        return {"outcome": "error", "sentence": f"{type(error).__name__}: {str(error)[:200]}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="types of models, as in a config.json's model_type")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    console, found = Console(stderr=True), {}
    for kind in given.only or sorted({*known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *READING_IMAGES}):
        found[kind] = outcome(kind)
        console.print(f"{kind}: {found[kind]}", highlight=False, markup=False)
    rows = [
        [
            kind,
            each["outcome"],
            each.get("sentence") or ", ".join(f"{each[name]:.4f}" for name in METHODS if name in each),
        ]
        for kind, each in found.items()
        if each["outcome"] != "not made"
    ]
    counts = Counter(each["outcome"] for each in found.values())
    title = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    report(
        title,
        ["type", "", f"KL at 8 bits: {', '.join(METHODS)}"],
        rows,
        {"counts": dict(counts), "types": found},
        given.output,
    )


if __name__ == "__main__":
    main()
