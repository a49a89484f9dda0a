"""Tiny Mistral 3s with images: the text model is a mistral, with a head of its own and tied."""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 1000000000.0,
    "sliding_window": None,
}
BASE: dict[str, Any] = {
    "model_type": "mistral3",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "text_config": _TEXT,
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 56,
        "patch_size": 14,
    },
    "image_token_index": 2,
}

CASES: dict[str, dict[str, Any]] = {
    "own_head": {"tie_word_embeddings": False},
    "ministral3": {
        "text_config": {key: _TEXT[key] for key in _TEXT if key != "rope_theta"}
        | {"model_type": "ministral3"},
        "tie_word_embeddings": False,
    },
    "tied_window": {"text_config": _TEXT | {"sliding_window": 8}},
}
