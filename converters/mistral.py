"""Mistral 7B and later: Llama whose layers may all see a window of the latest positions only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert.windows import FULL, SLIDING, read_windows

from . import llama
from .llama import build, ignored, view, weights

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    }
)
"""What a key that the config lacks means."""


class Config(llama.Config):
    """Llama's, read as Mistral's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "attention_bias": False, "mlp_bias": False}
        filled["layer_types"] = None  # one window for all layers, whatever is written there
        base = llama.Config.read(filled)
        usual = FULL if filled["sliding_window"] is None else SLIDING
        return replace(base, windows=read_windows(filled, [usual] * base.decoder.layers))
