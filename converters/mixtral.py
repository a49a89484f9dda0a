"""Mixtral: Mistral with a mixture of experts in place of each feed-forward block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.experts import ExpertsSource, stack_tensors
from ohmygpu.convert.layers import Linear, embedding, lm_head
from ohmygpu.convert.moe import Experts, Routing, check_activation, mixture, read_routing
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.source import Source

from . import llama, mistral
from .llama import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
)
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """A Llama whose feed-forward blocks are `experts` times there."""

    experts: int
    routing: Routing

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        check_activation(filled)
        experts, routing = read_routing(filled, "num_local_experts", normalised=True)
        return Config(mistral.Config.read(filled), experts, routing)


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    found = {name: s for name, s in llama.weights(config.base).items() if ".mlp." not in name}
    hidden, inner = config.decoder.hidden_size, config.decoder.feed_forward_length
    for layer in range(config.decoder.layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        found[f"{prefix}.gate.weight"] = (config.experts, hidden)
        for expert in range(config.experts):
            found[f"{prefix}.experts.{expert}.w1.weight"] = (inner, hidden)
            found[f"{prefix}.experts.{expert}.w2.weight"] = (hidden, inner)
            found[f"{prefix}.experts.{expert}.w3.weight"] = (inner, hidden)
    return found


def view(config: Config, source: Source) -> Source:
    """The experts of each layer stacked: w1 is the gate, w3 up, w2 down."""
    layers, used = {}, set()
    for layer in range(config.decoder.layers):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        names = [[f"{prefix}.{n}.w{i}.weight" for i in (1, 3, 2)] for n in range(config.experts)]
        gate_up, down = [part[:2] for part in names], [part[2] for part in names]
        layers[prefix], taken = stack_tensors(source, gate_up, down)
        used |= taken
    return ExpertsSource(source, layers, used)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        prefix = f"model.layers.{layer}.block_sparse_moe"
        stacked = Experts(config.experts, f"{prefix}.experts.gate_up", f"{prefix}.experts.down")
        router = Linear(f"{prefix}.gate.weight")
        return mixture(e, f"/model/layers.{layer}/moe", x, router, stacked, config.routing)

    attend = llama.attention_block(config.base, e)
    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(config.base.tie_word_embeddings))
