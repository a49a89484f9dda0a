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
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, linear, lm_head
from ohmygpu.convert.norms import own_head_layer_norms
from ohmygpu.convert.residual import Block, NormNames, parallel_layers, sequential_layers
from ohmygpu.convert.rotary import rotary

from . import llama
from .llama import ignored, view

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
class Config(llama.Extended):
    """Llama's config, and how StableLM 2 12B differs."""

    qk_layernorm: bool
    parallel: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "head_dim": None, "mlp_bias": False}
        filled["attention_bias"] = fields.flag(filled, "use_qkv_bias", False)
        filled["rms_norm_eps"] = fields.number(filled, "layer_norm_eps")
        return Config(
            base=replace(llama.Config.read(filled), output_bias=False),
            qk_layernorm=fields.flag(filled, "qk_layernorm", False),
            parallel=fields.flag(filled, "use_parallel_residual", False),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    found = with_norm_biases(llama.weights(config.base))
    if config.parallel:
        found = {name: shape for name, shape in found.items() if _NORMS.second not in name}
    if config.qk_layernorm:
        for layer in range(d.layers):
            norms = _head_norms(layer, "q", d.heads) + _head_norms(layer, "k", d.kv_heads)
            found |= dict.fromkeys(norms, (d.head_dim,))
    return found


def with_norm_biases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama, with a bias for each norm: layer norms have one."""
    norms = [name for name in shapes if name.endswith("norm.weight")]
    return {**shapes, **{name.replace("weight", "bias"): shapes[name] for name in norms}}


def _head_norms(layer: int, name: str, heads: int) -> list[str]:
    prefix = f"model.layers.{layer}.self_attn.{name}_layernorm.norms"
    return [f"{prefix}.{number}.weight" for number in range(heads)]


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    base = config.base

    def feed(layer: int, x: str) -> str:
        return llama.feed_forward(base, e, layer, x)

    attend = _normed_attention(base, e) if config.qk_layernorm else llama.attention_block(base, e)
    join = parallel_layers if config.parallel else sequential_layers
    hidden = join(e, embedding(e, llama.EMBEDDING), _NORMS, attend, feed)
    lm_head(e, hidden, llama.head(base.tie_word_embeddings))


def _normed_attention(config: llama.Config, e: Emitter) -> Block:
    """Attention with a layer norm of its own for each head of queries and keys."""
    turn = rotary(e, config.rope)

    def attend_normed(layer: int, x: str) -> str:
        path, (qkv, o) = llama.attention_path(layer), llama.projections(config, layer)
        q, k, v = separate(e, path, projections(e, path, x, qkv))
        q_norms = _head_norms(layer, "q", e.decoder.heads)
        k_norms = _head_norms(layer, "k", e.decoder.kv_heads)
        q = own_head_layer_norms(e, f"{path}/q_layernorm", q, q_norms)
        k = own_head_layer_norms(e, f"{path}/k_layernorm", k, k_norms)
        y = attend(e, path, [q, k, v], layer, turn, usual_scores(e))
        return linear(e, f"{path}/o_proj", y, [o])

    return attend_normed
