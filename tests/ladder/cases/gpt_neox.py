"""Tiny GPT-NeoXs: blocks side by side and one after the other, heads that turn by odd widths."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 160,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "max_position_embeddings": 64,
    "rotary_pct": 0.25,
    "rotary_emb_base": 1000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}

CASES: dict[str, dict[str, Any]] = {
    "pythia_2.8b": {},  # 20 of 80 elements turn
    "in_sequence": {"use_parallel_residual": False, "hidden_size": 64, "num_attention_heads": 1},
    "narrow": {"hidden_size": 80, "attention_bias": False},  # 10 of 40
    "all_turns_tied": {
        "hidden_size": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": 1.0,
        },
    },
}
