"""Ministral 3: Mistral with YaRN, and queries that grow with their position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores, attend, projections, separate
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, linear, lm_head
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.temperature import position_temperature
from ohmygpu.core.errors import CorruptFile

from . import llama, mistral
from .llama import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }
)
"""What a key that the config lacks means."""

_ROPE_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
)


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """Mistral's config, and how queries grow."""

    beta: float
    original_tokens: int

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        rope = filled.get("rope_parameters") or filled.get("rope_scaling") or _ROPE_DEFAULTS
        if not isinstance(rope, Mapping):
            raise CorruptFile(
                f"the model's config has rope_parameters = {rope!r}; an object is needed"
            )
        return Config(
            base=mistral.Config.read(filled | {"rope_parameters": dict(rope)}),
            beta=fields.number(rope, "llama_4_scaling_beta"),
            original_tokens=fields.integer(rope, "original_max_position_embeddings"),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return llama.weights(config.base)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    base = config.base
    turn = rotary(e, base.rope)
    growth = position_temperature(e, "/model/growth", config.beta, config.original_tokens)

    def attend_grown(layer: int, x: str) -> str:
        path = llama.attention_path(layer)
        qkv, o = llama.projections(base, layer)
        q, k, v = separate(e, path, projections(e, path, x, qkv))
        q = e.graph.node(f"{path}/growth/Mul", [q, growth])
        scores = Scores(scale=e.decoder.head_dim**-0.5, window=base.windows[layer])
        return linear(e, f"{path}/o_proj", attend(e, path, [q, k, v], layer, turn, scores), [o])

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(base, e, layer, x)

    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend_grown, feed)
    lm_head(e, hidden, llama.head(base.tie_word_embeddings))
