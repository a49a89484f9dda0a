"""StarCoder2: Llama with layer norms, biases everywhere, an ungated feed-forward and a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import attention as layers
from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores
from ohmygpu.convert.decoder import Decoder, Emitter
from ohmygpu.convert.feed_forward import Activation, mlp, read_activation
from ohmygpu.convert.layers import embedding, lm_head
from ohmygpu.convert.residual import NormNames, sequential_layers
from ohmygpu.convert.rope import Rope
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.windows import read_window

from .llama import EMBEDDING, head, part, read_decoder
from .phi import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
    }
)
"""What a key that the config lacks means."""

_NORMS = NormNames("model/layers", "input_layernorm", "post_attention_layernorm", "model/norm")


@dataclass(frozen=True, slots=True)
class Config:
    """What a StarCoder2's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    rope: Rope
    activation: Activation
    use_bias: bool
    tie_word_embeddings: bool
    window: int | None  # positions that attention sees; None = all

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        decoder, rope = read_decoder(filled)
        return Config(
            decoder=replace(decoder, norm_epsilon=fields.number(filled, "norm_epsilon")),
            rope=rope,
            activation=read_activation(filled, "hidden_act", "gelu_pytorch_tanh"),
            use_bias=fields.flag(filled, "use_bias", True),
            tie_word_embeddings=fields.flag(filled, "tie_word_embeddings", True),
            window=read_window(filled, decoder.context_tokens),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    queries, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (d.vocab_size, hidden)}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (d.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.c_fc": (feed_forward, hidden),
        "mlp.c_proj": (hidden, feed_forward),
    }
    norms = ["model.norm"]
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}"
        norms += [f"{prefix}.{_NORMS.first}", f"{prefix}.{_NORMS.second}"]
        for name, shape in linears.items():
            found[f"{prefix}.{name}.weight"] = shape
            if config.use_bias:
                found[f"{prefix}.{name}.bias"] = shape[:1]
    for name in norms:
        found |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return found


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.rope)
    scores = Scores(scale=config.decoder.head_dim**-0.5, window=config.window)

    def attend(layer: int, x: str) -> str:
        path, prefix = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"
        q, k, v, o = (part(prefix, f"{name}_proj", config.use_bias) for name in "qkvo")
        return layers.attention(e, path, x, layer, turn, [q, k, v], o, scores)

    def feed(layer: int, x: str) -> str:
        prefix = f"model.layers.{layer}.mlp"
        c_fc, c_proj = (part(prefix, name, config.use_bias) for name in ("c_fc", "c_proj"))
        return mlp(e, f"/model/layers.{layer}/mlp", x, c_fc, c_proj, config.activation)

    hidden = sequential_layers(e, embedding(e, EMBEDDING), _NORMS, attend, feed)
    lm_head(e, hidden, head(config.tie_word_embeddings))
