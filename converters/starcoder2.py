"""StarCoder2: Llama with layer norms, biases everywhere, an ungated feed-forward and a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.feed_forward import mlp
from ohmygpu.convert.layers import embedding, lm_head
from ohmygpu.convert.residual import NormNames, sequential_layers
from ohmygpu.convert.windows import read_window

from . import arcee, llama
from .llama import ignored, view
from .stablelm import with_norm_biases

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


class Config(llama.Config):
    """Llama's, read as StarCoder2's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> llama.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        bias = fields.flag(filled, "use_bias", True)
        filled |= {"attention_bias": bias, "mlp_bias": bias}
        base = llama.Config.read({**filled, "rms_norm_eps": fields.number(filled, "norm_epsilon")})
        window = read_window(filled, base.decoder.context_tokens)
        return replace(base, windows=(window,) * base.decoder.layers)


def weights(config: llama.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    found = with_norm_biases(arcee.weights(config))
    for name in [name for name in found if ".mlp." in name]:
        own = name.replace("up_proj", "c_fc").replace("down_proj", "c_proj")
        found[own] = found.pop(name)
    return found


def build(config: llama.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        prefix = f"model.layers.{layer}.mlp"
        c_fc, c_proj = (llama.part(prefix, name, config.mlp_bias) for name in ("c_fc", "c_proj"))
        return mlp(e, f"/model/layers.{layer}/mlp", x, c_fc, c_proj, config.activation)

    attend, hidden = llama.attention_block(config, e), embedding(e, llama.EMBEDDING)
    hidden = sequential_layers(e, hidden, _NORMS, attend, feed)
    lm_head(e, hidden, llama.head(config.tie_word_embeddings))
