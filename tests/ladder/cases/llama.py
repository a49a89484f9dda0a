"""Tiny Llamas: every kind of heads, bias and RoPE scaling that real ones use."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head_tied": {"num_key_value_heads": None, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "silu"},
    "wide_heads": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"head_dim": 32},
    "odd_heads": {"hidden_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "dynamic": {
        "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
            "original_max_position_embeddings": 24,
        }
    },
}
