"""Rotary position embeddings: which angles each position gets, for every scaling configs use.

Formulas follow the papers, in the form transformers' `ROPE_INIT_FUNCTIONS` gives them: linear
(position interpolation), dynamic (NTK-aware), yarn (arXiv 2309.00071), longrope (arXiv 2402.13753),
llama3 (Llama 3.1). Arithmetic is float32 where theirs is, so tables agree to the last bit or two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from . import config as fields

Float32 = NDArray[np.float32]

ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
_OLD_NAMES = {"su": "longrope", "ntk": "dynamic"}
_TABLE_ROWS = 16384  # positions computed at once


@dataclass(frozen=True, slots=True)
class Stretched:
    """Frequencies of rows longer than `original_tokens`, which must be known when they run.

    Either a fixed second set (longrope) or a base that grows with the length (dynamic NTK): for n
    tokens, theta * (factor * n / original_tokens - factor + 1) ** (D / (D - 2)).
    """

    original_tokens: int
    frequencies: Float32 | None = None  # (rotary_dim / 2,), longrope
    factor: float = 1.0  # dynamic


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn queries and keys.

    The first `rotary_dim` elements of each head turn, element i with i + rotary_dim / 2, by
    position * frequencies[i]; cos and sin are multiplied by `attention_factor`.
    """

    theta: float
    rotary_dim: int
    frequencies: Float32  # (rotary_dim / 2,)
    context_tokens: int  # how far the model reaches with this scaling
    attention_factor: float = 1.0
    stretched: Stretched | None = None

    def tables(self, table: str) -> Iterator[Float32]:
        """The `cos` or `sin` table, (context_tokens, rotary_dim / 2), a few rows at a time."""
        function = np.cos if table == "cos" else np.sin
        for start in range(0, self.context_tokens, _TABLE_ROWS):
            stop = min(start + _TABLE_ROWS, self.context_tokens)
            positions = np.arange(start, stop, dtype=np.float32)
            angles = positions[:, None] * self.frequencies  # float32, as the models were trained
            values = function(angles.astype(np.float64)) * self.attention_factor
            yield values.astype(np.float32)


def read_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The RoPE of a model from its config: `rope_parameters`, or `rope_scaling` + `rope_theta`.

    `rope_freq_factors`, a list that divides the frequencies, is how GGUF files spell llama3
    scaling. Raises UnsupportedModel for a scaling we do not know, CorruptFile for a bad field.
    """
    parameters = _parameters(config)
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    kind = _OLD_NAMES.get(kind, kind)
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(
            f"RoPE scaling {kind!r} has no implementation; known: {', '.join(ROPE_TYPES)}",
            rope_type=kind,
        )
    context = fields.integer(config, "max_position_embeddings", 2048)
    share = fields.number(parameters, "partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise CorruptFile(f"RoPE turns {rotary_dim} of {head_dim} elements of each head: not even")
    theta = fields.number(parameters, "rope_theta", 10000.0)
    plain = Rope(theta, rotary_dim, _frequencies(theta, rotary_dim), context)
    rope = _SCALINGS[kind](plain, parameters)
    if config.get("rope_freq_factors") is not None:
        factors = fields.numbers(config, "rope_freq_factors", rotary_dim // 2)
        divisors: Float32 = np.array(factors, np.float32)
        rope = replace(rope, frequencies=rope.frequencies / divisors)
    return rope


def ropes_by_layer(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config as layers of full attention read its RoPE, and as sliding layers do.

    `rope_parameters` are given by type of layer; `rope_scaling`, in older configs, is for layers of
    full attention alone. Raises CorruptFile when they are anything else than objects.
    """
    found, scaling = _object(config, "rope_parameters"), _object(config, "rope_scaling")
    bare = {**config, "rope_scaling": None}
    return (
        bare | {"rope_parameters": {**_object(found, "full_attention"), **scaling}},
        bare | {"rope_parameters": _object(found, "sliding_attention")},
    )


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of the config, empty when absent or null."""
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise CorruptFile(f"the model's config has {key} = {found!r}; an object is needed")
    return found


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of today's configs, filled up from the keys older ones used."""
    found = _object(config, "rope_parameters") or _object(config, "rope_scaling")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise UnsupportedModel("RoPE parameters that differ between layers have no implementation")
    parameters = {key: value for key, value in found.items() if value is not None}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key not in parameters and config.get(key) is not None:
            parameters[key] = config[key]
    original = config.get("original_max_position_embeddings")
    if original is not None:  # Phi-3 keeps it outside, and there it wins
        parameters["original_max_position_embeddings"] = original
    return parameters


