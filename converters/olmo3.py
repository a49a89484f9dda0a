"""OLMo 3: OLMo 2 with windows on three layers of four, and RoPE scaled in the others alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ohmygpu.convert.decoder import Emitter
from ohmygpu.convert.rope import Rope, read_rope, ropes_by_layer
from ohmygpu.convert.rotary import rotary
from ohmygpu.convert.windows import full_every, read_windows

from . import llama, olmo2
from .llama import ignored, view

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = {
    **olmo2.DEFAULTS,
    "rope_theta": 500000.0,
    "sliding_window": 4096,
}
"""What a key that the config lacks means."""


@dataclass(frozen=True, slots=True)
class Config(llama.Extended):
    """Llama's config, and the RoPE of the layers that see a window."""

    local_rope: Rope

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "mlp_bias": False}
        everywhere, local = ropes_by_layer(filled)
        base = llama.Config.read(everywhere)
        windows = read_windows(filled, full_every(4, base.decoder.layers))
        base = replace(base, windows=windows)
        return Config(base, read_rope(local, base.decoder.head_dim))


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return olmo2.weights(config.base)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    turn = rotary(e, config.base.rope)
    turn_locally = rotary(e, config.local_rope, "local_rotary")
    windows = config.base.windows
    olmo2.emit(config.base, e, [turn if window is None else turn_locally for window in windows])
