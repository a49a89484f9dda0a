"""Tiny Gemma 2s: windows on every other layer, on those named, caps and none."""

from __future__ import annotations

from typing import Any

NORM_MEAN = 0.0  # files leave out the 1

BASE: dict[str, Any] = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
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
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "final_logit_softcapping": 3.0,
    "attn_logit_softcapping": 2.0,
    "tie_word_embeddings": True,
}

CASES: dict[str, dict[str, Any]] = {
    "capped": {"num_hidden_layers": 3},
    "no_caps": {
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
}
