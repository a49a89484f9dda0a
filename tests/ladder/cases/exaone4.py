"""Tiny EXAONE 4s: layers with a window or without positions, and neither."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "exaone4",
    "architectures": ["Exaone4ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "sliding_window": 8,
}

CASES: dict[str, dict[str, Any]] = {
    "hybrid": {"num_hidden_layers": 3, "sliding_window_pattern": 3},
    "full": {
        "sliding_window": None,
        "layer_types": ["full_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}
