"""Llama: pre-norm decoder, RMSNorm, grouped-query attention with RoPE, gated SiLU feed-forward.

Llama 1 to 3.x and the many models that share its code: SmolLM, Yi, TinyLlama, DeepSeek LLM, …
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert import layers
from ohmygpu.convert.decoder import Decoder, Emitter
from ohmygpu.convert.layers import Linear
from ohmygpu.convert.rope import read_rope
from ohmygpu.convert.rotary import rotary
from ohmygpu.core.errors import CorruptFile, UnsupportedModel


@dataclass(frozen=True, slots=True)
class Config:
    """What a Llama's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        activation = config.get("hidden_act") or "silu"
        if activation not in ("silu", "swish"):
            raise UnsupportedModel(
                f"a llama with the activation {activation!r} has no converter; silu has one"
            )
        hidden_size = fields.integer(config, "hidden_size")
        heads = fields.integer(config, "num_attention_heads")
        kv_heads = fields.integer(config, "num_key_value_heads", heads)
        head_dim = fields.integer(config, "head_dim", max(hidden_size // heads, 1))
        if heads % kv_heads:
            raise CorruptFile(f"{heads} attention heads cannot share {kv_heads} key/value heads")
        decoder = Decoder(
            vocab_size=fields.integer(config, "vocab_size"),
            hidden_size=hidden_size,
            layers=fields.integer(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            feed_forward_length=fields.integer(config, "intermediate_size"),
            norm_epsilon=fields.number(config, "rms_norm_eps", 1e-6),
            rope=read_rope(config, head_dim),
        )
        return Config(
            decoder=decoder,
            attention_bias=fields.flag(config, "attention_bias", False),
            mlp_bias=fields.flag(config, "mlp_bias", False),
            tie_word_embeddings=fields.flag(config, "tie_word_embeddings", False),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (d.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (d.vocab_size, hidden)
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    mlp = {
        "gate_proj": (feed_forward, hidden),
        "up_proj": (feed_forward, hidden),
        "down_proj": (hidden, feed_forward),
    }
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = (hidden,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for block, shapes, bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ):
            for name, shape in shapes.items():
                found[f"{prefix}.{block}.{name}.weight"] = shape
                if bias:
                    found[f"{prefix}.{block}.{name}.bias"] = shape[:1]
    return found


def ignored(config: Config, name: str) -> bool:
    """Tensors some files carry that say nothing new: RoPE buffers, a copy of a tied embedding."""
    tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_copy or name.endswith("rotary_emb.inv_freq")


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e)
    hidden = layers.embedding(e, "model.embed_tokens.weight")
    normed = layers.rms_norm(
        e, "/model/layers.0/input_layernorm", hidden, "model.layers.0.input_layernorm.weight"
    )
    for layer in range(config.decoder.layers):
        path, prefix = f"/model/layers.{layer}", f"model.layers.{layer}"

        def part(name: str, bias: bool, prefix: str = prefix) -> Linear:
            weight = f"{prefix}.{name}"
            return Linear(f"{weight}.weight", f"{weight}.bias" if bias else None)

        q, k, v, o = (part(f"self_attn.{name}_proj", config.attention_bias) for name in "qkvo")
        attended = layers.attention(e, f"{path}/attn", normed, layer, turn, (q, k, v), o)
        normed, hidden = layers.skip_rms_norm(
            e,
            f"{path}/post_attention_layernorm",
            attended,
            hidden,
            f"{prefix}.post_attention_layernorm.weight",
        )
        gate, up, down = (
            part(f"mlp.{name}_proj", config.mlp_bias) for name in ("gate", "up", "down")
        )
        fed = layers.gated_mlp(e, f"{path}/mlp", normed, gate, up, down)
        last = layer + 1 == config.decoder.layers
        following = "norm" if last else f"layers.{layer + 1}/input_layernorm"
        normed, hidden = layers.skip_rms_norm(
            e, f"/model/{following}", fed, hidden, f"model.{following.replace('/', '.')}.weight"
        )
    tied = config.tie_word_embeddings
    layers.lm_head(e, normed, "model.embed_tokens.weight" if tied else "lm_head.weight")
