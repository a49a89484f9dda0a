"""ERNIE 4.5 (dense): Llama whose RoPE turns neighbours, and one switch for all biases."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import ViewedSource, neighbours_apart

from . import llama
from .llama import build, ignored, weights

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_bias": False,
        "tie_word_embeddings": True,
    }
)
"""What a key that the config lacks means."""


class Config(llama.Config):
    """Llama's, read as ERNIE's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        bias = fields.flag(filled, "use_bias", False)
        return llama.Config.read(filled | {"attention_bias": bias, "mlp_bias": bias})


def view(config: llama.Config, source: Source) -> Source:
    """Heads of queries and keys as RoPE over halves reads them."""
    names = weights(config)
    return ViewedSource(source, neighbours_apart(names, config.decoder, config.rope.rotary_dim))
