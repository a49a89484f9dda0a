"""GLM-4 (9B, 2024) and GLM-Edge: Llama with biases on queries, keys and values, RoPE over
neighbours of half a head, and gate and up in one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert.source import Source
from ohmygpu.convert.views import ViewedSource, gate_and_up_apart, neighbours_apart

from . import llama
from .llama import build, ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""


class Config(llama.Config):
    """Llama's, read as GLM's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        base = llama.Config.read({**DEFAULTS, **config, "mlp_bias": False})
        return replace(base, output_bias=False)


def weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    found = llama.weights(config)
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}.mlp"
        del found[f"{prefix}.gate_proj.weight"], found[f"{prefix}.up_proj.weight"]
        found[f"{prefix}.gate_up_proj.weight"] = (2 * d.feed_forward_length, d.hidden_size)
    return found


def view(config: llama.Config, source: Source) -> Source:
    """Heads as RoPE over halves reads them, gate and up apart."""
    return apart(config, source, weights(config))


def apart(config: llama.Config, source: Source, names: Mapping[str, tuple[int, ...]]) -> Source:
    """The tensors `names`, with heads as RoPE over halves reads them, and gate and up apart."""
    views = neighbours_apart(names, config.decoder, config.rope.rotary_dim)
    return ViewedSource(source, gate_and_up_apart(views, config.decoder))
