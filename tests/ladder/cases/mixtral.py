"""Tiny Mixtrals: windowed and not, tied, more experts per token."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "two_of_four": {},
    "window": {"sliding_window": 8},
    "three_of_six_tied": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
    "odd_inner": {"intermediate_size": 72},
}

SCALES = {"gate.weight": 3.0}
"""Clear choices: an expert chosen otherwise for a rounding error is not what q8 is checked for."""
