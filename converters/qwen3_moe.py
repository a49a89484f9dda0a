"""Qwen3 MoE: Qwen3 with a mixture of experts in some or all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.experts import ExpertsSource, stack_tensors
from ohmygpu.convert.layers import Linear, embedding, lm_head
from ohmygpu.convert.moe import Experts, Routing, check_activation, mixture, read_routing
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.source import Source
from ohmygpu.core.errors import CorruptFile

from . import llama, qwen3
from .llama import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "sliding_window": 4096,
}
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """A Qwen3 whose `sparse` layers have experts with `inner` values between their projections."""

    experts: int
    inner: int
    routing: Routing
    sparse: tuple[bool, ...]

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config}
        filled.setdefault("head_dim", filled["hidden_size"] // filled["num_attention_heads"])
        base = qwen3.Config.read(filled | {"use_sliding_window": False})
        base = replace(base, windows=read_window(filled, base.decoder.layers))
        return Config(base, *read_experts(filled, base.decoder.layers))


def read_window(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Windows of the layers: one for all, where the config switches it on."""
    if not fields.flag(config, "use_sliding_window", False) or not config["sliding_window"]:
        return (None,) * layers
    return (fields.integer(config, "sliding_window"),) * layers


def read_experts(
    config: Mapping[str, Any], layers: int
) -> tuple[int, int, Routing, tuple[bool, ...]]:
    """(experts, inner size, routing, which layers have them), by the keys Qwen's configs use."""
    check_activation(config)
    normalised = fields.flag(config, "norm_topk_prob", False)
    experts, routing = read_routing(config, "num_experts", normalised=normalised)
    inner = fields.integer(config, "moe_intermediate_size")
    return experts, inner, routing, sparse_layers(config, layers)


def sparse_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts: every `decoder_sparse_step`-th, but `mlp_only_layers`."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, (list, tuple)):
        raise CorruptFile(f"the model's config has mlp_only_layers = {str(dense)[:40]}, not a list")
    step = fields.integer(config, "decoder_sparse_step", 1)
    return tuple(n not in dense and (n + 1) % step == 0 for n in range(layers))


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return with_experts(config, qwen3.weights(config.base))


def with_experts(
    config: Config, dense: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The tensors of a dense model, with routers and experts where they take the MLP's place."""
    places = [f"model.layers.{n}.mlp." for n, sparse in enumerate(config.sparse) if sparse]
    found = {name: s for name, s in dense.items() if not name.startswith(tuple(places))}
    hidden, inner = config.decoder.hidden_size, config.inner
    for place in places:
        found[f"{place}gate.weight"] = (config.experts, hidden)
        for expert in range(config.experts):
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden))):
                found[f"{place}experts.{expert}.{name}_proj.weight"] = shape
            found[f"{place}experts.{expert}.down_proj.weight"] = (hidden, inner)
    return found


def view(config: Config, source: Source) -> Source:
    """The experts of each layer stacked."""
    layers, used = {}, set()
    for layer in (n for n, sparse in enumerate(config.sparse) if sparse):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = [f"{prefix}.{expert}" for expert in range(config.experts)]
        gate_up = [[f"{name}.{kind}_proj.weight" for kind in ("gate", "up")] for name in experts]
        down = [f"{name}.down_proj.weight" for name in experts]
        layers[prefix], taken = stack_tensors(source, gate_up, down)
        used |= taken
    return ExpertsSource(source, layers, used)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def feed(layer: int, x: str) -> str:
        if not config.sparse[layer]:
            return llama.feed_forward(config.base, e, layer, x)
        return experts(config, e, layer, x)

    attend = qwen3.attention_block(config.base, e)
    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(config.base.tie_word_embeddings))


def experts(config: Config, e: Emitter, layer: int, x: str) -> str:
    """The mixture of experts of a layer."""
    prefix = f"model.layers.{layer}.mlp"
    stacked = Experts(config.experts, f"{prefix}.experts.gate_up", f"{prefix}.experts.down")
    router = Linear(f"{prefix}.gate.weight")
    return mixture(e, f"/model/layers.{layer}/moe", x, router, stacked, config.routing)
