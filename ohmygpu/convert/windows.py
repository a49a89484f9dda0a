"""Reading which layers of a model see all positions, and which the latest ones only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from . import config as fields

FULL, SLIDING = "full_attention", "sliding_attention"


def full_every(period: int, layers: int) -> list[str]:
    """Types of `layers` layers: each `period`-th sees all positions, the others a window."""
    return [SLIDING if number % period else FULL for number in range(1, layers + 1)]


def read_layer_types(config: Mapping[str, Any], usual: Sequence[str]) -> tuple[str, ...]:
    """FULL or SLIDING for each layer: the config's `layer_types`, or `usual` where it has none.

    Raises CorruptFile when they are not one for each layer, UnsupportedModel for other types.
    """
    found = config.get("layer_types")
    if found is None:
        return tuple(usual)
    if not isinstance(found, (list, tuple)) or len(found) < len(usual):
        raise CorruptFile(f"the model's config has no layer_types for {len(usual)} layers")
    types = tuple(found[: len(usual)])
    for entry in types:
        if entry not in (FULL, SLIDING):
            raise UnsupportedModel(
                f"a {config.get('model_type')} with layers of the type {str(entry)[:40]!r} has no "
                f"converter; known types: {FULL}, {SLIDING}"
            )
    return types


def read_windows(config: Mapping[str, Any], usual: Sequence[str]) -> tuple[int | None, ...]:
    """Positions that each layer sees, the token's own among them: `sliding_window`, or None = all.

    `usual` are the types of the layers where the config does not name them.
    """
    types = read_layer_types(config, usual)
    if SLIDING not in types:
        return (None,) * len(types)
    window = fields.integer(config, "sliding_window")
    return tuple(window if entry == SLIDING else None for entry in types)


def read_window(config: Mapping[str, Any], context_tokens: int) -> int | None:
    """Positions that all layers see: `sliding_window`, or None = all `context_tokens` of them."""
    if config.get("sliding_window") is None:
        return None
    window = fields.integer(config, "sliding_window")
    return window if window < context_tokens else None
