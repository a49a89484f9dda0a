"""GPT-NeoX and Pythia: queries, keys and values of each head stored together, side by side blocks.

RoPE turns a part of each head; attention and feed-forward have a norm each and both read the same
hidden states (`use_parallel_residual`), or follow each other.
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
    sequential_layers,
    twice_normed_parallel_layers,
)
from ohmygpu.convert.rope import Rope
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import View, ViewedSource

from .llama import part, read_decoder

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "attention_bias": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""

_EMBEDDING = "gpt_neox.embed_in.weight"
_NORMS = NormNames(
    "gpt_neox/layers", "input_layernorm", "post_attention_layernorm", "gpt_neox/final_layer_norm"
)


@dataclass(frozen=True, slots=True)
class Config:
    """What a GPT-NeoX's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    rope: Rope
    activation: Activation
    attention_bias: bool
    parallel: bool
    tie_word_embeddings: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        filled |= {
            "rope_theta": filled["rotary_emb_base"],
            "partial_rotary_factor": filled["rotary_pct"],
            "num_key_value_heads": None,
            "head_dim": None,
        }
        decoder, rope = read_decoder(filled)
        return Config(
            decoder=replace(decoder, norm_epsilon=fields.number(filled, "layer_norm_eps")),
            rope=rope,
            activation=read_activation(filled, "hidden_act", "gelu"),
            attention_bias=fields.flag(filled, "attention_bias", True),
            parallel=fields.flag(filled, "use_parallel_residual", True),
            tie_word_embeddings=fields.flag(filled, "tie_word_embeddings", False),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    found: dict[str, tuple[int, ...]] = {
        _EMBEDDING: (d.vocab_size, hidden),
        "gpt_neox.final_layer_norm.weight": (hidden,),
        "gpt_neox.final_layer_norm.bias": (hidden,),
    }
    if not config.tie_word_embeddings:
        found["embed_out.weight"] = (d.vocab_size, hidden)
    parts: tuple[tuple[str, tuple[int, ...], bool], ...] = (
        ("input_layernorm", (hidden,), True),
        ("attention.query_key_value", (3 * d.heads * d.head_dim, hidden), config.attention_bias),
        ("attention.dense", (hidden, d.heads * d.head_dim), config.attention_bias),
        ("post_attention_layernorm", (hidden,), True),
        ("mlp.dense_h_to_4h", (feed_forward, hidden), True),
        ("mlp.dense_4h_to_h", (hidden, feed_forward), True),
    )
    for layer in range(d.layers):
        for name, shape, bias in parts:
            found[f"gpt_neox.layers.{layer}.{name}.weight"] = shape
            if bias:
                found[f"gpt_neox.layers.{layer}.{name}.bias"] = shape[:1]
    return found


def ignored(config: Config, name: str) -> bool:
    """Tensors some files carry that say nothing new: causal masks, RoPE buffers, a tied copy."""
    tied_copy = config.tie_word_embeddings and name == "embed_out.weight"
    buffers = ("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq")
    return tied_copy or name.endswith(buffers)


def view(config: Config, source: Source) -> Source:
    """The files with all queries first, then all keys, then all values."""
    d = config.decoder
    rows = np.arange(3 * d.heads * d.head_dim, dtype=np.int64)
    rows = rows.reshape(d.heads, 3, d.head_dim).swapaxes(0, 1).reshape(-1)
    stacked = (".query_key_value.weight", ".query_key_value.bias")
    return ViewedSource(
        source,
        {name: View(name, rows if name.endswith(stacked) else None) for name in weights(config)},
    )


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.rope)

    def attend(layer: int, x: str) -> str:
        path, prefix = f"/gpt_neox/layers.{layer}/attn", f"gpt_neox.layers.{layer}.attention"
        qkv = part(prefix, "query_key_value", config.attention_bias)
        dense = part(prefix, "dense", config.attention_bias)
        return layers.attention(e, path, x, layer, turn, [qkv], dense)

    def feed(layer: int, x: str) -> str:
        prefix = f"gpt_neox.layers.{layer}.mlp"
        up, down = part(prefix, "dense_h_to_4h", True), part(prefix, "dense_4h_to_h", True)
        return mlp(e, f"/gpt_neox/layers.{layer}/mlp", x, up, down, config.activation)

    join = twice_normed_parallel_layers if config.parallel else sequential_layers
    hidden = embedding(e, _EMBEDDING, path="/gpt_neox/embed_in")
    hidden = join(e, hidden, _NORMS, attend, feed)
    lm_head(e, hidden, Linear(_EMBEDDING if config.tie_word_embeddings else "embed_out.weight"))
