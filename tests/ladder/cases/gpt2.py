"""Tiny GPT-2s: odd heads, scores scaled in every way, an own head, today's names of the keys."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}

CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "own_head": {"tie_word_embeddings": False, "n_inner": 96, "activation_function": "gelu"},
    "layer_scales": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "unscaled": {"scale_attn_weights": False, "n_embd": 40, "n_head": 2},
}
