"""RoBERTa: BERT whose positions begin behind the padding token's.

Also XLM-RoBERTa: BGE-M3, multilingual E5, paraphrase-multilingual and others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ohmygpu.convert import config as fields

from . import bert
from .bert import build, ignored, view, weights

__all__ = ["Config", "build", "ignored", "view", "weights"]


class Config:
    """Reads a RoBERTa's `config.json` into BERT's Config."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> bert.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        padding = fields.integer(config, "pad_token_id", 1)
        return bert.read_config(config, first_position=padding + 1)
