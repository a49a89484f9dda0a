"""Tiny Gemma 3s: old and new spellings of two RoPEs, of windows, a scaled RoPE."""

from __future__ import annotations

from typing import Any

NORM_MEAN = 0.0  # files leave out the 1

BASE: dict[str, Any] = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "tie_word_embeddings": True,
}

CASES: dict[str, dict[str, Any]] = {
    "old_spelling": {
        "num_hidden_layers": 3,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 5000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "new_spelling": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2000.0},
        },
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
        "tie_word_embeddings": False,
    },
}