def _frequencies(theta: float, rotary_dim: int) -> Float32:
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequencies: Float32 = np.float32(1.0) / np.power(np.float32(theta), exponents)
    return frequencies


def _default(rope: Rope, _: Mapping[str, Any]) -> Rope:
    return rope


def _linear(rope: Rope, parameters: Mapping[str, Any]) -> Rope:
    factor = np.float32(fields.number(parameters, "factor"))
    return replace(rope, frequencies=rope.frequencies / factor)


def _dynamic(rope: Rope, parameters: Mapping[str, Any]) -> Rope:
    if rope.rotary_dim < 4:
        raise CorruptFile("dynamic RoPE scaling needs heads of at least 4 elements")
    factor = fields.number(parameters, "factor")
    stretched = Stretched(original_tokens=rope.context_tokens, factor=factor)
    reach = max(rope.context_tokens, int(rope.context_tokens * factor))
    return replace(rope, context_tokens=reach, stretched=stretched)


def _longrope(rope: Rope, parameters: Mapping[str, Any]) -> Rope:
    half = rope.rotary_dim // 2
    original = _original_tokens(rope, parameters)
    factor = fields.number(parameters, "factor", rope.context_tokens / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (
        np.array(fields.numbers(parameters, key, half), np.float32)
        for key in ("short_factor", "long_factor")
    )
    return replace(
        rope,
        frequencies=rope.frequencies / short,
        attention_factor=fields.number(parameters, "attention_factor", default),
        stretched=Stretched(original, frequencies=rope.frequencies / long),
    )


def _llama3(rope: Rope, parameters: Mapping[str, Any]) -> Rope:
    factor = np.float32(fields.number(parameters, "factor"))
    low = fields.number(parameters, "low_freq_factor")
    high = fields.number(parameters, "high_freq_factor")
    if high == low:
        raise CorruptFile("llama3 RoPE scaling has equal low_freq_factor and high_freq_factor")
    original = _original_tokens(rope, parameters)
    inverse = rope.frequencies
    wavelengths = np.float32(2 * math.pi) / inverse
    blend = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - blend) * inverse / factor + blend * inverse
    scaled = np.where(wavelengths > original / low, inverse / factor, inverse)
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return replace(rope, frequencies=np.where(between, blended, scaled).astype(np.float32))


def _yarn(rope: Rope, parameters: Mapping[str, Any]) -> Rope:
    original = _original_tokens(rope, parameters)
    factor = fields.number(parameters, "factor", rope.context_tokens / original)
    half = rope.rotary_dim // 2
    low, high = _yarn_range(rope, parameters, original)
    ramp = np.clip((np.arange(half, dtype=np.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp.astype(np.float32)
    frequencies = rope.frequencies / np.float32(factor) * (1 - keep) + rope.frequencies * keep
    return replace(
        rope,
        frequencies=frequencies.astype(np.float32),
        attention_factor=_yarn_attention_factor(parameters, factor),
        context_tokens=max(rope.context_tokens, int(original * factor)),
    )


def _yarn_range(rope: Rope, parameters: Mapping[str, Any], original: int) -> tuple[float, float]:
    """First and last pair of the ramp between untouched and interpolated frequencies."""
    dim = rope.rotary_dim

    def pair_turning(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    low = pair_turning(fields.number(parameters, "beta_fast", 32.0))
    high = pair_turning(fields.number(parameters, "beta_slow", 1.0))
    if fields.flag(parameters, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if high == low else high


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if weight and weight_all:
        default = scale(float(weight)) / scale(float(weight_all))
    else:
        default = scale(1.0)
    return fields.number(parameters, "attention_factor", default)


def _original_tokens(rope: Rope, parameters: Mapping[str, Any]) -> int:
    return fields.integer(parameters, "original_max_position_embeddings", rope.context_tokens)


_SCALINGS = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
