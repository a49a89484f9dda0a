"""Ollama's `options`: what is honoured, what cannot change an answer, what is refused."""

from __future__ import annotations

import math
from typing import Any

from . import fields

# option → sampling parameter
OPTION_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "repetition_window",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
    "num_predict": "max_tokens",
}

# How the model is loaded, or kept when Ollama's context slides (ours never does): checked for type
# alone, option → lowest value.
_LOAD_INTEGERS = {
    "num_keep": -1,
    "num_batch": 0,
    "num_gpu": -1,
    "main_gpu": -1,
    "num_thread": 0,
    "draft_num_predict": 0,
}
_LOAD_BOOLEANS = frozenset({"use_mmap", "use_mlock", "numa", "low_vram", "f16_kv", "logits_all"})

# samplers of older Ollama versions: accepted where they are off
_NEUTRAL: dict[str, fields.Neutral] = {
    "mirostat": (lambda value: value == 0, "mirostat is not supported; 0 turns it off"),
    "mirostat_tau": (lambda value: True, ""),  # means something with mirostat alone
    "mirostat_eta": (lambda value: True, ""),
    "tfs_z": (lambda value: value == 1, "tail-free sampling is not supported; 1 turns it off"),
    "penalize_newline": (lambda value: value is True, "only true is supported"),
    "vocab_only": (lambda value: value is False, "only false is supported"),
    "embedding_only": (lambda value: value is False, "only false is supported"),
}


def check_options(value: Any) -> dict[str, Any]:
    """The `options` object with the meaningful ones alone, in terms of our parameters' ranges.

    num_predict below 0 (until the context is full) and seed -1 (a fresh one) are left out, being
    what absence means. Raises InvalidRequest naming the option.
    """
    if value is None:
        return {}
    kept: dict[str, Any] = {}
    for name, option in fields.mapping(value, "options").items():
        if option is None:
            continue
        param = f"options.{name[:80]}"
        if name in OPTION_NAMES or name == "num_ctx":
            kept[name] = option
        else:
            _check_without_effect(name, option, param)
    if "num_ctx" in kept:
        kept["num_ctx"] = fields.integer(kept["num_ctx"], "options.num_ctx", low=1)
    if "num_predict" in kept and fields.integer(kept["num_predict"], "options.num_predict", -2) < 0:
        del kept["num_predict"]
    if "seed" in kept and fields.integer(kept["seed"], "options.seed") == -1:
        del kept["seed"]
    return kept


def _check_without_effect(name: str, value: Any, param: str) -> None:
    if name in _LOAD_INTEGERS:
        fields.integer(value, param, low=_LOAD_INTEGERS[name], high=2**31 - 1)
    elif name in _LOAD_BOOLEANS:
        fields.boolean(value, param)
    elif name in _NEUTRAL:
        if not isinstance(value, bool):
            fields.number(value, param)
        fields.check_neutral(param, value, _NEUTRAL[name])
    else:
        raise fields.refuse(param, "unknown option; remove it, because it might change the answer")


def parameter_lines(defaults: dict[str, float], stop: str) -> str:
    """A model's own sampling defaults as /api/show lists them: `name` and value, one per line."""
    names = {parameter: option for option, parameter in OPTION_NAMES.items()}
    lines = [("stop", f'"{stop}"')] if stop else []
    for parameter, value in sorted(defaults.items()):
        whole = math.isfinite(value) and float(value).is_integer()
        lines.append((names.get(parameter, parameter), f"{value:.0f}" if whole else f"{value:g}"))
    return "\n".join(f"{name:<30} {value}" for name, value in lines)
