"""Granite 3 MoE: Granite with experts, those of a layer in one tensor for each direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.experts import ExpertReader, ExpertsSource, SlicePart, Stack
from ohmygpu.convert.layers import Linear
from ohmygpu.convert.moe import Experts, Routing, check_activation, mixture, read_routing
from ohmygpu.convert.source import Source

from . import granite, llama
from .llama import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        **{key: value for key, value in granite.DEFAULTS.items() if key != "mlp_bias"},
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
)
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(granite.Config):
    """A Granite whose feed-forward blocks are `experts` times there."""

    experts: int
    routing: Routing

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "mlp_bias": False}
        check_activation(filled)
        dense = granite.Config.read(filled)
        experts, routing = read_routing(filled, "num_local_experts", normalised=True)
        return Config(
            dense.base,
            dense.embedding_multiplier,
            dense.attention_multiplier,
            dense.residual_multiplier,
            dense.logits_scaling,
            experts,
            routing,
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    found = {name: s for name, s in llama.weights(config.base).items() if ".mlp." not in name}
    hidden, inner = config.decoder.hidden_size, config.decoder.feed_forward_length
    for layer in range(config.decoder.layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        found[f"{prefix}.router.layer.weight"] = (config.experts, hidden)
        found[f"{prefix}.input_linear.weight"] = (config.experts, 2 * inner, hidden)
        found[f"{prefix}.output_linear.weight"] = (config.experts, hidden, inner)
    return found


def view(config: Config, source: Source) -> Source:
    """The experts of each layer stacked: a gate's rows come before those of up."""
    hidden, inner = config.decoder.hidden_size, config.decoder.feed_forward_length
    layers, used = {}, set()
    for layer in range(config.decoder.layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        names = f"{prefix}.input_linear.weight", f"{prefix}.output_linear.weight"
        inputs, outputs = (ExpertReader(source, name) for name in names)
        gate_up = [
            [SlicePart(inputs, n, 0, inner), SlicePart(inputs, n, inner, 2 * inner)]
            for n in range(config.experts)
        ]
        down = [[SlicePart(outputs, n, 0, hidden)] for n in range(config.experts)]
        layers[f"{prefix}.experts"] = Stack(gate_up), Stack(down)
        used |= set(names)
    return ExpertsSource(source, layers, used)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        prefix = f"model.layers.{layer}.block_sparse_moe"
        stacked = Experts(config.experts, f"{prefix}.experts.gate_up", f"{prefix}.experts.down")
        router = Linear(f"{prefix}.router.layer.weight")
        return mixture(e, f"/model/layers.{layer}/moe", x, router, stacked, config.routing)

    granite.emit(config, e, feed)
