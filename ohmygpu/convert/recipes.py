"""Recipes: what a compile stores for each class of weights, and for which processor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.core.sizes import human_bytes

GROUP = 32  # weights that share a scale

SMALL_FLOAT_BYTES = 1 << 30  # about 270 million weights


@dataclass(frozen=True, slots=True)
class Target:
    """A processor's choices: activations and KV cache, and how MatMulNBits computes.

    `accuracy_level` 4 quantises activations to int8 in the same groups as the weights: on CPUs it
    is the fast path (the only one for 8 bits); 0 computes in `dtype`, as CUDA does. With it off,
    8-bit graphs on a CPU are exact but far too slow to serve: a reference for tests.

    `integers`: how prompts.onnx (`prompts`) stores its weights, int8 or uint8; "" = there is none.
    """

    name: str
    dtype: str  # float32 | float16 | bfloat16
    accuracy_level: int
    integers: str = ""

    @property
    def device(self) -> str:
        """What it runs on: cpu or cuda."""
        return self.name.partition("-")[0]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Bits of each weight class: 0 = not quantised, None = as the source stores it.

    `sensitive_bits` go to what rounding hurts most: the projections to queries, keys and values,
    and the down projections of the first and last eighth of the layers and of every third between.
    On SmolLM2 this cuts q4's divergence by 2.5 for 13 % more bytes; all down projections would cut
    it by 2.8 for 21 %.
    """

    name: str
    body_bits: int | None
    sensitive_bits: int | None
    head_bits: int | None  # token embedding and LM head: sensitive too, and shared when tied
    knows_inputs: bool = False  # 4-bit weights are rounded by what their inputs look like
    groups: tuple[tuple[int, int], ...] = ()  # (bits, weights that share a scale) where not 32
    dtype: str = ""  # of weights, activations and KV cache; "" = the target's

    def group(self, bits: int, columns: int) -> int:
        """Weights that share a scale, in a matrix of `columns`: what was chosen, if it divides."""
        wanted = dict(self.groups).get(bits, GROUP)
        while wanted > GROUP and columns % wanted:
            wanted //= 2
        return wanted

    def bits(self, name: str, layers: int) -> int | None:
        """Bits of the body's matrix with this Hugging Face name, in a model of `layers` layers."""
        if name.endswith(_ATTENTION_INPUTS):
            return self.sensitive_bits
        found = _DOWN_PROJECTION.search(name)
        if found and _is_sensitive_layer(int(found[1]), layers):
            return self.sensitive_bits
        return self.body_bits


_ATTENTION_INPUTS = (
    "q_proj.weight",
    "k_proj.weight",
    "v_proj.weight",
    "qkv_proj.weight",
    "query_key_value.weight",
    "c_attn.weight",
)
_DOWN_PROJECTION = re.compile(
    r"\.(?:layers|h)\.(\d+)\..*(?:down_proj|mlp\.fc2|mlp\.c_proj|dense_4h_to_h)\.weight$"
)


def _is_sensitive_layer(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "cpu": Target("cpu", "float32", 4),
        "cpu-int8": Target("cpu-int8", "float32", 4, "int8"),  # multiplies 8-bit integers fast
        "cpu-uint8": Target("cpu-uint8", "float32", 4, "uint8"),  # correctly, but no faster
        "cuda": Target("cuda", "float16", 0),
    }
)

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "f32": Recipe("f32", 0, 0, 0),  # weights untouched
        "f16": Recipe("f16", 0, 0, 0, dtype="float16"),  # untouched where they are float16
        "bf16": Recipe("bf16", 0, 0, 0, dtype="bfloat16"),  # the same for bfloat16
        "q8": Recipe("q8", 8, 8, 8),  # close to lossless
        "q4": Recipe("q4", 4, 8, 8),  # smallest
        "q4-high": Recipe("q4-high", 4, 8, 8, knows_inputs=True),  # as small, closer, far slower
        "exact": Recipe("exact", None, None, None),  # quantised weights as they are, bit for bit
    }
)


def recipe(name: str) -> Recipe:
    """Look a recipe up. Raises InvalidRequest naming those that exist."""
    try:
        return RECIPES[name]
    except KeyError:
        known = ", ".join(RECIPES)
        raise InvalidRequest(
            f"there is no recipe {name!r}; choose one of {known}", param="recipe"
        ) from None


def target(name: str) -> Target:
    """Look a target up. Raises InvalidRequest naming those that exist."""
    try:
        return TARGETS[name]
    except KeyError:
        known = ", ".join(TARGETS)
        raise InvalidRequest(
            f"there is no target {name!r}; choose one of {known}", param="target"
        ) from None


def check(recipe: Recipe, target: Target, has_blocks: bool) -> None:
    """Raise InvalidRequest when this recipe cannot be made from this source for this target.

    `has_blocks`: the source stores quantised weights that `exact` can keep.
    """
    if recipe.name == "exact" and not has_blocks:
        raise InvalidRequest(
            "the recipe exact keeps weights that are quantised already (GGUF, GPTQ, AWQ); "
            "for these choose q8, q4 or f32",
            param="recipe",
        )
    if recipe.name == "f32" and target.device != "cpu":
        raise InvalidRequest(
            f"the recipe f32 runs on the CPU only ({target.name} has no float32 attention); "
            "choose f16, bf16, q8 or q4",
            param="recipe",
        )
    if recipe.dtype and target.device == "cpu":
        raise InvalidRequest(
            f"the recipe {recipe.name} runs on a GPU only (this is compiled for the CPU, which is "
            "slow with 16-bit floats or lacks them); choose f32 (weights untouched), q8 or q4",
            param="recipe",
        )


def typed(target: Target, recipe: Recipe, overflows: bool) -> Target:
    """`target` computing in the floats that this recipe asks for or this model needs.

    `overflows`: the model's activations leave the range of float16, so that every recipe that
    leaves the choice to a GPU computes in bfloat16 there.
    """
    if target.device == "cpu":
        return target
    return replace(target, dtype=recipe.dtype or ("bfloat16" if overflows else target.dtype))


def default_recipe(has_blocks: bool, target: Target, float_bytes: int) -> str:
    """The recipe used when none is asked for.

    `float_bytes` is what the weights take in float32, about. A model that is small even so stays
    unquantised on a CPU: it is fast as it is, and small models lose the most to rounding (greedy
    answers of a 135M model change with 8-bit activations). Beyond that, weights that are quantised
    already (`has_blocks`: GGUF, GPTQ, AWQ) are kept (`exact`) and others get `q8`.
    """
    if target.device == "cpu" and float_bytes <= SMALL_FLOAT_BYTES:
        return "f32"
    return "exact" if has_blocks else "q8"


def explain(recipe: str, float_bytes: int) -> str:
    """Why `default_recipe` chose `recipe`, in words."""
    if recipe == "f32":
        return (
            f"in float32 the weights take only {human_bytes(float_bytes)}: fast enough, and small "
            "models lose the most to rounding"
        )
    if recipe == "exact":
        return "the weights are quantised already, and are kept as they are"
    return "close to lossless at about a quarter of float32's size"
