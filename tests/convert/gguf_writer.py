"""Writes a Hugging Face model as GGUF, by the conventions of llama.cpp's converter.

Names come from `gguf`'s own tensor map and metadata goes through its writer, so nothing here is
shared with the code that reads the file back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.convert.gguf_files import KINDS, TOKENS, add_value

Float32 = NDArray[np.float32]
Config = Mapping[str, Any]
Tensors = Mapping[str, Float32]

ARCHITECTURES = {
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "gpt_neox": gguf.MODEL_ARCH.GPTNEOX,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "nemotron": gguf.MODEL_ARCH.NEMOTRON,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "olmo3": gguf.MODEL_ARCH.OLMO2,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "phi": gguf.MODEL_ARCH.PHI2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
    "stablelm": gguf.MODEL_ARCH.STABLELM,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
}
_PAIRS = ("llama", "mixtral", "granite", "smollm3")  # RoPE turns neighbours in llama.cpp
WHOLE_NORMS = ("gemma", "nemotron")  # norm weights have the 1 added that the model adds


Change = Callable[[dict[str, Float32]], dict[str, Float32]]


def write_model(
    path: Path,
    config: Config,
    tensors: Tensors,
    body: str = "F32",
    change: Change = lambda stored: stored,
    **more: Any,
) -> Path:
    """Write the model; its matrices in the type `body` where their rows are whole blocks.

    `change` gets all tensors by GGUF name before they are stored; `more` is further metadata.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_tokenizer(writer)
    _add_settings(writer, config)
    for key, value in more.items():
        writer.kv_data[0].pop(key, None)
        add_value(writer, key, value)
    for name, data in change(dict(gguf_tensors(config, tensors))).items():
        kind = gguf.GGMLQuantizationType[storage_type(data, body)]
        stored = data if kind.name == "F32" else gguf.quants.quantize(data, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(stored: dict[str, Float32], body: str) -> dict[str, Float32]:
    """What is left of the tensors when they are stored as `body`."""
    kinds = {
        name: gguf.GGMLQuantizationType[storage_type(data, body)] for name, data in stored.items()
    }
    return {
        name: gguf.quants.dequantize(gguf.quants.quantize(data, kinds[name]), kinds[name])
        for name, data in stored.items()
    }


def storage_type(data: Float32, body: str) -> str:
    """`body` for matrices with whole blocks, F32 for the rest."""
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[body]]
    return body if data.ndim > 1 and data.shape[-1] % block == 0 else "F32"


def gguf_tensors(config: Config, tensors: Tensors) -> Iterator[tuple[str, Float32]]:
    """GGUF name and data of every tensor of the file."""
    architecture = ARCHITECTURES[config["model_type"]]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, data in _arranged(config, tensors):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"{name} has no GGUF name"
        yield found, np.ascontiguousarray(data)
    yield from _extra_tensors(config)


def _arranged(config: Config, tensors: Tensors) -> Iterator[tuple[str, Float32]]:
    """The tensors under Hugging Face names, in the arrangement that GGUF has."""
    kind = config["model_type"]
    stacks: dict[str, dict[int, Float32]] = {}
    for name, data in tensors.items():
        index = re.search(r"(?:experts|norms)\.(\d+)\.", name)
        if index:
            stacks.setdefault(_stacked_name(name), {})[int(index[1])] = data
        elif kind in _PAIRS and re.search(r"[qk]_proj\.", name):
            heads = config["num_attention_heads"]
            if "k_proj" in name:
                heads = config.get("num_key_value_heads", heads)
            yield name, _neighbouring_pairs(data, heads)
        elif kind.startswith(WHOLE_NORMS) and name.endswith("norm.weight"):
            yield name, data + np.float32(1)
        elif kind == "gpt_oss" and ".experts." in name:
            yield from _gpt_oss_experts(name, data)
        elif kind == "gpt_oss" and name.endswith("sinks"):
            yield f"{name}.weight", data
        elif kind == "gpt2" and re.search(r"c_(attn|proj|fc)\.weight", name):
            yield name, data.T
        elif kind == "gpt_neox" and "query_key_value" in name:
            heads = config["num_attention_heads"]
            split = data.reshape(heads, 3, -1, *data.shape[1:])
            yield name, split.swapaxes(0, 1).reshape(data.shape)
        else:
            yield name, data
    for name, parts in stacks.items():
        yield name, np.stack([parts[number] for number in range(len(parts))])


def _gpt_oss_experts(name: str, data: Float32) -> Iterator[tuple[str, Float32]]:
    """Floats are (experts, inputs, outputs), and gate and up alternate in the outputs."""
    if name.endswith("_bias"):
        base, kind = name.removesuffix("_bias"), "bias"
    else:
        base, kind, data = name, "weight", data.swapaxes(1, 2)
    if "gate_up_proj" not in base:
        yield f"{base}.{kind}", data
        return
    for first, part in enumerate(("gate_proj", "up_proj")):
        yield f"{base.replace('gate_up_proj', part)}.{kind}", data[:, first::2]


