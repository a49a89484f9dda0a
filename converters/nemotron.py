"""Nemotron (Minitron, Nemotron-4, Nemotron-Mini): Llama with layer norms that store w - 1, RoPE on
half of each head, and a feed-forward block without a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, lm_head
from ohmygpu.convert.residual import NormNames, sequential_layers
from ohmygpu.convert.source import Source

from . import arcee, llama
from .gemma import with_whole_norms
from .llama import ignored
from .stablelm import with_norm_biases

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""

_NORMS = NormNames("model/layers", "input_layernorm", "post_attention_layernorm", "model/norm")


class Config(llama.Config):
    """Llama's, read as Nemotron's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        return llama.Config.read({**filled, "rms_norm_eps": fields.number(filled, "norm_eps")})


def weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return with_norm_biases(arcee.weights(config))


def view(config: llama.Config, source: Source) -> Source:
    """Norms with the 1 added that their files leave out."""
    return with_whole_norms(source, weights(config))


def build(config: llama.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        return arcee.feed_forward(config, e, layer, x)

    attend = llama.attention_block(config, e)
    hidden = sequential_layers(e, embedding(e, llama.EMBEDDING), _NORMS, attend, feed)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))
