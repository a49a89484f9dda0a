"""Tiny Ministral 3s: positions past the original context, and within it."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "ministral3",
    "architectures": ["Ministral3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}

CASES: dict[str, dict[str, Any]] = {
    "past": {},
    "within": {"rope_parameters": None, "tie_word_embeddings": True},
}
