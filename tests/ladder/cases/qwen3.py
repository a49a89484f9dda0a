"""Tiny Qwen3s: tied and not, biases, windows on late layers and switched off."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "sliding_window": 8,
    "use_sliding_window": False,
    "max_window_layers": 2,
}

CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "own_head": {"tie_word_embeddings": False},
    "late_window": {"num_hidden_layers": 3, "use_sliding_window": True, "max_window_layers": 1},
    "biases": {"attention_bias": True},
}
