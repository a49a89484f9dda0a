"""Which architectures have a converter, and how to reach it. Standard library only.

A family is one module of `ohmygpu.converters`, named like the `model_type` of its configs. It is
imported when a model of it is compiled, and nowhere else; `ls converters/` is the support matrix.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from ohmygpu.core.errors import UnsupportedModel
from ohmygpu.core.sentence_files import MODULES_FILE

from .checkpoint import read_checkpoint

if TYPE_CHECKING:
    from .decoder import Decoder, Emitter
    from .source import Source

_CLASS_ENDING = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")

CONVERTER_VERSION = 2
"""Part of every compiled model's key: raise it when the same input compiles to other bytes."""

_PACKAGE = "ohmygpu.converters"

# model_type → the family that is exactly the same network under another name
ALIASES: Mapping[str, str] = {
    "camembert": "roberta",
    "code_llama": "llama",
    "internvl": "llava",
    "llava_next": "llava",
    "llava_next_video": "llava",
    "llava_onevision": "llava",
    "vipllava": "llava",
    "xlm-roberta": "roberta",
}

# families that make vectors of texts, in both directions at once, and never generate
ENCODERS = frozenset({"bert", "distilbert", "modernbert", "mpnet", "roberta"})
_ENCODER_CLASSES = ("Model", "ForMaskedLM", "ForPreTraining")  # endings of `architectures`

OVERFLOWS_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text"})
"""Families whose residual stream exceeds 65504, the largest float16, as they were trained in
bfloat16: GPUs compute in that.
"""

TEXT_PARTS: Mapping[str, str] = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral"}
"""Families of multimodal models, of which the text model alone is built → the type of a text model
whose config does not name it.
"""


GGUF_ARCHITECTURES: Mapping[str, str] = {
    name: f"gguf_{name.replace('-', '_')}"
    for name in (
        "gemma",
        "gemma2",
        "gemma3",
        "gpt-oss",
        "gpt2",
        "gptneox",
        "granite",
        "llama",
        "nemotron",
        "olmo2",
        "olmoe",
        "phi2",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    )
}
"""`general.architecture` of a GGUF file → the module beside this one that translates it."""


_UNREAD_LABELS = ("IQ1", "IQ2", "IQ3")


class FamilyConfig(Protocol):
    """A family's reading of a config; `decoder` holds the sizes every decoder has."""

    @property
    def decoder(self) -> Decoder:
        """Sizes of the model."""
        ...


class _ConfigReader(Protocol):
    def read(self, config: Mapping[str, Any]) -> FamilyConfig: ...


