"""OLMoE: Llama with Qwen3 MoE's experts, and OLMo 2's norms over queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import embedding, lm_head
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.rotary import rotary
from ohmygpu.core.errors import UnsupportedModel

from . import llama, olmo2, qwen3_moe
from .qwen3_moe import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
    }
)
"""What a key that the config lacks means."""


class Config(qwen3_moe.Config):
    """Qwen3 MoE's, read as OLMoE's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> qwen3_moe.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        if filled["clip_qkv"] is not None:
            raise UnsupportedModel(
                "an olmoe with clip_qkv has no converter; the published OLMoE models have none"
            )
        filled |= {"mlp_bias": False, "moe_intermediate_size": filled["intermediate_size"]}
        base = llama.Config.read(filled)
        return qwen3_moe.Config(base, *qwen3_moe.read_experts(filled, base.decoder.layers))


def weights(config: qwen3_moe.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    norms = olmo2.query_key_norms(config.base)
    return qwen3_moe.with_experts(config, llama.weights(config.base) | norms)


def build(config: qwen3_moe.Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.base.rope)

    def attend(layer: int, x: str) -> str:
        return olmo2.attention(config.base, e, layer, x, turn)

    def feed(layer: int, x: str) -> str:
        return qwen3_moe.experts(config, e, layer, x)

    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(config.base.tie_word_embeddings))
