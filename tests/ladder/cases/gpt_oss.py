"""Tiny gpt-osses with experts in floats: windows, YaRN, gates beyond the limit."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
    "sliding_window": 8,
    "attention_bias": True,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "alternate_windows": {"layer_types": ["sliding_attention", "full_attention"]},
    "clamped": {"swiglu_limit": 0.75, "num_hidden_layers": 3, "sliding_window": 128},
    "no_windows_tied": {
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": 128,
        "tie_word_embeddings": True,
    },
}

SCALES = {"router.weight": 3.0}
"""Clear choices: an expert chosen otherwise for a rounding error is not what q8 is checked for."""
