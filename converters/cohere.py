"""Command R and Aya 23: layer norms without biases, attention and feed-forward side by side, RoPE
over neighbours, scaled logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import add, embedding, lm_head, scaled
from ohmygpu.convert.norms import layer_norm, skip_layer_norm
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import ViewedSource, neighbours_apart
from ohmygpu.core.errors import UnsupportedModel

from . import llama
from .llama import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "logit_scale": 0.0625,
        "attention_bias": False,
        "use_qk_norm": False,
        "tie_word_embeddings": True,
    }
)
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """Llama's config, which layers turn queries and keys, and the scale of logits."""

    turns: tuple[bool, ...]  # for each layer
    logit_scale: float

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        if fields.flag(filled, "use_qk_norm", False):
            raise UnsupportedModel(
                "a cohere with use_qk_norm (Command R+) has no converter; Command R and the later "
                "models of the family have one"
            )
        base = read_base(filled)
        turns = (True,) * base.decoder.layers
        return Config(base, turns, fields.number(filled, "logit_scale"))


def read_base(config: Mapping[str, Any]) -> llama.Config:
    """Llama's part of a config with no key missing. Raises CorruptFile or UnsupportedModel."""
    epsilon = fields.number(config, "layer_norm_eps")
    return llama.Config.read({**config, "rms_norm_eps": epsilon, "mlp_bias": False})


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    found = llama.weights(config.base)
    return {name: shape for name, shape in found.items() if "post_attention" not in name}


def view(config: Config, source: Source) -> Source:
    """Heads of queries and keys as RoPE over halves reads them."""
    base = config.base
    return ViewedSource(
        source, neighbours_apart(weights(config), base.decoder, base.rope.rotary_dim)
    )


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.base.rope)
    hidden = embedding(e, llama.EMBEDDING)
    name = "model.layers.0.input_layernorm"
    normed = layer_norm(e, "/model/layers.0/input_layernorm", hidden, f"{name}.weight", None)
    for layer in range(e.decoder.layers):
        turns = turn if config.turns[layer] else None
        attended = llama.layer_attention(config.base, e, layer, normed, turns)
        fed = llama.feed_forward(config.base, e, layer, normed)
        both = add(e, f"/model/layers.{layer}", attended, fed)
        last = layer + 1 == e.decoder.layers
        path = "norm" if last else f"layers.{layer + 1}/input_layernorm"
        weight = f"model.{path.replace('/', '.')}.weight"
        normed, hidden = skip_layer_norm(e, f"/model/{path}", both, hidden, weight, None)
    normed = scaled(e, "/lm_head/scaled", normed, config.logit_scale)
    lm_head(e, normed, llama.head(config.base.tie_word_embeddings))
