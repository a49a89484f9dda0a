"""Tiny Granite MoEs: the constants of Granite 3.1, some experts and many, biases."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "granitemoe",
    "architectures": ["GraniteMoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0625,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.5,
    "tie_word_embeddings": True,
}

CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "biases": {"attention_bias": True, "num_local_experts": 6, "tie_word_embeddings": False},
}

SCALES = {"router.layer.weight": 3.0}
"""Clear choices: an expert chosen otherwise for a rounding error is not what q8 is checked for."""
