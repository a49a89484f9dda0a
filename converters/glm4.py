"""GLM-4 0414: GLM-4 with norms on both sides of each block, as in Gemma 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, lm_head
from ohmygpu.convert.residual import sandwich_layers
from ohmygpu.convert.source import Source

from . import glm, llama
from .glm import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = glm.DEFAULTS
"""What a key that the config lacks means."""

Config = glm.Config

_POST_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")


def weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return glm.weights(config) | _post_norms(config)


def _post_norms(config: llama.Config) -> dict[str, tuple[int, ...]]:
    return {
        f"model.layers.{layer}.{name}.weight": (config.decoder.hidden_size,)
        for layer in range(config.decoder.layers)
        for name in _POST_NORMS
    }


def view(config: llama.Config, source: Source) -> Source:
    """Heads as RoPE over halves reads them, gate and up apart."""
    return glm.apart(config, source, weights(config))


def build(config: llama.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(config, e, layer, x)

    attend, hidden = llama.attention_block(config, e), embedding(e, llama.EMBEDDING)
    hidden = sandwich_layers(e, hidden, attend, feed, "post_attention_layernorm", *_POST_NORMS)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))
