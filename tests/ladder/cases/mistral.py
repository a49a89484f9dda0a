"""Tiny Mistrals: with and without a window, wide heads."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "sliding_window": 8,
}

CASES: dict[str, dict[str, Any]] = {
    "window": {},
    "no_window": {"sliding_window": None, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 32, "sliding_window": 5, "num_key_value_heads": 4},
}
