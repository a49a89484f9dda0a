"""Falcon: layer norms, blocks side by side, queries that share keys and values within a group.

7B has one group, 40B and 180B several and a norm for each block, 11B several and one norm. The
oldest (falcon-rw) tell positions by ALiBi and are not built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from ohmygpu.convert import attention as layers
from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Decoder, Emitter
from ohmygpu.convert.feed_forward import Activation, mlp, read_activation
from ohmygpu.convert.layers import Linear, embedding, lm_head
from ohmygpu.convert.residual import (
    NormNames,
    parallel_layers,
    sequential_layers,
    twice_normed_parallel_layers,
)
from ohmygpu.convert.rope import Rope
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import View, ViewedSource
from ohmygpu.core.errors import UnsupportedModel

from .llama import ignored, part, read_decoder

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "activation": "gelu",
        "bias": False,
        "alibi": False,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "tie_word_embeddings": True,
    }
)
"""What a key that the config lacks means."""

_EMBEDDING = "transformer.word_embeddings.weight"
_LAST = "transformer/ln_f"
_SEQUENTIAL = NormNames("transformer/h", "input_layernorm", "post_attention_layernorm", _LAST)
_PARALLEL = NormNames("transformer/h", "input_layernorm", "", _LAST)
_TWICE_NORMED = NormNames("transformer/h", "ln_attn", "ln_mlp", _LAST)
_JOINS = {
    _SEQUENTIAL: sequential_layers,
    _PARALLEL: parallel_layers,
    _TWICE_NORMED: twice_normed_parallel_layers,
}


@dataclass(frozen=True, slots=True)
class Config:
    """What a Falcon's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    rope: Rope
    activation: Activation
    bias: bool
    norms: NormNames
    tie_word_embeddings: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        if fields.flag(filled, "alibi", False):
            raise UnsupportedModel("a falcon whose positions are told by ALiBi has no converter")
        several = fields.flag(filled, "new_decoder_architecture", False)
        one = fields.flag(filled, "multi_query", True) and not several
        filled |= {
            "head_dim": None,
            "num_key_value_heads": 1 if one else filled.get("num_kv_heads"),
            "intermediate_size": filled.get("ffn_hidden_size")
            or 4 * fields.integer(filled, "hidden_size"),
        }
        decoder, rope = read_decoder(filled)
        return Config(
            decoder=replace(decoder, norm_epsilon=fields.number(filled, "layer_norm_epsilon")),
            rope=rope,
            activation=read_activation(filled, "activation", "gelu"),
            bias=fields.flag(filled, "bias", False),
            norms=_norms(filled, several),
            tie_word_embeddings=fields.flag(filled, "tie_word_embeddings", True),
        )


def _norms(config: Mapping[str, Any], several_groups: bool) -> NormNames:
    if not fields.flag(config, "parallel_attn", True):
        return _SEQUENTIAL
    count = fields.integer(config, "num_ln_in_parallel_attn", 2)
    return _TWICE_NORMED if several_groups and count == 2 else _PARALLEL


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    found: dict[str, tuple[int, ...]] = {_EMBEDDING: (d.vocab_size, hidden)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (d.vocab_size, hidden)
    linears = {
        "self_attention.query_key_value": ((d.heads + 2 * d.kv_heads) * d.head_dim, hidden),
        "self_attention.dense": (hidden, d.heads * d.head_dim),
        "mlp.dense_h_to_4h": (feed_forward, hidden),
        "mlp.dense_4h_to_h": (hidden, feed_forward),
    }
    norms = ["transformer.ln_f"]
    for layer in range(d.layers):
        prefix = f"transformer.h.{layer}"
        norms += [f"{prefix}.{name}" for name in (config.norms.first, config.norms.second) if name]
        for name, shape in linears.items():
            found[f"{prefix}.{name}.weight"] = shape
            if config.bias:
                found[f"{prefix}.{name}.bias"] = shape[:1]
    for name in norms:
        found |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return found


def view(config: Config, source: Source) -> Source:
    """The files with all queries first, then all keys, then all values."""
    d = config.decoder
    rows = np.arange((d.heads + 2 * d.kv_heads) * d.head_dim, dtype=np.int64)
    groups = rows.reshape(d.kv_heads, -1, d.head_dim)  # queries of a group, its key, its value
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    order = np.concatenate([part.reshape(-1) for part in parts])
    stacked = (".query_key_value.weight", ".query_key_value.bias")
    return ViewedSource(
        source,
        {name: View(name, order if name.endswith(stacked) else None) for name in weights(config)},
    )


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.rope)

    def attend(layer: int, x: str) -> str:
        path, prefix = f"/transformer/h.{layer}/attn", f"transformer.h.{layer}.self_attention"
        qkv, dense = (part(prefix, name, config.bias) for name in ("query_key_value", "dense"))
        return layers.attention(e, path, x, layer, turn, [qkv], dense)

    def feed(layer: int, x: str) -> str:
        prefix = f"transformer.h.{layer}.mlp"
        up, down = (part(prefix, f"dense_{name}", config.bias) for name in ("h_to_4h", "4h_to_h"))
        return mlp(e, f"/transformer/h.{layer}/mlp", x, up, down, config.activation)

    hidden = embedding(e, _EMBEDDING, path="/transformer/word_embeddings")
    hidden = _JOINS[config.norms](e, hidden, config.norms, attend, feed)
    lm_head(e, hidden, Linear(_EMBEDDING if config.tie_word_embeddings else "lm_head.weight"))
