"""A model with a LoRA adapter merged into it, as a `Source`; rows are merged as they are read.

    W' = W + scale * B @ A          B (N, r), A (r, K): LoRA, arXiv 2106.09685
    W' = m * W' / |W'| by row       m (N): DoRA, arXiv 2402.09353

Tensors that the adapter holds whole (`modules_to_save`, biases) replace the base model's. Every
tensor of the adapter has to find its place, or the merge is refused naming it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ohmygpu.core.errors import CorruptFile
from ohmygpu.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

from .adapter_config import AdapterConfig, read_adapter
from .safetensors import SafetensorsFile, read_json_object
from .source import (
    BlockLayout,
    Float32,
    QuantizedBlocks,
    Source,
    SourceFormat,
    read_whole,
)

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<linear>[AB])(?:\.default)?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.default)?"
    r"|lora_(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|lora_B(?:\.default)?\.(?P<bias>bias)"
    r")"
)
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?)?\.(?P<what>weight|bias)")


@dataclass(slots=True)
class _Change:
    """What the adapter does to one weight: names of its own tensors by role."""

    module: str
    parts: dict[str, str]  # A, B, magnitude
    embedding: bool = False
    scale: float = 1.0
    transposed: bool = False  # the weight is stored (inputs, outputs)
    a: Float32 | None = None
    b: Float32 | None = None
    magnitude: Float32 | None = None

    def apply(self, values: Float32, start: int, stop: int) -> Float32:
        """Rows start:stop of the weight with the change merged in."""
        if self.a is None or self.b is None:
            return values
        if self.transposed:
            change = self.a[:, start:stop].T @ self.b.T
        else:
            change = self.b[start:stop] @ self.a
        change *= np.float32(self.scale)
        change += values
        if self.magnitude is not None:
            norms = np.linalg.norm(change, axis=1, keepdims=True)
            with np.errstate(divide="ignore", invalid="ignore"):  # shows as NaN, and is refused
                change *= self.magnitude[start:stop, None] / norms
        return change


class AdapterSource:
    """`base` with an adapter merged in; see `source.Source` for the methods.

    Raises CorruptFile or UnsupportedModel when the adapter does not fit; both are closed then.
    """

    def __init__(self, base: Source, files: Mapping[str, Path]) -> None:
        self.base = base
        self._file: SafetensorsFile | None = None
        try:
            config = read_adapter(read_json_object(ADAPTER_CONFIG, files[ADAPTER_CONFIG]))
            self._file = SafetensorsFile(ADAPTER_WEIGHTS, files[ADAPTER_WEIGHTS])
            self._changes, self._replaced, self._biases = _plan(base, self._file, config)
        except BaseException:
            self.close()
            raise
        self._current: _Change | None = None
        self.tensors = {
            name: replace(info, place=None) if self._is_changed(name) else info
            for name, info in base.tensors.items()
        }

    @property
    def format(self) -> SourceFormat:
        """The base model's."""
        return self.base.format

    @property
    def config(self) -> dict[str, Any]:
        """The base model's."""
        return self.base.config

    @property
    def files(self) -> Mapping[str, Path]:
        """The base model's."""
        return self.base.files

    @property
    def quantization(self) -> str:
        """The base model's."""
        return self.base.quantization

    @property
    def total_bytes(self) -> int:
        """Bytes of the base model's weights."""
        return self.base.total_bytes

    def read(self, name: str) -> Float32:
        """A whole tensor as float32."""
        return read_whole(self, name)

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop as float32, merged."""
        if name in self._replaced:
            return self._rows(self._replaced[name], start, stop)
        values = self.base.read_rows(name, start, stop)
        if name in self._biases:
            part, scale = self._biases[name]
            return values + np.float32(scale) * self._rows(part, start, stop)
        change = self._changes.get(name)
        if change is None:
            return values
        if change is not self._current:
            self._load(change)
        return change.apply(values, start, stop)

    def block_layout(self, name: str) -> BlockLayout | None:
        """The base model's; None for a tensor that the adapter changes."""
        return None if self._is_changed(name) else self.base.block_layout(name)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        """The base model's; None for a tensor that the adapter changes."""
        return None if self._is_changed(name) else self.base.blocks(name, start, stop)

    def close(self) -> None:
        """Close the base model and the adapter; idempotent."""
        self.base.close()
        if self._file is not None:
            self._file.close()

    def _is_changed(self, name: str) -> bool:
        return name in self._changes or name in self._replaced or name in self._biases

    def _load(self, change: _Change) -> None:
        """Read the matrices of one change, and forget those of the one before."""
        if self._current is not None:
            self._current.a = self._current.b = self._current.magnitude = None
        self._current = change
        change.a, change.b = self._whole(change.parts["A"]), self._whole(change.parts["B"])
        if "magnitude" in change.parts:
            change.magnitude = self._whole(change.parts["magnitude"]).ravel()

    def _whole(self, part: str) -> Float32:
        shape = self._adapter.tensors[part].shape
        return self._rows(part, 0, shape[0] if shape else 1)

    def _rows(self, part: str, start: int, stop: int) -> Float32:
        return self._adapter.read_rows(part, start, stop)

    @property
    def _adapter(self) -> SafetensorsFile:
        if self._file is None:
            raise CorruptFile(f"{ADAPTER_WEIGHTS} is not open")
        return self._file


