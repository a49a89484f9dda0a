"""Tiny GLM-4 0414s: RoPE over half a head, which attention can turn itself, and cannot."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "glm4",
    "architectures": ["Glm4ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "pad_token_id": None,
    "eos_token_id": 2,
    "head_dim": 32,
    "attention_bias": True,
}

CASES: dict[str, dict[str, Any]] = {
    "half": {},
    "small_heads": {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True},
}