def _stacked_name(name: str) -> str:
    name = name.replace("block_sparse_moe.experts", "feed_forward.experts")
    if "feed_forward.experts" in name:
        name = name.removeprefix("model.")
    return re.sub(r"(experts)\.\d+\.|norms\.\d+\.", lambda m: f"{m[1]}." if m[1] else "", name)


def _neighbouring_pairs(data: Float32, heads: int) -> Float32:
    halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
    return halves.swapaxes(1, 2).reshape(data.shape)


def _extra_tensors(config: Config) -> Iterator[tuple[str, Float32]]:
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = np.array(scaling[f"{length}_factor"], np.float32)
            yield f"rope_factors_{length}.weight", factors
    if scaling.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_divisors(config, scaling)


def _llama3_divisors(config: Config, scaling: Mapping[str, Any]) -> Float32:
    width = config["hidden_size"] // config["num_attention_heads"]
    factors = []
    for number in range(0, width, 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (number / width)
        turns = scaling["original_max_position_embeddings"] / wavelength
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(scaling["factor"])
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def _add_tokenizer(writer: Any) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types(KINDS)
    writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_settings(writer: Any, config: Config) -> None:
    settings: dict[str, Callable[[Any, Config], None]] = {
        "gemma": _gemma,
        "gemma2": _gemma2,
        "gemma3_text": _gemma3,
        "gpt2": _gpt2,
        "gpt_neox": _gpt_neox,
        "gpt_oss": _gpt_oss,
        "granite": _granite,
        "nemotron": _nemotron,
        "olmo3": _olmo3,
        "phi": _phi,
        "phi3": _phi3,
        "qwen3_moe": _qwen3_moe,
        "stablelm": _stablelm,
    }
    settings.get(config["model_type"], _usual)(writer, config)


def _sizes(writer: Any, config: Config) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    heads = config["num_attention_heads"]
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))


def _usual(writer: Any, config: Config) -> None:
    """What every model gets whose converter class sets nothing of its own."""
    _sizes(writer, config)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if "rope_theta" in config:
        writer.add_rope_freq_base(config["rope_theta"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key in ("layer_norm_eps", "norm_epsilon"):
        if key in config:
            writer.add_layer_norm_eps(config[key])
    for key in ("num_local_experts", "num_experts"):
        if key in config:
            writer.add_expert_count(config[key])
            writer.add_expert_used_count(config["num_experts_per_tok"])
    width = config.get("head_dim")
    if width is not None:
        writer.add_key_length(width)
        writer.add_value_length(width)
    if config["model_type"] in _PAIRS:
        writer.add_vocab_size(config["vocab_size"])
        usual = config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(width or usual)


def _qwen3_moe(writer: Any, config: Config) -> None:
    _usual(writer, config)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _gpt_oss(writer: Any, config: Config) -> None:
    _usual(writer, config)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _granite(writer: Any, config: Config) -> None:
    _usual(writer, config)
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _nemotron(writer: Any, config: Config) -> None:
    _sizes(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_eps(config["norm_eps"])
    turning = int(config["partial_rotary_factor"] * config["hidden_size"])
    writer.add_rope_dimension_count(turning // config["num_attention_heads"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _olmo3(writer: Any, config: Config) -> None:
    _usual(writer, config)
    writer.add_sliding_window(config["sliding_window"])
    local = [kind == "sliding_attention" for kind in config["layer_types"]]
    writer.add_sliding_window_pattern(local)


def _gemma(writer: Any, config: Config) -> None:
    _sizes(writer, config)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])


def _gemma2(writer: Any, config: Config) -> None:
    _gemma(writer, config)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def _gemma3(writer: Any, config: Config) -> None:
    _usual(writer, config)
    writer.add_sliding_window(config["sliding_window"])


def _phi(writer: Any, config: Config) -> None:
    _sizes(writer, config)
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    width = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(config["partial_rotary_factor"] * width))


def _phi3(writer: Any, config: Config) -> None:
    _sizes(writer, config)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    width = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(config.get("partial_rotary_factor", 1.0) * width))
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_sliding_window(config.get("sliding_window") or 0)
    original = config["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    if config.get("rope_scaling"):
        stretch = config["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original))
        writer.add_rope_scaling_attn_factors(factor)


def _stablelm(writer: Any, config: Config) -> None:
    _sizes(writer, config)
    width = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(config["partial_rotary_factor"] * width))
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])


def _gpt_neox(writer: Any, config: Config) -> None:
    _sizes(writer, config)
    width = config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(config["rotary_pct"] * width))
    writer.add_parallel_residual(config["use_parallel_residual"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])


def _gpt2(writer: Any, config: Config) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