class Family(Protocol):
    """What a module in `converters/` provides."""

    @property
    def Config(self) -> _ConfigReader:  # noqa: N802 (a class of the module)
        """`Config.read(config.json as a dict)`; CorruptFile or UnsupportedModel on bad values."""
        ...

    def weights(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Every tensor of the files, Hugging Face name → shape."""
        ...

    def ignored(self, config: Any, name: str) -> bool:
        """Whether a tensor beyond `weights` may be in the files, and carries nothing."""
        ...

    def view(self, config: Any, source: Source) -> Source:
        """The source as `build` reads it: itself, or `convert.views` over what files store."""
        ...

    def build(self, config: Any, e: Emitter) -> None:
        """Emit the graph, composed of `convert.layers` and the modules like it."""
        ...


def supported_model_types() -> list[str]:
    """All `model_type`s with a converter, sorted: the files of the package, and the aliases."""
    spec = find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = (path for folder in folders for path in Path(folder).glob("*.py"))
    return sorted({path.stem for path in files if not path.stem.startswith("_")} | set(ALIASES))


def check_supported(config: Mapping[str, Any], filenames: Iterable[str] = ()) -> str:
    """The family that builds a model with this config, in a repository with these files.

    Raises UnsupportedModel, saying what it is and what is supported, for other architectures, for
    models that neither generate text nor embed it, and for checkpoints quantised in a way that is
    not read.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    supported = supported_model_types()
    _check_own_code(config)
    if model_type not in supported:
        shown = str(model_type or "unknown")
        if architectures:
            shown = f"{shown} ({architectures[0]})"
        raise UnsupportedModel(
            f"the architecture {shown} has no converter; supported: {', '.join(supported)}",
            model_type=model_type,
            supported=supported,
        )
    found = ALIASES.get(str(model_type), str(model_type))
    _check_purpose(found, [str(entry) for entry in architectures], MODULES_FILE in filenames)
    if found in TEXT_PARTS:
        text_family(config)
    read_checkpoint(config)
    return found


def _check_own_code(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for a model class that is code in the repository (`auto_map`).

    Repositories of models that transformers adopted since still point to their code; there the
    class has the name that transformers gives it, and the code is not needed.
    """
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping) or not any(
        str(key).startswith("AutoModel") for key in auto_map
    ):
        return
    model_type = str(config.get("model_type"))
    classes = [str(entry) for entry in config.get("architectures") or []] or [str(auto_map)]
    plain = _CLASS_ENDING.sub("", classes[0]).lower()
    known = {model_type, ALIASES.get(model_type, model_type)}
    known = {re.sub(r"_text$|[_-]", "", name).lower() for name in known}
    if model_type in supported_model_types() and plain in known:
        return
    raise UnsupportedModel(
        f"{classes[0][:120]} is code in the model's own repository (auto_map in config.json), and "
        "code from repositories is never run; look for a version of this model that transformers "
        f"knows by itself, or a GGUF file. Supported: {', '.join(supported_model_types())}",
        model_type=model_type[:80],
        supported=supported_model_types(),
    )


def text_family(config: Mapping[str, Any]) -> str:
    """The family of the text model inside a multimodal one. Raises UnsupportedModel."""
    model_type = str(config.get("model_type"))
    default = TEXT_PARTS[ALIASES.get(model_type, model_type)]
    text = config.get("text_config")
    text_type = str((text.get("model_type") if isinstance(text, Mapping) else None) or default)
    found = ALIASES.get(text_type, text_type)
    if text_type not in supported_model_types() or found in ENCODERS or found in TEXT_PARTS:
        raise UnsupportedModel(
            f"the text model of this {model_type} is a {text_type[:80]}, which has no converter; "
            f"supported: {', '.join(supported_model_types())}",
            model_type=text_type[:80],
        )
    return found


def _check_purpose(name: str, architectures: list[str], embeds: bool) -> None:
    """Raise UnsupportedModel for a class that neither generates text nor (`embeds`) embeds it."""
    if name in ENCODERS:
        allowed = any(entry.endswith(_ENCODER_CLASSES) for entry in architectures)
    else:
        allowed = any("CausalLM" in entry or "LMHead" in entry for entry in architectures)
        allowed |= embeds and any(entry.endswith("Model") for entry in architectures)
        if name in TEXT_PARTS:
            allowed |= any(entry.endswith("ForConditionalGeneration") for entry in architectures)
    if architectures and not allowed:
        raise UnsupportedModel(
            f"{architectures[0]} neither generates text nor embeds it: only causal language models "
            f"and embedding models (with a {MODULES_FILE}, or of the families "
            f"{', '.join(sorted(ENCODERS))}) are supported",
            architecture=architectures[0],
        )


def check_gguf_architecture(architecture: object, filename: str) -> str:
    """The module that translates GGUF files of this `general.architecture`.

    Raises UnsupportedModel, saying which architectures are supported.
    """
    module = GGUF_ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if module is None:
        supported = sorted(GGUF_ARCHITECTURES)
        raise UnsupportedModel(
            f"{filename} has the architecture {str(architecture)[:80]!r}; GGUF files of these "
            f"architectures can be compiled: {', '.join(supported)}",
            architecture=str(architecture)[:80],
            supported=supported,
        )
    return module


def check_gguf_label(label: str | None, filename: str) -> None:
    """Raise UnsupportedModel when a file's name tells a quantisation that is not read.

    The types IQ1 to IQ3 take their weights from tables of thousands of entries.
    """
    plain = (label or "").upper().removeprefix("UD-")
    if plain.startswith(_UNREAD_LABELS):
        raise UnsupportedModel(
            f"{filename} is quantised as {plain[:20]}, and the types IQ1, IQ2 and IQ3 are not "
            "read; pull another variant of this model, such as Q4_K_M or IQ4_XS",
            quantization=plain[:20],
        )


def family(name: str) -> Family:
    """Import a family by the name `check_supported` gave."""
    return cast(Family, cast(object, import_module(f"{_PACKAGE}.{name}")))


def compile_key(digests: Iterable[str], family: str, recipe: str, target: str) -> str:
    """64 hex digits that name a compile's result: equal keys, equal bytes.

    `digests` are the SHA256 of all source files that take part, in any order.
    """
    parts = {
        "sources": sorted(digests),
        "family": family,
        "converter_version": CONVERTER_VERSION,
        "recipe": recipe,
        "target": target,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
