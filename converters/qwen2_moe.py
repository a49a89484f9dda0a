"""Qwen2 MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 with experts, and one more for all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.layers import Linear, add, embedding, lm_head
from ohmygpu.convert.moe import shared_expert
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.windows import FULL, SLIDING, read_windows

from . import llama, qwen2, qwen3_moe
from .qwen3_moe import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = {
    **qwen2.DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(qwen3_moe.Config):
    """Qwen3 MoE's, with the size of the shared expert."""

    shared: int

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        base = qwen2.Config.read(filled | {"use_sliding_window": False})
        bias = fields.flag(filled, "qkv_bias", True)
        windows = _windows(filled, base.decoder.layers)
        base = replace(base, attention_bias=bias, windows=windows)
        experts = qwen3_moe.read_experts(filled, base.decoder.layers)
        return Config(base, *experts, fields.integer(filled, "shared_expert_intermediate_size"))


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Windows, where switched on, on every other layer before `max_window_layers`."""
    if not fields.flag(config, "use_sliding_window", False):
        return (None,) * layers
    first = fields.count(config, "max_window_layers")
    return read_windows(
        config, [FULL if layer % 2 or layer >= first else SLIDING for layer in range(layers)]
    )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    found = qwen3_moe.with_experts(config, llama.weights(config.base))
    hidden, shared = config.decoder.hidden_size, config.shared
    for layer in (n for n, sparse in enumerate(config.sparse) if sparse):
        prefix = f"model.layers.{layer}.mlp"
        found[f"{prefix}.shared_expert.gate_proj.weight"] = (shared, hidden)
        found[f"{prefix}.shared_expert.up_proj.weight"] = (shared, hidden)
        found[f"{prefix}.shared_expert.down_proj.weight"] = (hidden, shared)
        found[f"{prefix}.shared_expert_gate.weight"] = (1, hidden)
    return found


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        if not config.sparse[layer]:
            return llama.feed_forward(config.base, e, layer, x)
        prefix, path = f"model.layers.{layer}.mlp", f"/model/layers.{layer}/shared_expert"
        block = [llama.part(f"{prefix}.shared_expert", f"{n}_proj", False) for n in _BLOCK]
        shared = shared_expert(e, path, x, block, Linear(f"{prefix}.shared_expert_gate.weight"))
        return add(e, path, qwen3_moe.experts(config, e, layer, x), shared)

    attend = llama.attention_block(config.base, e)
    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(config.base.tie_word_embeddings))


_BLOCK = ("gate", "up", "down")
