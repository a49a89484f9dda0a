"""Typed access to the metadata of a GGUF model, and the settings every decoder has.

Keys: docs/gguf.md of ggml. A key that is missing where it is needed, has another type or a value
out of range is a CorruptFile that names it. Keys that change the result and that no part of an
architecture asked for are refused at the end: ignoring them would give wrong answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .gguf import GgufModel

_SOFTMAX = 1  # of expert_gating_func
_MAX_COUNT = 1 << 24  # of layers, heads, hidden units…: far above any model, far below overflow

# Settings that change the result of the architectures that know them, where they are not 0.
_CHANGE_THE_RESULT = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window",
    "attention.temperature_scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_count",
    "expert_gating_func",
    "expert_group_count",
    "expert_shared_count",
    "expert_weights_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.freq_base_swa",
)


class Keys:
    """The metadata of one architecture, `<architecture>.<key>`."""

    def __init__(self, model: GgufModel, architecture: str) -> None:
        self.model = model
        self.architecture = architecture
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.model.metadata

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; `default` when the key is missing."""
        value = self._scalar(key)
        if value is None:
            if default is None:
                raise self.corrupt(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.corrupt(key, f"is {str(value)[:40]!r}, not a whole number")
        if not least <= value <= _MAX_COUNT:
            raise self.corrupt(key, f"is {value}, not between {least} and {_MAX_COUNT}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; `default` when the key is missing."""
        value = self._scalar(key)
        if value is None:
            if default is None:
                raise self.corrupt(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.corrupt(key, f"is {str(value)[:40]!r}, not a number")
        if not np.isfinite(value):
            raise self.corrupt(key, "is not a finite number")
        return _shortest(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; `default` when the key is missing."""
        value = self.number(key, default)
        if value <= 0:
            raise self.corrupt(key, f"is {value}, not above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` when the key is missing."""
        value = self._scalar(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.corrupt(key, f"is {str(value)[:40]!r}, not true or false")
        return value

    def text(self, key: str) -> str | None:
        """A string; None when the key is missing."""
        value = self._value(key)
        if value is not None and not isinstance(value, str):
            raise self.corrupt(key, "is not text")
        return value

    def layer_flags(self, key: str, layers: int) -> list[bool] | int | None:
        """One truth value for each of `layers` layers, or one whole number; None when missing."""
        value = self._value(key)
        if not isinstance(value, np.ndarray):
            return None if value is None else self.integer(key)
        if value.size < layers or value.dtype.kind not in "iu":
            raise self.corrupt(key, f"is not one truth value for each of {layers} layers")
        return [bool(item) for item in value[:layers]]

    def only(self, key: str, *known: float) -> None:
        """Raise UnsupportedModel unless the key is missing or has a value that is built here."""
        value = self.number(key, known[0])
        if value not in known:
            raise UnsupportedModel(
                f"{self.model.name} sets {self.architecture}.{key} to {value}; "
                f"only {known[0]} is known"
            )

    def refuse_unasked(self) -> None:
        """Raise UnsupportedModel for a key that changes the result and that nobody asked for."""
        if not self.flag("attention.causal", True):
            raise UnsupportedModel(f"{self.model.name} is not causal: it does not generate text")
        for key in _CHANGE_THE_RESULT:
            if key not in self._asked and self._scalar(key):
                raise UnsupportedModel(
                    f"{self.model.name} sets {self.architecture}.{key}, which is not part of the "
                    f"{self.architecture} architecture as compiled here; its answers would be wrong"
                )

    def corrupt(self, key: str, what: str) -> CorruptFile:
        """The error for a key with a bad value."""
        return CorruptFile(
            f"{self.architecture}.{key} in {self.model.name} {what}; pull the model again"
        )

    def _value(self, key: str) -> Any:
        self._asked.add(key)
        return self.model.metadata.get(f"{self.architecture}.{key}")

    def _scalar(self, key: str) -> Any:
        """The value; a list with one entry per layer counts as one value when all are equal."""
        value = self._value(key)
        if isinstance(value, np.ndarray):
            if value.size == 0:
                raise self.corrupt(key, "is an empty list")
            if (value != value[0]).any():
                raise UnsupportedModel(
                    f"{self.model.name} has a different {self.architecture}.{key} in each layer; "
                    "such models cannot be compiled yet"
                )
            return value[0].item()
        return value


def decoder_config(keys: Keys, model_type: str, architecture: str) -> dict[str, Any]:
    """The config keys that all decoders with rotary positions share, and the special tokens.

    `model_type` and `architecture` (a class of transformers) go into the config as they are.
    """
    model = keys.model
    heads = keys.integer("attention.head_count")
    hidden = keys.integer("embedding_length")
    if hidden % heads and "attention.key_length" not in keys:
        raise CorruptFile(
            f"{model.name} has {hidden} hidden units for {heads} heads, which do not divide; "
            "pull the model again"
        )
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise CorruptFile(
            f"{model.name} has {heads} heads and {kv_heads} key-value heads, which do not divide; "
            "pull the model again"
        )
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if head_dim % 2:
        raise CorruptFile(f"{model.name} has heads of {head_dim} dimensions, an odd number")
    value_dim = keys.integer("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise UnsupportedModel(
            f"{keys.architecture}.attention.value_length in {model.name} is {value_dim} where "
            f"heads have {head_dim} dimensions; such models cannot be compiled"
        )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        **vocabulary(model),
    }


def expert_counts(keys: Keys) -> tuple[int, int]:
    """(experts, how many of them a token uses), chosen by the softmax of the router's scores."""
    keys.only("expert_gating_func", _SOFTMAX, 0)
    keys.only("expert_weights_scale", 1.0, 0.0)
    experts, used = keys.integer("expert_count"), keys.integer("expert_used_count")
    if used > experts:
        raise keys.corrupt("expert_used_count", f"is {used} of {experts} experts")
    return experts, used


def vocabulary(model: GgufModel) -> dict[str, Any]:
    """`vocab_size`, whether the output matrix is the embedding, and the special tokens."""
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in model.tensors}
    embedding = model.tensors.get("token_embd.weight")
    if embedding is not None:
        found["vocab_size"] = embedding.shape[0]
    return found | _special_tokens(model)


def _special_tokens(model: GgufModel) -> dict[str, Any]:
    found: dict[str, int] = {}
    for key in ("bos", "eos", "eot", "eom", "padding"):
        value = model.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(value, int) and 0 <= value < _MAX_COUNT:
            found[key] = value
    ends = sorted({found[key] for key in ("eos", "eot", "eom") if key in found})
    return {
        "bos_token_id": found.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": found.get("padding"),
    }


def _shortest(value: float) -> float:
    """A float32 of the file as the number it was written as (1e-05, not 9.99999974e-06)."""
    if float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return float(value)
