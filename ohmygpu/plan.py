"""What a pull is going to install: name, variant, recipe and target, and how large it will be.

Decided from what the provider tells, before a byte of weights moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .core.errors import InvalidRequest, OutOfMemory, UnsupportedModel
from .core.manifests import source_of_reference
from .core.model_files import check_tokenizer
from .core.refs import ModelRef, check_name, quant_label
from .core.settings import Settings
from .core.sizes import human_bytes

if TYPE_CHECKING:
    from .core.provider import Resolved
    from .core.records import Adapter

_WEIGHTS = ("safetensors", "gguf")
# Bytes of the compiled model per byte of source weights, rounded up: (source format, recipe).
_GROWTH = {
    ("safetensors", "f32"): 2.1,
    ("safetensors", "f16"): 1.05,
    ("safetensors", "bf16"): 1.05,
    ("safetensors", "q8"): 0.7,
    ("safetensors", "q4"): 0.5,
    ("safetensors", "q4-high"): 0.5,
    ("gguf", "exact"): 1.5,
    ("gguf", "f32"): 8.0,
    ("gguf", "f16"): 4.0,
    ("gguf", "bf16"): 4.0,
    ("gguf", "q8"): 2.2,
    ("gguf", "q4"): 1.5,
    ("gguf", "q4-high"): 1.5,
}

# Quantisations whose blocks have no minimums, in every tensor of a file that is named so.
_WITHOUT_MINIMUMS = ("Q8_0", "Q6_K", "MXFP4", "F16", "FP16", "BF16", "F32", "FP32")
_KEPT_BY = {"float16": "f16", "bfloat16": "bf16"}  # a config's dtype → the recipe that keeps it
_IN_PLACE = 0.2  # what such a compile writes beside the weights that it shares with the source
_MXFP4 = ("gpt-oss",)  # architectures whose experts are MXFP4, whatever else a file is
_EXPORT_COPIES = 2.3  # of the weights in float32, at most at once
_EXPORT_WORKING_BYTES = 1 << 30  # torch, transformers, the graph
_LOADED = 1.25  # memory per byte of weights, once ONNX Runtime has packed them
_WORKING_BYTES = 512 << 20
_EXPERT_COUNTS = ("num_experts", "num_local_experts")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pull is going to install, decided before a byte of weights moves."""

    resolved: Resolved
    name: str
    variant: str
    recipe: str
    recipe_reason: str  # why this one, and on what machine, in words
    prompt_reason: str  # which graph computes prompts, and why, in words; "" where there is one
    target: str
    family: str  # part of the compile key; "" for GGUF, whose bytes alone decide it
    wants_default: bool  # asked for by the bare name
    exported: bool = False  # no family builds it: transformers makes its graph

    @property
    def ref(self) -> ModelRef:
        """The reference as pulled."""
        return self.resolved.ref

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that is merged in."""
        return None if self.resolved.adapter is None else self.resolved.adapter.adapter

    @property
    def adapter_mismatch(self) -> str:
        """What to tell a user whose adapter names another base model; "" when it fits."""
        if self.resolved.adapter is None:
            return ""
        named = str(self.resolved.adapter.config.get("base_model_name_or_path") or "")
        if not named or named.lower().rstrip("/").rpartition("/")[2] in self.ref.repo.lower():
            return ""
        return (
            f"the adapter says that it was trained on {named[:120]}; merging it into "
            f"{self.ref.display} all the same"
        )

    @property
    def source(self) -> str:
        """Where the bytes come from, as `manifests.source_of` the record will say."""
        if self.adapter is None:
            return self.ref.source
        return f"{self.ref.source} with {source_of_reference(self.adapter.source_ref)}"


def make_plan(resolved: Resolved, settings: Settings, name: str | None, recipe: str | None) -> Plan:
    """Decide name, variant, recipe and target.

    Raises UnsupportedModel for an architecture without a converter, where that is known by now,
    and InvalidRequest for a recipe that does not exist or does not suit the source.
    """
    from .convert import adapter_config, checkpoint, family, recipes
    from .core import hardware

    filenames = [file.filename for file in resolved.files]
    family_name = ""
    if resolved.config is not None:
        try:
            family_name = family.check_supported(resolved.config, filenames)
        except UnsupportedModel as refusal:
            return _exported_plan(resolved, settings, name, recipe, refusal)
    if resolved.gguf_architecture is not None:
        family.check_gguf_architecture(resolved.gguf_architecture, filenames[0])
    if resolved.source_format == "gguf":
        family.check_gguf_label(quant_label(filenames[0]), filenames[0])
    if resolved.source_format == "safetensors":
        check_tokenizer(filenames, resolved.display_name)
    target = hardware.target(settings.engine.execution_provider)
    source_format = resolved.source_format
    asked, reason = _asked_recipe(resolved, settings, recipe)
    processor = recipes.target(target)
    has_blocks = source_format == "gguf" or checkpoint.keeps_blocks(resolved.config or {})
    if resolved.adapter is not None:
        adapter_config.read_adapter(resolved.adapter.config)
        has_blocks = False  # merged weights are no longer those blocks
        if asked == "exact":
            raise InvalidRequest(
                "the recipe exact cannot keep weights that an adapter changes; choose q8, q4 "
                "or f32",
                param="recipe",
            )
    float_bytes = float_estimate_bytes(resolved)
    keeps = has_blocks and _experts_can_be_kept(resolved)
    chosen = recipes.recipe(asked or recipes.default_recipe(keeps, processor, float_bytes))
    recipes.check(chosen, processor, has_blocks)
    variant = chosen.name
    device, prompt_reason = target, ""
    if device == "cpu" and chosen.body_bits != 0:
        target, prompt_reason = _prompt_target(
            settings.engine.prompt_graph, _estimate_bytes(resolved, chosen.name), float_bytes
        )
    if source_format == "gguf" and resolved.variant:
        suffix = "" if chosen.name == "exact" else f"-{chosen.name}"
        variant = f"{resolved.variant.lower()}{suffix}"
    return Plan(
        resolved=resolved,
        name=check_name(name or resolved.display_name),
        variant=variant,
        recipe=chosen.name,
        recipe_reason=(
            f"{reason or f'the default: {recipes.explain(chosen.name, float_bytes)}'} "
            f"(compiled for {device} on {hardware.describe()})"
        ),
        prompt_reason=prompt_reason,
        target=target,
        family="" if source_format == "gguf" else family_name,
        wants_default=resolved.ref.variant is None,
    )


def _exported_plan(
    resolved: Resolved,
    settings: Settings,
    name: str | None,
    recipe: str | None,
    refusal: UnsupportedModel,
) -> Plan:
    """The plan for a model that no family builds. Raises `refusal` where it cannot be exported."""
    from .convert import family
    from .core import hardware
    from .exporter import architectures, environment

    config = resolved.config or {}
    if config.get("model_type") in family.supported_model_types():
        raise refusal  # a family has said what it cannot build of this
    model_type = architectures.check_exportable(config, refusal)
    check_tokenizer([file.filename for file in resolved.files], resolved.display_name)
    asked, reason = _asked_recipe(resolved, settings, recipe)
    if asked not in (None, "f32") and asked != settings.models.recipe:
        raise InvalidRequest(
            f"the architecture {model_type} has no converter, and what transformers exports is f32 "
            f"alone, not {asked}; leave the recipe out",
            param="recipe",
        )
    if resolved.adapter is not None:
        raise InvalidRequest(
            f"the architecture {model_type} has no converter, and only those merge adapters",
            param="adapter",
        )
    if settings.engine.execution_provider == "CUDA":
        raise InvalidRequest(
            f"the architecture {model_type} has no converter, and exported models run on the CPU; "
            "set engine.execution_provider to auto or CPU",
            param="execution_provider",
        )
    _check_memory(float_estimate_bytes(resolved), hardware.memory_available_bytes())
    return Plan(
        resolved=resolved,
        name=check_name(name or resolved.display_name),
        variant="f32",
        recipe="f32",
        recipe_reason=(
            f"{reason or 'the only one of exported models'} "
            f"(exported for cpu on {hardware.describe()})"
        ),
        prompt_reason="",
        target="cpu",
        family=f"{model_type} exported by {environment.version()}",
        wants_default=resolved.ref.variant is None,
        exported=True,
    )


def _check_memory(float_bytes: int, free_bytes: int) -> None:
    """Raise OutOfMemory unless an export fits: it holds all weights in float32, twice for a time.

    Zero free bytes means that the system does not say.
    """
    needed = int(float_bytes * _EXPORT_COPIES) + _EXPORT_WORKING_BYTES
    if 0 < free_bytes < needed:
        raise OutOfMemory(
            f"exporting the model takes about {human_bytes(needed)} of memory and "
            f"{human_bytes(free_bytes)} are free; unload other models, close programs or pull a "
            "smaller model",
            needed_bytes=needed,
            free_bytes=free_bytes,
        )


def _experts_can_be_kept(resolved: Resolved) -> bool:
    """Whether `exact` holds the experts of a quantised model, if it has any.

    Mixture-of-experts operators have no place for the minimums of blocks, which most types of
    GGUF blocks have, and most checkpoints of integers as zero points.
    """
    if resolved.source_format == "gguf":
        label = (quant_label(resolved.files[0].filename) or "").upper()
        kept = label.startswith(_WITHOUT_MINIMUMS) or resolved.gguf_architecture in _MXFP4
        return kept or not resolved.gguf_experts
    config = resolved.config or {}
    checkpoint = config.get("quantization_config")
    method = checkpoint.get("quant_method") if isinstance(checkpoint, Mapping) else None
    return method == "mxfp4" or not any(config.get(key) for key in _EXPERT_COUNTS)


def _asked_recipe(
    resolved: Resolved, settings: Settings, recipe: str | None
) -> tuple[str | None, str]:
    """The recipe that was asked for, and how; (None, "") when that is left to us."""
    asked = None if recipe in (None, "auto") else str(recipe).strip().lower()
    if resolved.source_format == "safetensors" and resolved.variant:
        if asked not in (None, resolved.variant):
            raise InvalidRequest(
                f"{resolved.ref.display} names the recipe {resolved.variant} and --recipe says "
                f"{asked}; give one of the two",
                param="recipe",
            )
        return resolved.variant, f"asked for, as {resolved.ref.display}"
    if asked is not None:
        return asked, "asked for, with --recipe"
    if settings.models.recipe != "auto":
        return settings.models.recipe, "the setting models.recipe"
    return None, ""


def _prompt_target(setting: str, compiled_bytes: int, float_bytes: int) -> tuple[str, str]:
    """(target, why) of a quantised compile for CPUs: with a graph of integers for prompts or not.

    `setting` is engine.prompt_graph; `compiled_bytes` is what the other graph takes, about.
    """
    from .core import hardware

    fast = hardware.multiplies_integers()
    if setting == "off":
        return "cpu", "in the same graph as all tokens: engine.prompt_graph is off"
    if setting == "on":
        return f"cpu-{'int8' if fast else 'uint8'}", "engine.prompt_graph is on"
    if not fast:
        needed = ", ".join(hardware.FAST_INTEGERS)
        return "cpu", f"in the same graph as all tokens: 8-bit integers are fast with {needed}"
    needed_bytes = int((compiled_bytes + float_bytes // 4) * _LOADED) + _WORKING_BYTES
    memory_bytes = hardware.memory_total_bytes()
    if 0 < memory_bytes < needed_bytes:
        return "cpu", (
            f"in the same graph as all tokens: two would take about {human_bytes(needed_bytes)} of "
            f"the {human_bytes(memory_bytes)} of memory"
        )
    return "cpu-int8", "the processor is fast at 8-bit integers"


def compiled_estimate_bytes(plan: Plan) -> int:
    """About how large the compiled model is going to be."""
    prompts = float_estimate_bytes(plan.resolved) // 4 if "int8" in plan.target else 0
    return _estimate_bytes(plan.resolved, plan.recipe) + prompts


def _estimate_bytes(resolved: Resolved, recipe: str) -> int:
    """About how large model.onnx and its data are going to be."""
    from .convert.checkpoint import stored_bits

    weights = sum(file.size for file in resolved.files if file.format in _WEIGHTS)
    source_format = resolved.source_format
    config = resolved.config or {}
    if stored_bits(config) is not None:
        source_format = "gguf"  # as dense
    elif source_format == "safetensors" and resolved.adapter is None:
        dtype = str(config.get("dtype") or config.get("torch_dtype"))
        if _KEPT_BY.get(dtype) == recipe:
            return int(weights * _IN_PLACE)
    return int(weights * _GROWTH.get((source_format, recipe), 2.0))


def float_estimate_bytes(resolved: Resolved) -> int:
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
