"""A key that a config lacks means what transformers makes of it, by families that say so."""

from __future__ import annotations

from typing import Any

import pytest

from ohmygpu.convert.family import ALIASES, family, supported_model_types

FAMILIES = [
    name
    for name in supported_model_types()
    if name not in ALIASES and hasattr(family(name), "DEFAULTS")
]


def default_of(config: Any, key: str) -> object:
    """A default as transformers' config class gives it, wherever it keeps it now."""
    ropes = getattr(config, "rope_parameters", None) or {}
    if key in ("rope_theta", "rotary_emb_base"):
        return ropes.get("full_attention", ropes)["rope_theta"]
    if key == "rope_local_base_freq":
        return ropes["sliding_attention"]["rope_theta"]
    if key in ("partial_rotary_factor", "rotary_pct"):
        return ropes["partial_rotary_factor"]
    if key == "conv1d":  # no key of configs: what is so in all but GGUF files
        return True
    if key == "sliding_window_pattern":  # kept as the types it leads to
        return config.layer_types.index("full_attention") + 1
    if key == "sliding_window" and hasattr(config, "use_sliding_window"):
        return type(config)(use_sliding_window=True).sliding_window
    return getattr(config, key)


@pytest.mark.reference
@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    from transformers import CONFIG_MAPPING

    defaults = dict(vars(family(name))["DEFAULTS"])
    config = CONFIG_MAPPING[name]()
    assert {key: default_of(config, key) for key in defaults} == defaults
