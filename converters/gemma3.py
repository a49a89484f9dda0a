"""The text model of Gemma 3 from 4B up, which also take images: gemma3_text under a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.text_part import TextPart, build, ignored, read_text_part, view, weights

__all__ = ["Config", "build", "ignored", "view", "weights"]


class Config(TextPart):
    """The text model's config."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> TextPart:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        return read_text_part(config, fields.flag(config, "tie_word_embeddings", True))
