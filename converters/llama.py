"""Llama: pre-norm decoder, RMSNorm, grouped-query attention with RoPE, gated SiLU feed-forward.

Llama 1 to 3.x and the many models that share its code: SmolLM, Yi, TinyLlama, DeepSeek LLM, …
Families that differ in a few places import its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores, attention
from ohmygpu.convert.decoder import Decoder, Emitter
from ohmygpu.convert.feed_forward import Activation, gated_mlp, read_activation
from ohmygpu.convert.layers import Linear, embedding, lm_head
from ohmygpu.convert.residual import Block, pre_norm_layers
from ohmygpu.convert.rope import Rope, read_rope
from ohmygpu.convert.rotary import Rotary, rotary
from ohmygpu.convert.source import Source
from ohmygpu.core.errors import CorruptFile

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Config:
    """What a Llama's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    rope: Rope
    activation: Activation
    attention_bias: bool  # of q, k and v
    output_bias: bool  # of o
    mlp_bias: bool
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]  # positions that each layer's attention sees; None = all

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        decoder, rope = read_decoder(config)
        bias = fields.flag(config, "attention_bias", False)
        return Config(
            decoder=decoder,
            rope=rope,
            activation=read_activation(config, "hidden_act", "silu"),
            attention_bias=bias,
            output_bias=bias,
            mlp_bias=fields.flag(config, "mlp_bias", False),
            tie_word_embeddings=fields.flag(config, "tie_word_embeddings", False),
            windows=(None,) * decoder.layers,
        )


@dataclass(frozen=True, slots=True)
class Extended:
    """The config of a family that has more to say than `base`, its part that is Llama's."""

    base: Config

    @property
    def decoder(self) -> Decoder:
        """Sizes of the model."""
        return self.base.decoder

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the LM head is the embedding."""
        return self.base.tie_word_embeddings


def read_decoder(config: Mapping[str, Any]) -> tuple[Decoder, Rope]:
    """Sizes and RoPE, by the keys most decoders use. Raises CorruptFile or UnsupportedModel."""
    hidden_size = fields.integer(config, "hidden_size")
    heads = fields.integer(config, "num_attention_heads")
    kv_heads = fields.integer(config, "num_key_value_heads", heads)
    head_dim = fields.integer(config, "head_dim", max(hidden_size // heads, 1))
    if heads % kv_heads:
        raise CorruptFile(f"{heads} attention heads cannot share {kv_heads} key/value heads")
    rope = read_rope(config, head_dim)
    decoder = Decoder(
        vocab_size=fields.integer(config, "vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        feed_forward_length=fields.integer(config, "intermediate_size"),
        norm_epsilon=fields.number(config, "rms_norm_eps", 1e-6),
        context_tokens=rope.context_tokens,
        rope_theta=rope.theta,
    )
    return decoder, rope


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    found: dict[str, tuple[int, ...]] = {
        EMBEDDING: (d.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (d.vocab_size, hidden)
    linears = (
        ("self_attn.q_proj", (queries, hidden), config.attention_bias),
        ("self_attn.k_proj", (keys, hidden), config.attention_bias),
        ("self_attn.v_proj", (keys, hidden), config.attention_bias),
        ("self_attn.o_proj", (hidden, queries), config.output_bias),
        ("mlp.gate_proj", (feed_forward, hidden), config.mlp_bias),
        ("mlp.up_proj", (feed_forward, hidden), config.mlp_bias),
        ("mlp.down_proj", (hidden, feed_forward), config.mlp_bias),
    )
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = (hidden,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, shape, bias in linears:
            found[f"{prefix}.{name}.weight"] = shape
            if bias:
                found[f"{prefix}.{name}.bias"] = shape[:1]
    return found


class _Tied(Protocol):
    @property
    def tie_word_embeddings(self) -> bool: ...


def ignored(config: _Tied, name: str) -> bool:
    """Tensors some files carry that say nothing new: RoPE buffers, a copy of a tied embedding."""
    tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_copy or name.endswith("rotary_emb.inv_freq")


def view(config: object, source: Source) -> Source:
    """The files' own arrangement."""
    return source


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        return feed_forward(config, e, layer, x)

    hidden = pre_norm_layers(e, embedding(e, EMBEDDING), attention_block(config, e), feed)
    lm_head(e, hidden, head(config.tie_word_embeddings))


def attention_block(config: Config, e: Emitter) -> Block:
    """The attention of each layer."""
    turn = rotary(e, config.rope)

    def attend(layer: int, x: str) -> str:
        return layer_attention(config, e, layer, x, turn)

    return attend


def layer_attention(config: Config, e: Emitter, layer: int, x: str, turn: Rotary | None) -> str:
    """The attention of one layer; without `turn` it knows no positions."""
    scores = Scores(scale=e.decoder.head_dim**-0.5, window=config.windows[layer])
    qkv, o = projections(config, layer)
    return attention(e, attention_path(layer), x, layer, turn, qkv, o, scores)


def attention_path(layer: int) -> str:
    """Path of the nodes of a layer's attention."""
    return f"/model/layers.{layer}/attn"


def projections(config: Config, layer: int) -> tuple[list[Linear], Linear]:
    """([q, k, v], o) of a layer."""
    prefix = f"model.layers.{layer}.self_attn"
    qkv = [part(prefix, f"{name}_proj", config.attention_bias) for name in "qkv"]
    return qkv, part(prefix, "o_proj", config.output_bias)


def feed_forward(config: Config, e: Emitter, layer: int, x: str) -> str:
    """The gated feed-forward block of a layer."""
    prefix = f"model.layers.{layer}.mlp"
    gate, up, down = (part(prefix, f"{n}_proj", config.mlp_bias) for n in ("gate", "up", "down"))
    return gated_mlp(e, f"/model/layers.{layer}/mlp", x, gate, up, down, config.activation)


def part(prefix: str, name: str, bias: bool) -> Linear:
    """The linear layer `prefix.name`, with its bias where it has one."""
    return Linear(f"{prefix}.{name}.weight", f"{prefix}.{name}.bias" if bias else None)


def head(tied: bool) -> Linear:
    """The LM head: its own matrix, or the embedding's where the two are tied."""
    return Linear(EMBEDDING if tied else "lm_head.weight")
