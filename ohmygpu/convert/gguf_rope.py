"""Rotary positions of a GGUF model, in the words of Hugging Face configs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .gguf_keys import Keys

_FACTORS = "rope_freqs.weight"


def rope_config(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, and where the file has them `rope_scaling` and `rope_freq_factors`.

    All of a head must turn: see `partial_rope_config` for architectures where it need not.
    """
    found = keys.integer("rope.dimension_count", config["head_dim"])
    if found != config["head_dim"]:
        raise UnsupportedModel(
            f"{keys.architecture}.rope.dimension_count in {keys.model.name} is {found} where heads "
            f"have {config['head_dim']} dimensions; such models cannot be compiled"
        )
    rope = _base(keys, config)
    factors = rope_factors(keys, _FACTORS, config["head_dim"] // 2)
    if factors is not None:
        rope["rope_freq_factors"] = factors
    return rope


def partial_rope_config(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `partial_rotary_factor`, and where the file has it `rope_scaling`."""
    share = partial_rotary(keys, config["head_dim"])
    return {**_base(keys, config), "partial_rotary_factor": share}


def _base(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": keys.positive("rope.freq_base", 10000.0)}
    scaling = _scaling(keys, config)
    return rope if scaling is None else {**rope, "rope_scaling": scaling}


def partial_rotary(keys: Keys, head_dim: int) -> float:
    """The share of each head that turns, so that int(share * head_dim) is the file's own number."""
    turning = keys.integer("rope.dimension_count", head_dim)
    if turning > head_dim or turning % 2:
        raise keys.corrupt(
            "rope.dimension_count", f"is {turning} where heads have {head_dim} dimensions"
        )
    share = turning / head_dim
    return share if int(share * head_dim) == turning else math.nextafter(share, 1.0)


def rope_factors(keys: Keys, tensor_name: str, count: int) -> list[float] | None:
    """Divisors of the frequencies, one per pair of dimensions; None when the file has none."""
    model = keys.model
    tensor = model.tensors.get(tensor_name)
    if tensor is None:
        return None
    if tensor.type_name != "F32" or tensor.shape != (count,):
        raise CorruptFile(
            f"{tensor_name} in {model.name} is {tensor.type_name} {tensor.shape}, "
            f"not F32 ({count},); pull the model again"
        )
    factors = model.read_rows(tensor_name, 0, count).view("<f4")[:, 0]
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise CorruptFile(f"{tensor_name} in {model.name} holds a factor that is not above 0")
    return [float(str(factor)) for factor in factors]


def scaling_factor(keys: Keys) -> float:
    """By how much positions are stretched, 1 when they are not."""
    # A factor of 0 means none; scale_linear is the key before rope.scaling.* existed.
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0)
    if factor < 0:
        raise CorruptFile(f"{keys.model.name} has a negative RoPE scaling factor")
    return factor or 1.0


def _scaling(keys: Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = keys.text("rope.scaling.type") or "linear"
    factor = scaling_factor(keys)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModel(
            f"{keys.model.name} scales RoPE by {kind[:40]!r}; linear and yarn are known"
        )
    keys.only("rope.scaling.yarn_log_multiplier", 0.0)
    keys.only("rope.scaling.yarn_ext_factor", 1.0)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "beta_fast": keys.positive("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.positive("rope.scaling.yarn_beta_slow", 1.0),
    }
    # llama.cpp multiplies its own 1 + 0.1 ln(factor) by these; transformers takes the product.
    multiplier = keys.positive("rope.scaling.attn_factor", 1.0)
    multiplier *= keys.positive("rope.scaling.yarn_attn_factor", 1.0)
    if multiplier != 1.0:
        scaling["attention_factor"] = multiplier * (1.0 + 0.1 * float(np.log(factor)))
    return scaling


def longrope(keys: Keys, config: dict[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` of two lists of divisors (arXiv 2402.13753); None when the file has none.

    Raises CorruptFile when one of the two lists is missing.
    """
    pairs = int(config["head_dim"] * config["partial_rotary_factor"]) // 2
    short = rope_factors(keys, "rope_factors_short.weight", pairs)
    long = rope_factors(keys, "rope_factors_long.weight", pairs)
    if short is None or long is None:
        if short is not long:
            raise CorruptFile(f"{keys.model.name} has one of rope_factors_short and _long only")
        return None
    scaling: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    original = config["original_max_position_embeddings"]
    stretch = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    factor = keys.positive("rope.scaling.attn_factor", 1.0)
    if not math.isclose(factor, usual, rel_tol=1e-6):  # else it follows from the lengths
        scaling["attention_factor"] = factor
    return scaling
