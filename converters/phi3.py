"""Phi-3, Phi-3.5 and Phi-4: Llama whose files stack q, k and v, and gate and up.

Newer ones turn a part of each head, and reach past the length they were trained on by longrope.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert.attention import Scores, attention
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import Linear, embedding, lm_head
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import View, ViewedSource, gate_and_up_apart
from ohmygpu.convert.windows import read_window

from . import llama
from .llama import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

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


class Config(llama.Config):
    """Llama's, read as Phi-3's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "attention_bias": False, "mlp_bias": False}
        base = llama.Config.read(_with_longrope(filled))
        window = read_window(filled, base.decoder.context_tokens)
        return replace(base, windows=(window,) * base.decoder.layers)


def _with_longrope(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the names early Phi-3s had for longrope replaced: "su", and even "yarn"."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if isinstance(found, Mapping):
            kind = found.get("rope_type") or found.get("type")
            if kind in ("su", "yarn"):
                return config | {key: {**found, "rope_type": "longrope"}}
    return config


def weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    values = (d.heads + 2 * d.kv_heads) * d.head_dim
    apart = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    found = {
        name: s for name, s in llama.weights(config).items() if name.split(".")[-2] not in apart
    }
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.self_attn.qkv_proj.weight"] = (values, d.hidden_size)
        found[f"{prefix}.mlp.gate_up_proj.weight"] = (2 * d.feed_forward_length, d.hidden_size)
    return found


def view(config: llama.Config, source: Source) -> Source:
    """The files with gate and up apart. Queries, keys and values stay in one matrix."""
    views = {name: View(name) for name in weights(config)}
    return ViewedSource(source, gate_and_up_apart(views, config.decoder))


def build(config: llama.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.rope)

    def attend(layer: int, x: str) -> str:
        path, prefix = llama.attention_path(layer), f"model.layers.{layer}.self_attn"
        qkv, o = (Linear(f"{prefix}.{name}.weight") for name in ("qkv_proj", "o_proj"))
        scores = Scores(scale=e.decoder.head_dim**-0.5, window=config.windows[layer])
        return attention(e, path, x, layer, turn, [qkv], o, scores)

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(config, e, layer, x)

    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))
