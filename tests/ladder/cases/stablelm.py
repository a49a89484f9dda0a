"""Tiny StableLMs: 3B's narrow turn, 2-1.6B's biases, 2-12B's one norm and norms of single heads."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "stablelm",
    "architectures": ["StableLmForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 160,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "layer_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "partial_rotary_factor": 0.25,
    "rope_theta": 1000,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "3b": {},  # 20 of 80 elements turn
    "2_1.6b": {"use_qkv_bias": True, "hidden_size": 128, "tie_word_embeddings": True},  # 16 of 64
    "2_12b": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
}
