"""Tiny ERNIEs: RoPE over neighbours, with and without biases."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "ernie4_5",
    "architectures": ["Ernie4_5ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "head_dim": 32,
}

CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "biases": {"use_bias": True, "head_dim": 16, "tie_word_embeddings": False},
}
