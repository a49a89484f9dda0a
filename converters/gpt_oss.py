"""gpt-oss: attention sinks, windows on every other layer, clamped experts with biases, YaRN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores, attention
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.experts import ExpertReader, ExpertsSource, SlicePart, Stack, stack_tensors
from ohmygpu.convert.layers import Linear, embedding, lm_head
from ohmygpu.convert.moe import Experts, GatedUnit, Routing, mixture, read_routing
from ohmygpu.convert.residual import pre_norm_layers
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.source import Source
from ohmygpu.convert.windows import full_every, read_windows

from . import llama
from .llama import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    }
)
"""What a key that the config lacks means."""

_ROPE: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
)

STACKED, GATE_UP, APART = "stacked", "gate_up", "apart"
"""How files store experts: one tensor of floats for all, inputs first; or tensors of each expert,
gate and up in one with alternating rows (MXFP4), or apart (GGUF)."""


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """A Llama with `experts` in place of the feed-forward blocks, stored as `arrangement` says."""

    experts: int
    routing: Routing
    unit: GatedUnit
    arrangement: str

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "mlp_bias": False}
        if not filled.get("rope_parameters") and not filled.get("rope_scaling"):
            filled["rope_scaling"] = dict(_ROPE)
        base = llama.Config.read(filled)
        windows = read_windows(filled, full_every(2, base.decoder.layers))
        base = replace(base, windows=windows)
        experts, routing = read_routing(filled, "num_local_experts", normalised=True)
        unit = GatedUnit(
            alpha=fields.number(filled, "swiglu_alpha", 1.702),
            beta=1.0,
            limit=fields.number(filled, "swiglu_limit", 7.0),
        )
        return Config(base, experts, routing, unit, _arrangement(filled))


def _arrangement(config: Mapping[str, Any]) -> str:
    """From what quantised checkpoints and GGUF files say of themselves."""
    checkpoint = config.get("quantization_config")
    if isinstance(checkpoint, Mapping) and checkpoint.get("quant_method") == "mxfp4":
        return GATE_UP
    return str(config.get("expert_tensors", STACKED))


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d, count = config.decoder, config.experts
    hidden, inner = d.hidden_size, d.feed_forward_length
    found = {name: s for name, s in llama.weights(config.base).items() if ".mlp." not in name}
    for layer in range(d.layers):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.self_attn.sinks"] = (d.heads,)
        found[f"{prefix}.mlp.router.weight"] = (count, hidden)
        found[f"{prefix}.mlp.router.bias"] = (count,)
        experts = f"{prefix}.mlp.experts"
        found[f"{experts}.down_proj_bias"] = (count, hidden)
        if config.arrangement == STACKED:
            found[f"{experts}.gate_up_proj"] = (count, hidden, 2 * inner)
            found[f"{experts}.down_proj"] = (count, inner, hidden)
        for expert in range(count if config.arrangement != STACKED else 0):
            found[f"{experts}.{expert}.down_proj.weight"] = (hidden, inner)
            for kind, rows in _gate_and_up(config.arrangement, inner):
                found[f"{experts}.{expert}.{kind}.weight"] = (rows, hidden)
        for kind, rows in _gate_and_up(config.arrangement, inner):
            found[f"{experts}.{kind}_bias"] = (count, rows)
    return found


def _gate_and_up(arrangement: str, inner: int) -> list[tuple[str, int]]:
    """(projection, its rows) of what makes the inner values."""
    if arrangement == APART:
        return [("gate_proj", inner), ("up_proj", inner)]
    return [("gate_up_proj", 2 * inner)]


def view(config: Config, source: Source) -> Source:
    """The experts of each layer stacked."""
    layers, used, biases = {}, set(), {}
    for layer in range(config.decoder.layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        kinds = [kind for kind, _ in _gate_and_up(config.arrangement, 0)]
        biases[f"{prefix}.gate_up.bias"] = [f"{prefix}.{kind}_bias" for kind in kinds]
        if config.arrangement == STACKED:
            layers[prefix] = _slices(config, source, prefix)
            used |= {f"{prefix}.gate_up_proj", f"{prefix}.down_proj"}
            continue
        names = [f"{prefix}.{expert}" for expert in range(config.experts)]
        gate_up = [[f"{name}.{kind}.weight" for kind in kinds] for name in names]
        layers[prefix], taken = stack_tensors(
            source, gate_up, [f"{name}.down_proj.weight" for name in names]
        )
        used |= taken
    return ExpertsSource(source, layers, used, biases)


def _slices(config: Config, source: Source, prefix: str) -> tuple[Stack, Stack]:
    """Stacks of (experts, inputs, outputs) tensors; gate and up alternate in them already."""
    hidden, inner = config.decoder.hidden_size, config.decoder.feed_forward_length

    def stack(kind: str, rows: int) -> Stack:
        reader = ExpertReader(source, f"{prefix}.{kind}")
        parts = [SlicePart(reader, n, 0, rows, transposed=True) for n in range(config.experts)]
        return Stack([[part] for part in parts])

    return stack("gate_up_proj", 2 * inner), stack("down_proj", hidden)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.base.rope)

    def attend(layer: int, x: str) -> str:
        scores = Scores(
            scale=e.decoder.head_dim**-0.5,
            window=config.base.windows[layer],
            sinks=f"model.layers.{layer}.self_attn.sinks",
        )
        qkv, o = llama.projections(config.base, layer)
        return attention(e, llama.attention_path(layer), x, layer, turn, qkv, o, scores)

    def feed(layer: int, x: str) -> str:
        prefix = f"model.layers.{layer}.mlp"
        stacked = Experts(
            config.experts,
            f"{prefix}.experts.gate_up",
            f"{prefix}.experts.down",
            f"{prefix}.experts.gate_up.bias",
            f"{prefix}.experts.down_proj_bias",
        )
        router = Linear(f"{prefix}.router.weight", f"{prefix}.router.bias")
        path = f"/model/layers.{layer}/moe"
        return mixture(e, path, x, router, stacked, config.routing, config.unit)

    hidden = pre_norm_layers(e, embedding(e, llama.EMBEDDING), attend, feed)
    lm_head(e, hidden, llama.head(config.base.tie_word_embeddings))
