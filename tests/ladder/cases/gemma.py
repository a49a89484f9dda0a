"""Tiny Gemmas: one key/value head, own head, the old name of GELU."""

from __future__ import annotations

from typing import Any

NORM_MEAN = 0.0  # files leave out the 1

BASE: dict[str, Any] = {
    "model_type": "gemma",
    "architectures": ["GemmaForCausalLM"],
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
    "hidden_act": "gelu_pytorch_tanh",
}

CASES: dict[str, dict[str, Any]] = {
    "multi_query": {"num_key_value_heads": 1},
    "old_gelu": {"hidden_act": "gelu", "tie_word_embeddings": False},
}
