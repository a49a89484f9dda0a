"""Phi-3, Phi-3.5 and Phi-4: Llama whose files stack q, k and v, and gate and up.

Newer ones turn a part of each head, and reach past the length they were trained on by longrope.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores, attention
from ohmygpu.convert.decoder import Decoder, Emitter
from ohmygpu.convert.feed_forward import Activation, gated_mlp, read_activation
from ohmygpu.convert.layers import Linear, embedding, lm_head
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.rope import Rope
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import View, ViewedSource
from ohmygpu.convert.windows import read_window

from . import llama

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config:
    """What a Phi-3's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    rope: Rope
    activation: Activation
    tie_word_embeddings: bool
    window: int | None  # positions that attention sees; None = all

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = _with_longrope({**DEFAULTS, **config})
        decoder, rope = llama.read_decoder(filled)
        return Config(
            decoder=decoder,
            rope=rope,
            activation=read_activation(filled, "hidden_act", "silu"),
            tie_word_embeddings=fields.flag(filled, "tie_word_embeddings", False),
            window=read_window(filled, decoder.context_tokens),
        )


def _with_longrope(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the names early Phi-3s had for longrope replaced: "su", and even "yarn"."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if isinstance(found, Mapping):
            kind = found.get("rope_type") or found.get("type")
            if kind in ("su", "yarn"):
                return config | {key: {**found, "rope_type": "longrope"}}
    return config


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    found: dict[str, tuple[int, ...]] = {
        llama.EMBEDDING: (d.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (d.vocab_size, hidden)
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.qkv_proj.weight": (queries + 2 * keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_up_proj.weight": (2 * feed_forward, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, feed_forward),
        }
    return found


def ignored(config: Config, name: str) -> bool:
    """Tensors some files carry that say nothing new: RoPE buffers, a copy of a tied embedding."""
    tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_copy or name.endswith("rotary_emb.inv_freq")


def view(config: Config, source: Source) -> Source:
    """The files with gate and up apart. Queries, keys and values stay in one matrix."""
    size = config.decoder.feed_forward_length
    views = {name: View(name) for name in weights(config)}
    for layer in range(config.decoder.layers):
        prefix = f"model.layers.{layer}.mlp"
        stacked = f"{prefix}.gate_up_proj.weight"
        del views[stacked]
        views[f"{prefix}.gate_proj.weight"] = View(stacked, range(size))
        views[f"{prefix}.up_proj.weight"] = View(stacked, range(size, 2 * size))
    return ViewedSource(source, views)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.rope)
    scores = Scores(scale=config.decoder.head_dim**-0.5, window=config.window)

    def attend(layer: int, x: str) -> str:
        path, prefix = llama.attention_path(layer), f"model.layers.{layer}.self_attn"
        qkv = Linear(f"{prefix}.qkv_proj.weight")
        return attention(e, path, x, layer, turn, [qkv], Linear(f"{prefix}.o_proj.weight"), scores)

    def feed(layer: int, x: str) -> str:
        prefix = f"model.layers.{layer}.mlp"
        gate, up, down = (Linear(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
        return gated_mlp(e, f"/model/layers.{layer}/mlp", x, gate, up, down, config.activation)

    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))
