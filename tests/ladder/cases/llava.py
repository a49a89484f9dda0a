"""Tiny LLaVAs and models like it: text models of several families."""

from __future__ import annotations

from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
BASE: dict[str, Any] = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": _TEXT,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "image_token_index": 2,
}

_SIGLIP: dict[str, Any] = {**BASE["vision_config"], "model_type": "siglip_vision_model"}
_INTERNVL: dict[str, Any] = {
    **BASE["vision_config"],
    "model_type": "internvl_vision",
    "image_size": [28, 28],
    "patch_size": [14, 14],
}

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"text_config": _TEXT | {"model_type": "mistral", "sliding_window": 8}},
    "next": {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
    },
    "qwen2": {"text_config": _TEXT | {"model_type": "qwen2", "tie_word_embeddings": True}},
    "next_video": {
        "model_type": "llava_next_video",
        "architectures": ["LlavaNextVideoForConditionalGeneration"],
    },
    "onevision": {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _SIGLIP,
    },
    "internvl": {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "text_config": _TEXT | {"model_type": "qwen2"},
        "vision_config": _INTERNVL,
        "image_token_id": 2,
    },
    "vip": {
        "model_type": "vipllava",
        "architectures": ["VipLlavaForConditionalGeneration"],
    },
}
