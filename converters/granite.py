"""IBM Granite 3 and 4 (dense): Llama with four constants that scale what flows through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores, attention
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, lm_head, scaled
from ohmygpu.convert.residual import Block, pre_norm_layers
from ohmygpu.convert.rotary import rotary

from . import llama
from .llama import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
)
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """Llama's config and the constants."""

    embedding_multiplier: float
    attention_multiplier: float  # of the scores, in place of 1 / √head_dim
    residual_multiplier: float  # of what attention and feed-forward add
    logits_scaling: float  # divides the logits

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        return Config(
            base=llama.Config.read(filled),
            embedding_multiplier=fields.number(filled, "embedding_multiplier"),
            attention_multiplier=fields.number(filled, "attention_multiplier"),
            residual_multiplier=fields.number(filled, "residual_multiplier"),
            logits_scaling=fields.number(filled, "logits_scaling"),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return llama.weights(config.base)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(config.base, e, layer, x)

    emit(config, e, feed)


def emit(config: Config, e: Emitter, feed: Block) -> None:
    """The graph, with these feed-forward blocks."""
    base = config.base
    turn = rotary(e, base.rope)

    def attend(layer: int, x: str) -> str:
        path = llama.attention_path(layer)
        scores = Scores(scale=config.attention_multiplier)
        y = attention(e, path, x, layer, turn, *llama.projections(base, layer), scores)
        return scaled(e, f"{path}/residual", y, config.residual_multiplier)

    def feed_scaled(layer: int, x: str) -> str:
        path = f"/model/layers.{layer}/mlp/residual"
        return scaled(e, path, feed(layer, x), config.residual_multiplier)

    hidden = embedding(e, llama.EMBEDDING)
    hidden = scaled(e, "/model/embed_tokens/scaled", hidden, config.embedding_multiplier)
    hidden = pre_norm_layers(e, hidden, attend, feed_scaled)
    hidden = scaled(e, "/lm_head/scaled", hidden, 1 / config.logits_scaling)
    lm_head(e, hidden, llama.head(base.tie_word_embeddings))
