"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and windows on late layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.windows import FULL, SLIDING, read_windows

from . import llama
from .llama import build, ignored, view, weights

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    }
)
"""What a key that the config lacks means."""


class Config(llama.Config):
    """Llama's, read as Qwen2's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "attention_bias": True, "mlp_bias": False}
        base = llama.Config.read(filled)
        return replace(base, output_bias=False, windows=late_windows(filled, base.decoder.layers))


def late_windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Windows of the layers from `max_window_layers` on, where the config switches them on."""
    if not fields.flag(config, "use_sliding_window", False):
        return (None,) * layers
    first = fields.count(config, "max_window_layers")
    usual = [SLIDING if layer >= first else FULL for layer in range(layers)]
    return read_windows(config, usual)
