"""GGUF models of architecture `qwen3`: queries and keys are normalised, nothing has a bias."""

from __future__ import annotations

from typing import Any

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config
from .gguf_names import ATTENTION, GATED_MLP, NORMS, QK_NORMS, TOP, Translation, translation
from .gguf_rope import rope_config

BODY = {**TOP, **NORMS, **ATTENTION, **QK_NORMS}
"""All tensors but those of the feed-forward."""


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "qwen3")
    config = body_config(keys, "qwen3", "Qwen3ForCausalLM")
    return translation(keys, config, {**BODY, **GATED_MLP})


def body_config(keys: Keys, model_type: str, architecture: str) -> dict[str, Any]:
    """The config but for experts."""
    config = decoder_config(keys, model_type, architecture)
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "attention_bias": False,
        "use_sliding_window": False,
    }
    return config | rope_config(keys, config)
