"""Tiny OLMo 2s: grouped heads, biases."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "olmo2",
    "architectures": ["Olmo2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head_biases": {"num_key_value_heads": None, "attention_bias": True},
}
