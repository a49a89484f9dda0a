"""Whether a config's sizes can be those of the files it came with, before anything is built.

A name is made for every layer and a row of RoPE's table for every position, so a config that lies
about them would take time and memory without end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ohmygpu.core.errors import CorruptFile

MAX_CONTEXT_TOKENS = 1 << 24  # the longest of any model is 10 million
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "original_max_position_embeddings")
_WIDTHS = ("hidden_size", "n_embd", "head_dim", "intermediate_size", "n_inner")
_MAX_EXPERTS = 1 << 16
_MAX_WIDTH = 1 << 22


def check_extent(config: Mapping[str, Any], tensors: int) -> None:
    """Raise CorruptFile when `config` says more than a model of so many `tensors` can have."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    for part in parts:
        for keys, limit, why in (
            (_LAYERS, tensors, f"the files hold {tensors} tensors"),
            (_WIDTHS, _MAX_WIDTH, f"{_MAX_WIDTH} is the most"),
            (_EXPERTS, _MAX_EXPERTS, f"{_MAX_EXPERTS} is the most"),
            (_POSITIONS, MAX_CONTEXT_TOKENS, f"{MAX_CONTEXT_TOKENS} is the most"),
        ):
            for key in keys:
                value = part.get(key)
                if isinstance(value, (int, float)) and not value <= limit:
                    raise CorruptFile(
                        f"the model's config has {key} = {value:.15g}, and {why}; the files do not "
                        "belong together, or the config is damaged: pull the model again"
                    )


def check_context(tokens: int) -> None:
    """Raise CorruptFile when a context, stretched by RoPE's scaling, is beyond any model's."""
    if tokens > MAX_CONTEXT_TOKENS:
        raise CorruptFile(
            f"the model's config gives a context of {tokens:.15g} tokens, and {MAX_CONTEXT_TOKENS} "
            "is the most; it is damaged: pull the model again"
        )
