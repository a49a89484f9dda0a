"""Tiny Seed-OSSes: biases on queries, keys and values, and on the others."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "seed_oss",
    "architectures": ["SeedOssForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "head_dim": 32,
}

CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "biases": {"attention_out_bias": True, "mlp_bias": True},
}
