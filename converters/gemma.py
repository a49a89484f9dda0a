"""Gemma (the first, and CodeGemma): Llama with scaled embeddings, norms that store w - 1, GELU."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, lm_head, scaled
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import View, ViewedSource
from ohmygpu.core.errors import UnsupportedModel

from . import llama
from .llama import ignored, weights

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
)
"""What a key that the config lacks means."""


class Config(llama.Config):
    """Llama's, read as Gemma's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "mlp_bias": False}
        if filled["hidden_act"] == "gelu":  # what the first files say, and do not mean
            filled["hidden_act"] = "gelu_pytorch_tanh"
        refuse_both_ways(filled)
        return llama.Config.read(filled)


def refuse_both_ways(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for a Gemma whose tokens see those behind them."""
    if fields.flag(config, "use_bidirectional_attention", False):
        raise UnsupportedModel(
            f"a {config.get('model_type')} with use_bidirectional_attention does not generate "
            "text; only causal language models are built from it"
        )


def view(config: llama.Config, source: Source) -> Source:
    """Norms with the 1 added that their files leave out."""
    return with_whole_norms(source, weights(config))


def with_whole_norms(source: Source, names: Mapping[str, tuple[int, ...]]) -> Source:
    """The tensors `names` of the source, 1 added to the weights of norms."""
    offsets = {name: float(name.endswith("norm.weight")) for name in names}
    return ViewedSource(source, {name: View(name, offset=offsets[name]) for name in names})


def scaled_embedding(e: Emitter) -> str:
    """The embedding times √hidden_size, rounded to what the graph computes with."""
    hidden = embedding(e, llama.EMBEDDING)
    return scaled(e, "/model/embed_tokens/scaled", hidden, e.decoder.hidden_size**0.5)


def build(config: llama.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(config, e, layer, x)

    attend = llama.attention_block(config, e)
    hidden = pre_norm_layers(e, scaled_embedding(e), attend, feed)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))
