"""OLMo 2: Llama with norms behind attention and feed-forward, and over queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ohmygpu.convert.attention import Scores, attend, projections, separate
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, linear, lm_head
from ohmygpu.convert.norms import rms_norm
from ohmygpu.convert.residual import post_norm_layers
from ohmygpu.convert.rotary import Rotary, rotary

from . import llama
from .llama import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""


class Config(llama.Config):
    """Llama's, read as OLMo's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        return llama.Config.read({**DEFAULTS, **config, "mlp_bias": False})


def weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return post_norm_weights(config) | query_key_norms(config)


def query_key_norms(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """The norms over all queries of a token, and over all its keys."""
    d = config.decoder
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}.self_attn"
        found[f"{prefix}.q_norm.weight"] = (d.heads * d.head_dim,)
        found[f"{prefix}.k_norm.weight"] = (d.kv_heads * d.head_dim,)
    return found


def post_norm_weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Llama's tensors with the norms of `post_norm_layers`."""
    found = llama.weights(config)
    for layer in range(config.decoder.layers):
        prefix = f"model.layers.{layer}"
        del found[f"{prefix}.input_layernorm.weight"]
        found[f"{prefix}.post_feedforward_layernorm.weight"] = (config.decoder.hidden_size,)
    return found


def build(config: llama.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.rope)
    emit(config, e, [turn] * e.decoder.layers)


def emit(config: llama.Config, e: Emitter, turns: Sequence[Rotary]) -> None:
    """The graph, with the RoPE of each layer."""

    def attend_to(layer: int, x: str) -> str:
        return attention(config, e, layer, x, turns[layer])

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(config, e, layer, x)

    hidden = post_norm_layers(e, embedding(e, llama.EMBEDDING), attend_to, feed)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))


def attention(config: llama.Config, e: Emitter, layer: int, x: str, turn: Rotary) -> str:
    """Attention with an RMSNorm over all queries of a token, and one over all its keys."""
    path, prefix = llama.attention_path(layer), f"model.layers.{layer}.self_attn"
    qkv, o = llama.projections(config, layer)
    q, k, v = separate(e, path, projections(e, path, x, qkv))
    q = rms_norm(e, f"{path}/q_norm", q, f"{prefix}.q_norm.weight")
    k = rms_norm(e, f"{path}/k_norm", k, f"{prefix}.k_norm.weight")
    scores = Scores(scale=e.decoder.head_dim**-0.5, window=config.windows[layer])
    return linear(e, f"{path}/o_proj", attend(e, path, [q, k, v], layer, turn, scores), [o])
