"""The text model of LLaVA and models like it: llama, mistral, qwen2 or another under a prefix."""

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
        text = config.get("text_config")
        said_inside = isinstance(text, Mapping) and fields.flag(text, "tie_word_embeddings", False)
        tied = fields.flag(config, "tie_word_embeddings", False) or said_inside
        return read_text_part(config, tied)
