"""Tiny StarCoder2s: with a window and without, tied and not, with biases and without."""

from __future__ import annotations

from typing import Any

BASE: dict[str, Any] = {
    "model_type": "starcoder2",
    "architectures": ["Starcoder2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "norm_epsilon": 1e-5,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 64,
    "rope_theta": 1000.0,
    "sliding_window": 9,
    "use_bias": True,
}

CASES: dict[str, dict[str, Any]] = {
    "3b": {},
    "own_head": {"tie_word_embeddings": False, "sliding_window": None, "use_bias": False},
}
