"""Phi-1, Phi-1.5 and Phi-2: attention and feed-forward side by side, biases everywhere.

One layer norm feeds both blocks, RoPE turns a part of each head, and the LM head has a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import attend, projections, separate, usual_scores
from ohmygpu.convert.decoder import Decoder, Emitter
from ohmygpu.convert.feed_forward import Activation, mlp, read_activation
from ohmygpu.convert.layers import Linear, embedding, linear, lm_head
from ohmygpu.convert.norms import head_layer_norm
from ohmygpu.convert.residual import NormNames, parallel_layers
from ohmygpu.convert.rope import Rope
from ohmygpu.convert.rotary import Rotary, rotary

from .llama import ignored, part, read_decoder, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""

_NORMS = NormNames("model/layers", "input_layernorm", "", "model/final_layernorm")


@dataclass(frozen=True, slots=True)
class Config:
    """What a Phi's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    rope: Rope
    activation: Activation
    qk_layernorm: bool
    tie_word_embeddings: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        decoder, rope = read_decoder(filled)
        return Config(
            decoder=replace(decoder, norm_epsilon=fields.number(filled, "layer_norm_eps")),
            rope=rope,
            activation=read_activation(filled, "hidden_act", "gelu_new"),
            qk_layernorm=fields.flag(filled, "qk_layernorm", False),
            tie_word_embeddings=fields.flag(filled, "tie_word_embeddings", False),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (d.vocab_size, hidden),
        "model.final_layernorm.weight": (hidden,),
        "model.final_layernorm.bias": (hidden,),
        "lm_head.bias": (d.vocab_size,),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (d.vocab_size, hidden)
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.dense": (hidden, queries),
        "mlp.fc1": (feed_forward, hidden),
        "mlp.fc2": (hidden, feed_forward),
    }
    if config.qk_layernorm:
        parts |= {f"self_attn.{name}_layernorm": (d.head_dim,) for name in "qk"}
    for layer in range(d.layers):
        for name, shape in parts.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
            found[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    return found


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.rope)

    def attention(layer: int, x: str) -> str:
        return _attention(config, e, layer, x, turn)

    def feed(layer: int, x: str) -> str:
        prefix = f"model.layers.{layer}.mlp"
        fc1, fc2 = part(prefix, "fc1", True), part(prefix, "fc2", True)
        return mlp(e, f"/model/layers.{layer}/mlp", x, fc1, fc2, config.activation)

    hidden = embedding(e, "model.embed_tokens.weight")
    hidden = parallel_layers(e, hidden, _NORMS, attention, feed)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    lm_head(e, hidden, Linear(head, "lm_head.bias"))


def _attention(config: Config, e: Emitter, layer: int, x: str, turn: Rotary) -> str:
    path, prefix = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"
    qkv = projections(e, path, x, [part(prefix, f"{name}_proj", True) for name in "qkv"])
    if config.qk_layernorm:
        q, k, v = separate(e, path, qkv)
        heads, kv_heads, norm = e.decoder.heads, e.decoder.kv_heads, f"{prefix}.{{}}_layernorm"
        q = head_layer_norm(e, f"{path}/q_layernorm", q, heads, norm.format("q"))
        k = head_layer_norm(e, f"{path}/k_layernorm", k, kv_heads, norm.format("k"))
        qkv = [q, k, v]
    y = attend(e, path, qkv, layer, turn, usual_scores(e))
    return linear(e, f"{path}/o_proj", y, [part(prefix, "dense", True)])
