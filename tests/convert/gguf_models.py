"""Tiny models in the words of `config.json`, one or more for each architecture GGUF files have."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.convert.gguf_files import TOKENS

Float32 = NDArray[np.float32]

_SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_RMS: dict[str, Any] = {**_SIZES, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def _config(
    model_type: str, architecture: str, base: dict[str, Any], **more: Any
) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [architecture]} | base | more


def _gemma(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
    }
    shared |= {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 8}
    return _config(model_type, architecture, _RMS, **(shared | more))


_GPT2 = {
    "vocab_size": len(TOKENS),
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + index / 10 for index in range(6)],
    "long_factor": [1.0 + index for index in range(6)],
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

MODELS: dict[str, dict[str, Any]] = {
    "llama": _config("llama", "LlamaForCausalLM", _RMS),
    "llama-biases-tied": _config(
        "llama",
        "LlamaForCausalLM",
        _RMS,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "llama-3.1": _config("llama", "LlamaForCausalLM", _RMS, rope_scaling=_LLAMA3),
    "mixtral": _config(
        "mixtral", "MixtralForCausalLM", _RMS, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2": _config("qwen2", "Qwen2ForCausalLM", _RMS, rope_theta=1000000.0),
    "qwen2-yarn": _config(
        "qwen2", "Qwen2ForCausalLM", _RMS, tie_word_embeddings=True, rope_scaling=_YARN
    ),
    "qwen3": _config("qwen3", "Qwen3ForCausalLM", _RMS, head_dim=32, tie_word_embeddings=True),
    "qwen3moe": _config(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _RMS,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
    ),
    "phi2": _config(
        "phi",
        "PhiForCausalLM",
        _SIZES,
        num_key_value_heads=4,
        intermediate_size=256,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        rope_theta=10000.0,
    ),
    "phi3": _config(
        "phi3",
        "Phi3ForCausalLM",
        _RMS,
        sliding_window=16,
        original_max_position_embeddings=128,
    ),
    "phi3-longrope": _config(
        "phi3",
        "Phi3ForCausalLM",
        _RMS,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
        original_max_position_embeddings=32,
        rope_scaling=_LONGROPE,
    ),
    "gemma2": _gemma(
        "gemma2",
        "Gemma2ForCausalLM",
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        layer_types=[_LOCAL, _GLOBAL],
    ),
    "gemma3": _gemma(
        "gemma3_text",
        "Gemma3ForCausalLM",
        num_hidden_layers=7,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=[*[_LOCAL] * 5, _GLOBAL, _LOCAL],
    ),
    "gemma": _config(
        "gemma",
        "GemmaForCausalLM",
        _RMS,
        head_dim=32,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    ),
    "gpt-oss": _config(
        "gpt_oss",
        "GptOssForCausalLM",
        _RMS,
        head_dim=32,
        rope_theta=150000.0,
        rope_scaling={**_YARN, "truncate": False},
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "granite": _config(
        "granite",
        "GraniteForCausalLM",
        _RMS,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
    "stablelm": _config(
        "stablelm",
        "StableLmForCausalLM",
        _SIZES,
        layer_norm_eps=1e-5,
        rope_theta=10000.0,
        partial_rotary_factor=0.25,
        use_qkv_bias=True,
        qk_layernorm=False,
        use_parallel_residual=False,
    ),
    "stablelm-parallel": _config(
        "stablelm",
        "StableLmForCausalLM",
        _SIZES,
        layer_norm_eps=1e-5,
        rope_theta=10000.0,
        partial_rotary_factor=0.25,
        use_qkv_bias=False,
        qk_layernorm=True,
        use_parallel_residual=True,
    ),
    "starcoder2": _config(
        "starcoder2",
        "Starcoder2ForCausalLM",
        _SIZES,
        norm_epsilon=1e-5,
        rope_theta=100000.0,
        use_bias=True,
        sliding_window=None,
        tie_word_embeddings=True,
    ),
    "gpt2": _config("gpt2", "GPT2LMHeadModel", _GPT2, tie_word_embeddings=True),
    "gptneox": _config(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _SIZES,
        num_key_value_heads=4,
        layer_norm_eps=1e-5,
        rotary_pct=0.25,
        rotary_emb_base=10000,
        use_parallel_residual=True,
    ),
    "olmo2": _config("olmo2", "Olmo2ForCausalLM", _RMS),
    "olmo3": _config(
        "olmo3",
        "Olmo3ForCausalLM",
        _RMS,
        num_hidden_layers=5,
        sliding_window=8,
        layer_types=[*[_LOCAL] * 3, _GLOBAL, _LOCAL],
        rope_theta=500000.0,
        rope_scaling=_YARN,
    ),
    "nemotron": _config(
        "nemotron",
        "NemotronForCausalLM",
        _SIZES,
        norm_eps=1e-5,
        partial_rotary_factor=0.5,
        rope_theta=10000.0,
    ),
    "olmoe": _config(
        "olmoe",
        "OlmoeForCausalLM",
        _RMS,
        intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    ),
    "smollm3": _config(
        "smollm3",
        "SmolLM3ForCausalLM",
        _RMS,
        num_hidden_layers=5,
        no_rope_layers=[1, 1, 1, 0, 1],
        tie_word_embeddings=True,
    ),
}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Float32]:
    """Random weights of these shapes, as large as those of real models."""
    rng = np.random.default_rng(seed)
    found: dict[str, Float32] = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            values = 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            values /= np.float32(np.sqrt(shape[-1]))
        found[name] = values.astype(np.float32)
    return found
