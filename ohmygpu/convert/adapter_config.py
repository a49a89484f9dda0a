"""What a LoRA adapter's `adapter_config.json` decides. Standard library only.

Keys as PEFT writes them. Keys that change no merged weight are ignored; one that would, and is not
built here, is refused by name, and so is one that is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

# Of training, of how the adapter was begun, or told by its tensors.
# fmt: off
_IGNORED = frozenset((
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type", "velora_config",
))
_READ = frozenset((
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
))
# fmt: on
# Beginnings that leave the base model's weights alone; the others (PiSSA, OLoRA, LoftQ, …) take
# something from them, so the adapter fits another base than the one it names.
_PLAIN_BEGINNINGS = ("gaussian", "eva", "orthogonal")
# A pattern is a module's name, perhaps with a wildcard or alternatives: nothing that could take
# exponential time to match.
_SAFE_PATTERN = re.compile(r"[\w.\-\\^$|]*(?:[*+][\w.\-\\^$|]*){0,2}")
_MAX_PATTERN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """How the adapter's matrices become a change of the base model's weights."""

    base: str  # the model it was trained on, as it says; may be a path, or empty
    rank: int
    alpha: float
    rank_stabilised: bool
    dora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rank of a module's matrices."""
        return int(_matching(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The factor of B @ A: alpha / r, or alpha / √r (rsLoRA, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_adapter(config: Mapping[str, Any]) -> AdapterConfig:
    """Read an adapter's config. Raises UnsupportedModel, CorruptFile, each naming the key."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModel(
            f"the adapter is of the type {str(kind)[:40]}; LoRA adapters can be merged into a model"
        )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower() not in _PLAIN_BEGINNINGS:
        raise _refused("init_lora_weights", begun)
    for key, value in config.items():
        if key not in _IGNORED and key not in _READ and value not in (None, False, "", [], {}):
            raise _refused(key, value)
    return AdapterConfig(
        base=str(config.get("base_model_name_or_path") or ""),
        rank=int(_positive(config, "r", whole=True)),
        alpha=_positive(config, "lora_alpha"),
        rank_stabilised=_flag(config, "use_rslora"),
        dora=_flag(config, "use_dora"),
        fan_in_fan_out=_flag(config, "fan_in_fan_out"),
        rank_pattern=_pattern(config, "rank_pattern", whole=True),
        alpha_pattern=_pattern(config, "alpha_pattern"),
    )


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that the end of the module's name matches, as in PEFT."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _positive(config: Mapping[str, Any], key: str, whole: bool = False) -> float:
    value = config.get(key)
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise CorruptFile(
            f"adapter_config.json has {key} = {str(value)[:40]}; a positive number is needed"
        )
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value not in (None, True, False):
        raise CorruptFile(
            f"adapter_config.json has {key} = {str(value)[:40]}; true or false is needed"
        )
    return bool(value)


def _pattern(config: Mapping[str, Any], key: str, whole: bool = False) -> dict[str, float]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CorruptFile(f"adapter_config.json has a {key} that is not an object")
    for pattern in value:
        if len(pattern) > _MAX_PATTERN_CHARACTERS or not _SAFE_PATTERN.fullmatch(pattern):
            raise _refused(key, pattern)
        try:
            re.compile(pattern)
        except re.error as error:
            raise CorruptFile(
                f"adapter_config.json has a {key} that cannot be read: {pattern[:80]!r}"
            ) from error
    return {pattern: _positive(value, pattern, whole) for pattern in value}


def _refused(key: str, value: object) -> UnsupportedModel:
    return UnsupportedModel(
        f"the adapter's {key[:60]} ({str(value)[:60]}) cannot be merged into a model here; merge "
        "it with PEFT (merge_and_unload) and pull the folder that saves"
    )
