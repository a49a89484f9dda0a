"""Which models without a family file transformers can export: what was measured, and why not.

`architectures.json` has an entry for each causal language model that transformers knows: made
small, exported and run beside torch by `tests/exporter/measure_architectures.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ohmygpu.core.errors import UnsupportedModel

_FILE = Path(__file__).with_name("architectures.json")
# RoPE whose frequencies depend on the length: a trace keeps those of one length.
_UNTRACED_ROPE = ("dynamic", "longrope", "su")
_ROPE_KEYS = ("rope_scaling", "rope_parameters")


@functools.cache
def measured() -> Mapping[str, Mapping[str, Any]]:
    """`model_type` → what was measured of it: `class`, and `error` or `refused`."""
    data = json.loads(_FILE.read_text(encoding="utf-8"))
    return dict(data["model_types"])


def exportable_model_types() -> list[str]:
    """The `model_type`s that can be exported, sorted."""
    return sorted(name for name, entry in measured().items() if "refused" not in entry)


def check_exportable(config: Mapping[str, Any], refusal: UnsupportedModel) -> str:
    """The `model_type` of a model that no family builds, but transformers can export.

    `refusal` says that no family does. Raises it for a model that transformers does not know, and
    UnsupportedModel with both reasons for one that cannot be exported, as far as its config tells.
    """
    model_type = str(config.get("model_type"))
    entry = measured().get(model_type)
    if entry is None:
        raise refusal
    reason = entry.get("refused") or _reason(config, str(entry.get("class", "")))
    if reason:
        raise UnsupportedModel(
            f"the architecture {model_type} has no converter, and it cannot be exported with "
            f"transformers either: {reason}",
            model_type=model_type,
        )
    return model_type


def _reason(config: Mapping[str, Any], known_class: str) -> str | None:
    """What in this config keeps it from being exported; None for nothing."""
    classes = [str(name)[:120] for name in config.get("architectures") or []]
    if config.get("auto_map") and classes[:1] != [known_class]:
        return (
            f"{(classes or ['its class'])[0]} is code in the model's own repository (auto_map in "
            "config.json), and code from repositories is never run"
        )
    if classes and not any("CausalLM" in name or "LMHead" in name for name in classes):
        return f"{classes[0]} does not generate text"
    if config.get("is_encoder_decoder"):
        return "it is an encoder and a decoder, and only decoders are served"
    if config.get("quantization_config"):
        return (
            "its weights are quantised, and only float weights are exported; look for the "
            "repository that it was quantised from"
        )
    for key in _ROPE_KEYS:
        scaling = config.get(key)
        kind = scaling.get("rope_type") or scaling.get("type") if isinstance(scaling, dict) else ""
        if kind in _UNTRACED_ROPE:
            return f"its {key} of type {kind} changes with the length of the text"
    return None
