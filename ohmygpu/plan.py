"""What a pull is going to install: name, variant, recipe and target, and how large it will be.

Decided from what the provider tells, before a byte of weights moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .core.errors import InvalidRequest
from .core.model_files import check_tokenizer
from .core.refs import ModelRef, check_name
from .core.settings import Settings

if TYPE_CHECKING:
    from .core.provider import Resolved

_WEIGHTS = ("safetensors", "gguf")
# Bytes of the compiled model per byte of source weights, rounded up: (source format, recipe).
_GROWTH = {
    ("safetensors", "f32"): 2.1,
    ("safetensors", "q8"): 0.7,
    ("safetensors", "q4"): 0.5,
    ("gguf", "exact"): 1.5,
    ("gguf", "f32"): 8.0,
    ("gguf", "q8"): 2.2,
    ("gguf", "q4"): 1.5,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pull is going to install, decided before a byte of weights moves."""

    resolved: Resolved
    name: str
    variant: str
    recipe: str
    target: str
    family: str  # part of the compile key; "" for GGUF, whose bytes alone decide it
    wants_default: bool  # asked for by the bare name

    @property
    def ref(self) -> ModelRef:
        """The reference as pulled."""
        return self.resolved.ref


def make_plan(resolved: Resolved, settings: Settings, name: str | None, recipe: str | None) -> Plan:
    """Decide name, variant, recipe and target.

    Raises UnsupportedModel for an architecture without a converter, where that is known by now,
    and InvalidRequest for a recipe that does not exist or does not suit the source.
    """
    from .convert import checkpoint, family, recipes
    from .core import hardware

    filenames = [file.filename for file in resolved.files]
    family_name = (
        "" if resolved.config is None else family.check_supported(resolved.config, filenames)
    )
    if resolved.gguf_architecture is not None:
        family.check_gguf_architecture(resolved.gguf_architecture, filenames[0])
    if resolved.source_format == "safetensors":
        check_tokenizer(filenames, resolved.display_name)
    target = hardware.target(settings.engine.execution_provider)
    source_format = resolved.source_format
    asked = None if recipe in (None, "auto") else str(recipe).strip().lower()
    if source_format == "safetensors" and resolved.variant:
        if asked not in (None, resolved.variant):
            raise InvalidRequest(
                f"{resolved.ref.display} names the recipe {resolved.variant} and --recipe says "
                f"{asked}; give one of the two",
                param="recipe",
            )
        asked = resolved.variant
    if asked is None and settings.models.recipe != "auto":
        asked = settings.models.recipe
    processor = recipes.target(target)
    has_blocks = source_format == "gguf" or checkpoint.keeps_blocks(resolved.config or {})
    chosen = recipes.recipe(
        asked or recipes.default_recipe(has_blocks, processor, _float_bytes(resolved))
    )
    recipes.check(chosen, processor, has_blocks)
    variant = chosen.name
    if source_format == "gguf" and resolved.variant:
        suffix = "" if chosen.name == "exact" else f"-{chosen.name}"
        variant = f"{resolved.variant.lower()}{suffix}"
    return Plan(
        resolved=resolved,
        name=check_name(name or resolved.display_name),
        variant=variant,
        recipe=chosen.name,
        target=target,
        family="" if source_format == "gguf" else family_name,
        wants_default=resolved.ref.variant is None,
    )


def compiled_estimate_bytes(plan: Plan) -> int:
    """About how large the compiled model is going to be."""
    from .convert.checkpoint import stored_bits

    weights = sum(file.size for file in plan.resolved.files if file.format in _WEIGHTS)
    source_format = plan.resolved.source_format
    if stored_bits(plan.resolved.config or {}) is not None:
        source_format = "gguf"  # as dense
    return int(weights * _GROWTH.get((source_format, plan.recipe), 2.0))


def _float_bytes(resolved: Resolved) -> int:
    """About what the weights take in float32, judged by the size and precision of their files."""
    from .convert.checkpoint import stored_bits

    size = sum(file.size for file in resolved.files if file.format in _WEIGHTS)
    if resolved.source_format == "safetensors":
        config = resolved.config or {}
        quantised = stored_bits(config)
        if quantised is not None:
            return size * 32 // quantised
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        return size if dtype == "float32" else 2 * size
    digits = "".join(filter(str.isdigit, (resolved.variant or "").partition("_")[0]))
    bits = int(digits or 4) + 0.5  # the label's bits, and half a bit of scales per weight
    return int(size * 32 / bits)
