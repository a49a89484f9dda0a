"""Tiny Phis: heads that turn in part and whole widths, norms over heads, a tied embedding."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "phi",
    "architectures": ["PhiForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 160,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 64,
    "partial_rotary_factor": 0.4,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "phi_2": {},  # 32 of 80 elements turn
    "head_norms": {"qk_layernorm": True},
    "tied": {"tie_word_embeddings": True, "hidden_size": 64} | {"num_key_value_heads": 1},
    "linear": {
        "rope_parameters": {
            "rope_type": "linear",
            "factor": 2.0,
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.25,  # 20 of 80
        }
    },
}
