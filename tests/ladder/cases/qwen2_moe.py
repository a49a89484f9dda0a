"""Tiny Qwen2 MoEs: an expert for all tokens, dense layers between, windows on early layers."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "sliding_window": 8,
    "use_sliding_window": False,
    "max_window_layers": 1,
}

CASES: dict[str, dict[str, Any]] = {
    "shared": {},
    "dense_between_no_bias": {
        "num_hidden_layers": 3,
        "decoder_sparse_step": 2,
        "qkv_bias": False,
        "norm_topk_prob": True,
    },
    "early_window": {"use_sliding_window": True},
}

SCALES = {"mlp.gate.weight": 3.0}
"""Clear choices: an expert chosen otherwise for a rounding error is not what q8 is checked for."""
