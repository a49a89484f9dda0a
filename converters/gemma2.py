"""Gemma 2: Gemma with norms on both sides of each block, caps on scores and logits, and windows on
every other layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores, attention
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import lm_head, softcapped_lm_head
from ohmygpu.convert.residual import Block, sandwich_layers
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.source import Source
from ohmygpu.convert.windows import full_every, read_windows

from . import gemma, llama
from .llama import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    }
)
"""What a key that the config lacks means."""


_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """Llama's config, and how scores and logits are made."""

    score_scale: float
    score_cap: float  # 0 = none
    logit_cap: float  # 0 = none

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "mlp_bias": False}
        base = read_base(filled)
        usual = full_every(2, base.decoder.layers)
        return Config(
            base=replace(base, windows=read_windows(filled, usual)),
            score_scale=fields.number(filled, "query_pre_attn_scalar") ** -0.5,
            score_cap=read_cap(filled, "attn_logit_softcapping"),
            logit_cap=read_cap(filled, "final_logit_softcapping"),
        )


def read_base(config: Mapping[str, Any]) -> llama.Config:
    """Llama's part of a config with no key missing. Raises CorruptFile or UnsupportedModel."""
    gemma.refuse_both_ways(config)
    return llama.Config.read({**config, "hidden_act": config["hidden_activation"]})


def read_cap(config: Mapping[str, Any], key: str) -> float:
    """A cap, 0 where the config has null. Raises CorruptFile when it is not a positive number."""
    return 0.0 if config[key] is None else fields.number(config, key)


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    return llama.weights(config.base) | {
        f"model.layers.{layer}.{name}_feedforward_layernorm.weight": (d.hidden_size,)
        for layer in range(d.layers)
        for name in ("pre", "post")
    }


def view(config: Config, source: Source) -> Source:
    """Norms with the 1 added that their files leave out."""
    return gemma.with_whole_norms(source, weights(config))


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    base = config.base
    turn = rotary(e, base.rope)

    def attend(layer: int, x: str) -> str:
        scores = Scores(
            scale=config.score_scale, softcap=config.score_cap, window=base.windows[layer]
        )
        qkv, o = llama.projections(base, layer)
        return attention(e, llama.attention_path(layer), x, layer, turn, qkv, o, scores)

    capped_head(config, e, layers(base, e, attend))


def layers(config: llama.Config, e: Emitter, attend: Block) -> str:
    """The last norm of the scaled embedding after all layers."""

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(config, e, layer, x)

    return sandwich_layers(e, gemma.scaled_embedding(e), attend, feed, *_NORMS)


def capped_head(config: Config, e: Emitter, hidden: str) -> None:
    """The LM head, with its cap where there is one."""
    head = llama.head(config.base.tie_word_embeddings)
    if config.logit_cap:
        softcapped_lm_head(e, hidden, head, config.logit_cap)
    else:
        lm_head(e, hidden, head)
