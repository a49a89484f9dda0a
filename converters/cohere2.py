"""Command R7B and Command A: Cohere with windows on three layers of four, which alone turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.windows import full_every, read_windows

from . import cohere
from .cohere import build, ignored, view, weights

__all__ = ["Config", "build", "ignored", "view", "weights"]

DEFAULTS: Mapping[str, Any] = {
    **{key: value for key, value in cohere.DEFAULTS.items() if key != "use_qk_norm"},
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}
"""What a key that the config lacks means."""


class Config(cohere.Config):
    """Cohere's, read as Cohere 2's configs mean it."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> cohere.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        filled = {**DEFAULTS, **config, "head_dim": None}
        base = cohere.read_base(filled)
        period = fields.integer(filled, "sliding_window_pattern", 4)
        windows = read_windows(filled, full_every(period, base.decoder.layers))
        turns = tuple(window is not None for window in windows)
        scale = fields.number(filled, "logit_scale")
        return cohere.Config(replace(base, windows=windows), turns, scale)
