"""Tiny Command Rs: grouped heads, biases, a head of its own."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "cohere",
    "architectures": ["CohereForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.25,
}

CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "biases": {"attention_bias": True, "tie_word_embeddings": False},
}
