"""Tiny Command R7Bs: windows by pattern and by name."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "cohere2",
    "architectures": ["Cohere2ForCausalLM"],
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
    "sliding_window": 8,
}

CASES: dict[str, dict[str, Any]] = {
    "pattern": {"num_hidden_layers": 3, "sliding_window_pattern": 2},
    "named": {"layer_types": ["full_attention", "sliding_attention"]},
}
