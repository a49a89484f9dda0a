"""Tiny OLMoEs: weights of the chosen experts that sum to 1 and not, grouped heads, biases."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "softmax_over_all": {},
    "sums_to_one": {"norm_topk_prob": True, "num_experts": 6, "num_experts_per_tok": 2},
    "grouped_biases": {
        "num_key_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}

SCALES = {"mlp.gate.weight": 3.0}
"""Clear choices: an expert chosen otherwise for a rounding error is not what q8 is checked for."""
