"""Tiny Falcons: one group of queries, several, as many as heads; every number of norms."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "falcon",
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 1000.0,
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "parallel_attn": True,
    "new_decoder_architecture": False,
}

_GROUPS = {"new_decoder_architecture": True, "num_kv_heads": 2}

CASES: dict[str, dict[str, Any]] = {
    "7b": {},
    "40b": _GROUPS,
    "11b": _GROUPS
    | {"num_ln_in_parallel_attn": 1, "ffn_hidden_size": 96, "tie_word_embeddings": False},
    "in_sequence": {"multi_query": False, "parallel_attn": False, "bias": True},
}
