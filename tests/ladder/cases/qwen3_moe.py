"""Tiny Qwen3 MoEs: weights that sum to 1 and not, dense layers between, biases, a window."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "use_sliding_window": False,
}

CASES: dict[str, dict[str, Any]] = {
    "sums_to_one": {"num_experts": 6, "num_experts_per_tok": 2},
    "softmax_over_all": {"norm_topk_prob": False, "tie_word_embeddings": True},
    "dense_between": {
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "window_biases": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "attention_bias": True,
    },
}

SCALES = {"mlp.gate.weight": 3.0}
"""Clear choices: an expert chosen otherwise for a rounding error is not what q8 is checked for."""
