"""How an embedding model makes one vector of a text: the files sentence-transformers leaves.

`modules.json` lists the steps after the transformer: pooling, then any of dense layers and
normalisation. The rest says how long a text may be (`sentence_bert_config.json`) and which
prompts the model was trained with (`config_sentence_transformers.json`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from ohmygpu.core.sentence_files import LENGTH_FILE, MODULES_FILE, PROMPTS_FILE, read_modules

from . import config as fields
from .safetensors import read_json_object

Pooling = Literal["cls", "last", "max", "mean", "mean_sqrt_len", "weighted_mean"]

_POOLINGS: Mapping[str, Pooling] = {  # as Pooling's config spells them
    "cls": "cls",
    "cls_token": "cls",
    "lasttoken": "last",
    "max": "max",
    "max_tokens": "max",
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "weightedmean_tokens": "weighted_mean",
}
_GGUF_POOLINGS: Mapping[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}  # llama.h: pooling types
_DENSE_ACTIVATIONS = {"Identity": "", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
_UNLIMITED_TOKENS = 1 << 30  # tokenizers that have no limit say so with absurd numbers


@dataclass(frozen=True, slots=True)
class Dense:
    """activation(x @ weight.T + bias) on the pooled vector; `folder` holds its weights."""

    folder: str
    inputs: int
    outputs: int
    bias: bool
    activation: str  # "" | tanh | relu | gelu


@dataclass(frozen=True, slots=True)
class Normalize:
    """Division by the vector's Euclidean length."""


Step = Dense | Normalize


@dataclass(frozen=True, slots=True)
class Embedder:
    """What turns the last hidden states of a model into one vector.

    `max_tokens`: the longest text the model was made for, None where nothing says. `prompts` are
    texts that belong before some kinds of input ("query" → "Instruct: …"); they are for the caller
    to put there.
    """

    pooling: Pooling
    steps: tuple[Step, ...] = ()
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def normalize(self) -> bool:
        """Whether the vectors have length 1."""
        return bool(self.steps) and isinstance(self.steps[-1], Normalize)

    def length(self, hidden_size: int) -> int:
        """Numbers in a vector of a model with this hidden size."""
        dense = [step.outputs for step in self.steps if isinstance(step, Dense)]
        return dense[-1] if dense else hidden_size


class _Described(Protocol):
    @property
    def files(self) -> Mapping[str, Path]: ...

    @property
    def config(self) -> Mapping[str, Any]: ...


def read_embedder(source: _Described) -> Embedder | None:
    """The embedder a repository's files describe; None when they describe none.

    Raises UnsupportedModel for a step we do not have, CorruptFile for damaged files.
    """
    if MODULES_FILE not in source.files:
        return None
    pooling: Pooling | None = None
    steps: list[Step] = []
    for kind, folder in _modules(source.files[MODULES_FILE]):
        settings = _settings(source.files, f"{folder}/config.json") if folder else {}
        if kind == "Transformer":
            continue
        if kind == "Pooling" and pooling is None:
            pooling = _read_pooling(settings)
        elif kind == "Dense" and pooling is not None:
            steps.append(_read_dense(folder, settings))
        elif kind == "Normalize" and pooling is not None:
            steps.append(Normalize())
        else:
            raise UnsupportedModel(
                f"{MODULES_FILE} has the step {kind[:40]!r}, which cannot be compiled here; a "
                "transformer, one pooling, then dense layers and normalisation can",
                module=kind[:40],
            )
    if pooling is None:
        raise UnsupportedModel(
            f"{MODULES_FILE} has no pooling: this model gives a vector for each token, not one "
            "for each text, which is not supported"
        )
    settings = _settings(source.files, LENGTH_FILE)
    return Embedder(
        pooling=pooling,
        steps=tuple(steps),
        max_tokens=_max_tokens(source.files, settings),
        lower_case=fields.flag(settings, "do_lower_case", False),
        prompts=_prompts(_settings(source.files, PROMPTS_FILE)),
    )


def default_embedder() -> Embedder:
    """What sentence-transformers makes of an encoder without such files: the mean of all tokens."""
    return Embedder(pooling="mean")


def gguf_embedder(metadata: Mapping[str, Any]) -> Embedder | None:
    """The embedder a GGUF file's `<architecture>.pooling_type` describes; None without one.

    llama.cpp, whose format it is, normalises all embeddings; so does this.
    """
    key = f"{metadata.get('general.architecture')}.pooling_type"
    if not metadata.get(key):
        return None
    pooling = _GGUF_POOLINGS.get(metadata[key])
    if pooling is None:
        raise UnsupportedModel(
            f"{key} is {metadata[key]}; models that pool by mean (1), first (2) or last token (3) "
            "can be compiled"
        )
    return Embedder(pooling=pooling, steps=(Normalize(),))


def _modules(path: Path) -> list[tuple[str, str]]:
    try:
        return read_modules(path.read_bytes(), "the model")
    except OSError as error:
        raise CorruptFile(f"{MODULES_FILE} cannot be read: {error.strerror}") from error


def _settings(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_json_object(name, files[name]) if name in files else {}


def _read_pooling(settings: Mapping[str, Any]) -> Pooling:
    chosen = settings.get("pooling_mode")
    if chosen is None:
        prefix = "pooling_mode_"
        chosen = [
            key.removeprefix(prefix)
            for key, value in settings.items()
            if key.startswith(prefix) and value is True
        ]
    modes = [chosen] if isinstance(chosen, str) else list(chosen)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        shown = ", ".join(str(mode)[:40] for mode in modes) or "nothing"
        raise UnsupportedModel(
            f"the model pools by {shown}; one of {', '.join(sorted(set(_POOLINGS.values())))} can "
            "be compiled"
        )
    return _POOLINGS[modes[0]]


def _read_dense(folder: str, settings: Mapping[str, Any]) -> Dense:
    name = str(settings.get("activation_function") or "Identity").rpartition(".")[2]
    if name not in _DENSE_ACTIVATIONS:
        raise UnsupportedModel(
            f"{folder} has the activation {name[:40]!r}; "
            f"{', '.join(_DENSE_ACTIVATIONS)} can be compiled"
        )
    return Dense(
        folder=folder,
        inputs=fields.integer(settings, "in_features"),
        outputs=fields.integer(settings, "out_features"),
        bias=fields.flag(settings, "bias", True),
        activation=_DENSE_ACTIVATIONS[name],
    )


def _max_tokens(files: Mapping[str, Path], settings: Mapping[str, Any]) -> int | None:
    """`max_seq_length`, or what the tokenizer says where that is absent, as the library does."""
    if settings.get("max_seq_length") is not None:
        return fields.integer(settings, "max_seq_length")
    value = _settings(files, "tokenizer_config.json").get("model_max_length")
    if isinstance(value, (int, float)) and 0 < value < _UNLIMITED_TOKENS:
        return int(value)
    return None


def _prompts(settings: Mapping[str, Any]) -> dict[str, str]:
    prompts = settings.get("prompts")
    if not isinstance(prompts, Mapping):
        return {}
    return {str(name): text for name, text in prompts.items() if isinstance(text, str) and text}
