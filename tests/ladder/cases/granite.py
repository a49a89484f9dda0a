"""Tiny Granites: every multiplier, and none."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "granite",
    "architectures": ["GraniteForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.5,
    "tie_word_embeddings": True,
}

CASES: dict[str, dict[str, Any]] = {
    "scaled": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
}
