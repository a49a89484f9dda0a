"""EXAONE 4: norms behind both blocks as in OLMo 2, norms over heads as in Qwen3; where some layers
see a window, the others know no positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, lm_head
from ohmygpu.convert.residual import post_norm_layers
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.windows import FULL, full_every, read_windows

from . import llama, olmo2, qwen3
from .llama import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
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
        filled = {**DEFAULTS, **config, "attention_bias": False, "mlp_bias": False}
        base = llama.Config.read(filled)
        slides = filled["sliding_window"] is not None
        base = replace(base, windows=read_windows(filled, _usual_types(filled, slides, base)))
        return Config(base, tuple(window is not None or not slides for window in base.windows))


def _usual_types(config: Mapping[str, Any], slides: bool, base: llama.Config) -> list[str]:
    """Types of the layers of a config that does not name them: each fourth one sees all."""
    if not slides or config.get("layer_types") is not None:
        return [FULL] * base.decoder.layers
    period = fields.integer(config, "sliding_window_pattern")
    return full_every(period, base.decoder.layers)


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return olmo2.post_norm_weights(config.base) | qwen3.head_norms(config.base)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    base = config.base
    turn = rotary(e, base.rope)

    def attend(layer: int, x: str) -> str:
        turns = turn if config.turns[layer] else None
        scores = Scores(scale=e.decoder.head_dim**-0.5, window=base.windows[layer])
        return qwen3.normed_attention(e, layer, x, turns, *llama.projections(base, layer), scores)

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(base, e, layer, x)

    hidden = post_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(base.tie_word_embeddings))
