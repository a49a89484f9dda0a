"""Arcee (AFM): Llama with a feed-forward block without a gate, and squared ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.feed_forward import mlp
from ohmygpu.convert.layers import embedding, lm_head
from ohmygpu.convert.residual import pre_norm_layers

from . import llama
from .llama import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""


class Config(llama.Config):
    """Llama's, read as Arcee's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        return llama.Config.read({**DEFAULTS, **config})


def weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    found = llama.weights(config)
    return {name: shape for name, shape in found.items() if ".gate_proj." not in name}


def build(config: llama.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        return feed_forward(config, e, layer, x)

    attend = llama.attention_block(config, e)
    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))


def feed_forward(config: llama.Config, e: Emitter, layer: int, x: str) -> str:
    """The feed-forward block of a layer, without a gate."""
    prefix, path = f"model.layers.{layer}.mlp", f"/model/layers.{layer}/mlp"
    up, down = (llama.part(prefix, f"{name}_proj", config.mlp_bias) for name in ("up", "down"))
    return mlp(e, path, x, up, down, config.activation)
