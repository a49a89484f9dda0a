"""Tiny Gemma 3s with images: the text model, its config with and without keys that are defaults."""

from __future__ import annotations

from typing import Any

NORM_MEAN = 0.0  # files leave out the 1

_TEXT: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"],
}
BASE: dict[str, Any] = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": _TEXT,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 63,
}

CASES: dict[str, dict[str, Any]] = {
    "all_keys": {},
    "defaults": {  # as published: only what differs from the defaults of the text model's class
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 64,
            "intermediate_size": 96,
            "max_position_embeddings": 128,
            "num_hidden_layers": 2,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 8,
            "vocab_size": 64,
        }
    },
}
