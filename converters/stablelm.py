"""StableLM: Llama with layer norms, and RoPE on a part of each head.

StableLM 2 12B puts attention and feed-forward side by side behind one norm, and gives each head of
queries and keys a norm of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import attend, projections, separate, usual_scores
from ohmygpu.convert.decoder import Decoder, Emitter
from ohmygpu.convert.feed_forward import Activation, gated_mlp, read_activation
from ohmygpu.convert.layers import Linear, embedding, linear, lm_head
from ohmygpu.convert.norms import own_head_layer_norms
from ohmygpu.convert.residual import NormNames, parallel_layers, sequential_layers
from ohmygpu.convert.rope import Rope
from ohmygpu.convert.rotary import Rotary, rotary

from .llama import EMBEDDING, head, part, read_decoder
from .phi import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""

_NORMS = NormNames("model/layers", "input_layernorm", "post_attention_layernorm", "model/norm")


@dataclass(frozen=True, slots=True)
class Config:
    """What a StableLM's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    rope: Rope
    activation: Activation
    use_qkv_bias: bool
    qk_layernorm: bool
    parallel: bool
    tie_word_embeddings: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "head_dim": None}
        decoder, rope = read_decoder(filled)
        return Config(
            decoder=replace(decoder, norm_epsilon=fields.number(filled, "layer_norm_eps")),
            rope=rope,
            activation=read_activation(filled, "hidden_act", "silu"),
            use_qkv_bias=fields.flag(filled, "use_qkv_bias", False),
            qk_layernorm=fields.flag(filled, "qk_layernorm", False),
            parallel=fields.flag(filled, "use_parallel_residual", False),
            tie_word_embeddings=fields.flag(filled, "tie_word_embeddings", False),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (d.vocab_size, hidden)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (d.vocab_size, hidden)
    norms = ["input_layernorm"] if config.parallel else ["input_layernorm", _NORMS.second]
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
    }
    names = [f"model.layers.{layer}.{norm}" for layer in range(d.layers) for norm in norms]
    for name in ["model.norm", *names]:
        found |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}.weight": shape for name, shape in linears.items()}
        if config.use_qkv_bias:
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                found[f"{prefix}.{name}.bias"] = linears[name][:1]
        if config.qk_layernorm:
            norms_of_heads = _head_norms(layer, "q", d.heads) + _head_norms(layer, "k", d.kv_heads)
            found |= dict.fromkeys(norms_of_heads, (d.head_dim,))
    return found


def _head_norms(layer: int, name: str, heads: int) -> list[str]:
    prefix = f"model.layers.{layer}.self_attn.{name}_layernorm.norms"
    return [f"{prefix}.{number}.weight" for number in range(heads)]


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.rope)

    def attention(layer: int, x: str) -> str:
        return _attention(config, e, layer, x, turn)

    def feed(layer: int, x: str) -> str:
        prefix = f"model.layers.{layer}.mlp"
        gate, up, down = (Linear(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
        return gated_mlp(e, f"/model/layers.{layer}/mlp", x, gate, up, down, config.activation)

    join = parallel_layers if config.parallel else sequential_layers
    hidden = join(e, embedding(e, EMBEDDING), _NORMS, attention, feed)
    lm_head(e, hidden, head(config.tie_word_embeddings))


def _attention(config: Config, e: Emitter, layer: int, x: str, turn: Rotary) -> str:
    path, prefix = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"
    parts = [part(prefix, f"{name}_proj", config.use_qkv_bias) for name in "qkv"]
    qkv = projections(e, path, x, parts)
    if config.qk_layernorm:
        q, k, v = separate(e, path, qkv)
        q_norms = _head_norms(layer, "q", e.decoder.heads)
        k_norms = _head_norms(layer, "k", e.decoder.kv_heads)
        q = own_head_layer_norms(e, f"{path}/q_layernorm", q, q_norms)
        k = own_head_layer_norms(e, f"{path}/k_layernorm", k, k_norms)
        qkv = [q, k, v]
    y = attend(e, path, qkv, layer, turn, usual_scores(e))
    return linear(e, f"{path}/o_proj", y, [part(prefix, "o_proj", False)])
