"""Tiny Phi-3s: windows, longrope by its old names and today's, heads that turn in part."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 48,
    "original_max_position_embeddings": 48,
    "rope_theta": 1000.0,
    "sliding_window": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

_SHORT = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]
_LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0]

CASES: dict[str, dict[str, Any]] = {
    "phi_4": {"rope_theta": 250000.0},
    "mini_4k": {"sliding_window": 9, "num_key_value_heads": None},
    "within_reach": {  # a length that the short factors are for, and the oldest name
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "su",
            "short_factor": _SHORT,
            "long_factor": _LONG,
            "original_max_position_embeddings": 32,
        },
    },
    "long": {
        "original_max_position_embeddings": 12,
        "sliding_window": 262144,
        "rope_scaling": {"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
    },
    "mini_4": {
        "hidden_size": 128,
        "original_max_position_embeddings": 12,
        "partial_rotary_factor": 0.75,  # 24 of 32
        "tie_word_embeddings": True,
        "rope_scaling": {
            "type": "yarn",
            "short_factor": [1.0] * 12,
            "long_factor": [*_LONG, 9.5, 10.0, 11.0, 12.0],
        },
    },
}
