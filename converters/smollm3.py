"""SmolLM3: Llama with layers, every fourth as a rule, whose attention knows no positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, lm_head
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.windows import FULL, SLIDING, read_windows
from ohmygpu.core.errors import CorruptFile

from . import llama
from .llama import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
    }
)
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """Llama's config, and which layers turn queries and keys."""

    turns: tuple[bool, ...]  # for each layer

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        base = llama.Config.read(filled)
        turns = _read_turns(filled, base.decoder.layers)
        if not fields.flag(filled, "use_sliding_window", False):
            return Config(base, turns)
        slides = filled.get("sliding_window") is not None
        usual = [SLIDING if slides and not turn else FULL for turn in turns]
        return Config(replace(base, windows=read_windows(filled, usual)), turns)


def _read_turns(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """`no_rope_layers` (1 = with RoPE), else all layers but each `no_rope_layer_interval`-th."""
    found = config.get("no_rope_layers")
    if found is None:
        interval = fields.integer(config, "no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if not isinstance(found, (list, tuple)) or len(found) < layers or set(found) - {0, 1}:
        raise CorruptFile(
            f"the model's config has no_rope_layers that are not 0 or 1 {layers} times"
        )
    return tuple(bool(entry) for entry in found[:layers])


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return llama.weights(config.base)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    base = config.base
    turn = rotary(e, base.rope)

    def attend(layer: int, x: str) -> str:
        return llama.layer_attention(base, e, layer, x, turn if config.turns[layer] else None)

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(base, e, layer, x)

    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(base.tie_word_embeddings))