def without_adapter(source: Source) -> Source:
    """The model that an adapter is merged into, or `source` itself."""
    return source.base if isinstance(source, AdapterSource) else source


_Plan = tuple[dict[str, _Change], dict[str, str], dict[str, tuple[str, float]]]


def _plan(base: Source, file: SafetensorsFile, config: AdapterConfig) -> _Plan:
    """(weight → change, tensor → replacement, bias → (addition, scale)), all checked."""
    changes: dict[str, _Change] = {}
    replaced: dict[str, str] = {}
    biases: dict[str, tuple[str, float]] = {}
    for name in file.tensors:
        plain = name.removeprefix(_PREFIX)
        match = _PART.fullmatch(plain)
        if match is None:
            target = _whole_target(plain)
            _require(base, target, name)
            _same_shape(base, target, file, name)
            replaced[target] = name
            continue
        module = match["module"]
        if match["bias"]:
            _require(base, f"{module}.bias", name)
            _same_shape(base, f"{module}.bias", file, name)
            biases[f"{module}.bias"] = (name, config.scale_of(module))
            continue
        _require(base, f"{module}.weight", name)
        change = changes.setdefault(f"{module}.weight", _Change(module, {}))
        change.embedding |= match["embedding"] is not None
        change.parts[match["linear"] or match["embedding"] or "magnitude"] = name
    if not changes and not replaced:
        raise CorruptFile(f"{ADAPTER_WEIGHTS} changes nothing; it is empty")
    for target, change in changes.items():
        _check_change(base, target, change, file, config)
    return changes, replaced, biases


def _check_change(
    base: Source, target: str, change: _Change, file: SafetensorsFile, config: AdapterConfig
) -> None:
    """Settle scale and orientation. Raises CorruptFile when the parts do not fit the weight."""
    shape = base.tensors[target].shape
    missing = {"A", "B"} - set(change.parts)
    if missing:
        raise CorruptFile(
            f"the adapter has no lora_{min(missing)} for {change.module[:200]}; save it again"
        )
    a, b = (file.tensors[change.parts[part]].shape for part in ("A", "B"))
    rank = config.rank_of(change.module)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise CorruptFile(
            f"the adapter's matrices for {change.module[:200]} are {list(a)} and {list(b)}, where "
            f"its config says rank {rank}; save it again"
        )
    outputs_first, inputs_first = (b[0], a[1]), (a[1], b[0])
    flipped = change.embedding or config.fan_in_fan_out
    change.transposed = flipped and shape == inputs_first
    if shape != (inputs_first if change.transposed else outputs_first):
        raise CorruptFile(
            f"the adapter changes {change.module[:200]} as a matrix of {list(outputs_first)} where "
            f"the base model has {list(shape)}; it was made for another model"
        )
    change.scale = config.scale_of(change.module)
    if config.dora != ("magnitude" in change.parts):
        raise CorruptFile(
            f"the adapter's config and its tensors disagree on DoRA for {change.module[:200]}"
        )
    if config.dora:
        magnitude = file.tensors[change.parts["magnitude"]]
        if change.transposed or magnitude.elements != shape[0]:
            raise CorruptFile(
                f"the adapter's lora_magnitude_vector does not fit {change.module[:200]}; merge it "
                "with PEFT (merge_and_unload) and pull the folder that saves"
            )


def _whole_target(plain: str) -> str:
    """The tensor that a whole one replaces."""
    match = _WHOLE.fullmatch(plain)
    return f"{match['module']}.{match['what']}" if match else plain


def _require(base: Source, target: str, name: str) -> None:
    if target not in base.tensors:
        raise CorruptFile(
            f"the adapter changes {target[:200]}, which the base model does not have (its tensor "
            f"{name[:200]}); pull it with the model it was trained on",
            tensor=name,
        )


def _same_shape(base: Source, target: str, file: SafetensorsFile, name: str) -> None:
    wanted, found = base.tensors[target].shape, file.tensors[name].shape
    if wanted != found:
        raise CorruptFile(
            f"the adapter's tensor {name[:200]} has shape {list(found)} where the base model has "
            f"{list(wanted)}; it was made for another model",
            tensor=name,
        )
