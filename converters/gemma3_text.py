"""Gemma 3 (text): Gemma 2 without a cap on scores, with norms over heads, and with positions of
their own for the layers that see a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores
from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.rope import Rope, read_rope, ropes_by_layer
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.source import Source
from ohmygpu.convert.windows import full_every, read_windows

from . import gemma, gemma2, llama, qwen3
from .llama import ignored

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = {
    **gemma2.DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(gemma2.Config):
    """Gemma 2's config, and the RoPE of the layers that see a window."""

    local_rope: Rope

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "mlp_bias": False}
        everywhere, local = ropes_by_layer(filled)
        local["rope_theta"] = filled["rope_local_base_freq"]
        base = gemma2.read_base(everywhere)
        period = fields.integer(filled, "sliding_window_pattern", 6)
        usual = full_every(period, base.decoder.layers)
        return Config(
            base=replace(base, windows=read_windows(filled, usual)),
            score_scale=fields.number(filled, "query_pre_attn_scalar") ** -0.5,
            score_cap=0.0,  # the network has none, whatever the config says
            logit_cap=gemma2.read_cap(filled, "final_logit_softcapping"),
            local_rope=read_rope(local, base.decoder.head_dim),
        )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return gemma2.weights(config) | qwen3.head_norms(config.base)


def view(config: Config, source: Source) -> Source:
    """Norms with the 1 added that their files leave out."""
    return gemma.with_whole_norms(source, weights(config))


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    base = config.base
    turn = rotary(e, base.rope)
    turn_locally = rotary(e, config.local_rope, "local_rotary")

    def attend(layer: int, x: str) -> str:
        window = base.windows[layer]
        turns = turn if window is None else turn_locally
        scores = Scores(scale=config.score_scale, window=window)
        return qwen3.normed_attention(e, layer, x, turns, *llama.projections(base, layer), scores)

    gemma2.capped_head(config, e, gemma2.layers(base, e, attend))
