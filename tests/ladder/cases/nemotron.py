"""Tiny Nemotrons: half of each head turns, norms store w - 1; wide heads, biases."""

from __future__ import annotations

from typing import Any

NORM_MEAN = 0.0

BASE: dict[str, Any] = {
    "model_type": "nemotron",
    "architectures": ["NemotronForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "relu2",
    "max_position_embeddings": 128,
    "norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "grouped": {},  # 8 of 16 elements of a head turn
    "wide_heads": {"head_dim": 32},  # Minitron 8B: 4 heads of 32 from 64 hidden units
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}
