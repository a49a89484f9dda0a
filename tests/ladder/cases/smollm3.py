"""Tiny SmolLM3s: layers without RoPE by interval and by list, yarn, windows."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "pad_token_id": None,
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "no_rope_layer_interval": 2,
    "tie_word_embeddings": True,
}

CASES: dict[str, dict[str, Any]] = {
    "interval": {"num_hidden_layers": 3},
    "listed": {"no_rope_layers": [0, 1], "tie_word_embeddings": False, "attention_bias": True},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
        }
    },
    "window": {"use_sliding_window": True, "sliding_window": 8},
}
