"""Qwen3: Llama with a norm over each head of queries and keys, and windows on late layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ohmygpu.convert.attention import Scores, attend, projections, separate
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import Linear, embedding, linear, lm_head
from ohmygpu.convert.norms import head_rms_norm
from ohmygpu.convert.residual import Block, pre_norm_layers
from ohmygpu.convert.rotary import Rotary, rotary

from . import llama, qwen2
from .llama import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}
"""What a key that the config lacks means."""


class Config(llama.Config):
    """Llama's, read as Qwen3's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "mlp_bias": False}
        base = llama.Config.read(filled)
        return replace(base, windows=qwen2.late_windows(filled, base.decoder.layers))


def weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return llama.weights(config) | head_norms(config)


def head_norms(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """The norms of single heads."""
    return {
        f"model.layers.{layer}.self_attn.{name}_norm.weight": (config.decoder.head_dim,)
        for layer in range(config.decoder.layers)
        for name in "qk"
    }


def build(config: llama.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(config, e, layer, x)

    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attention_block(config, e), feed)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))


def attention_block(config: llama.Config, e: Emitter) -> Block:
    """The attention of each layer."""
    turn = rotary(e, config.rope)

    def attend(layer: int, x: str) -> str:
        scores = Scores(scale=e.decoder.head_dim**-0.5, window=config.windows[layer])
        return normed_attention(e, layer, x, turn, *llama.projections(config, layer), scores)

    return attend


def normed_attention(
    e: Emitter,
    layer: int,
    x: str,
    rotary: Rotary | None,
    qkv: Sequence[Linear],
    o: Linear,
    scores: Scores,
) -> str:
    """`attention` with an RMSNorm over each head of queries and keys, before RoPE."""
    path, prefix = llama.attention_path(layer), f"model.layers.{layer}.self_attn"
    q, k, v = separate(e, path, projections(e, path, x, qkv))
    q = head_rms_norm(e, f"{path}/q_norm", q, e.decoder.heads, f"{prefix}.q_norm.weight")
    k = head_rms_norm(e, f"{path}/k_norm", k, e.decoder.kv_heads, f"{prefix}.k_norm.weight")
    return linear(e, f"{path}/o_proj", attend(e, path, [q, k, v], layer, rotary, scores), [o])
