"""Tiny OLMo 3s: windows by default and by name, one RoPE scaled."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "olmo3",
    "architectures": ["Olmo3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 500000.0,
    "sliding_window": 8,
}

CASES: dict[str, dict[str, Any]] = {
    "default_windows": {"num_hidden_layers": 4},
    "scaled": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}
