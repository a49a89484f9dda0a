"""A GGUF model as a Source: Hugging Face names and config, weights row by row."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from .family import check_gguf_architecture
from .gguf import GgufModel
from .gguf_blocks import BLOCK_TYPES, BlockType, dequantize, repack
from .gguf_names import Translation
from .safetensors import to_float32
from .source import (
    BlockLayout,
    Bytes,
    Float32,
    QuantizedBlocks,
    SourceFormat,
    TensorInfo,
    row_chunks,
)


class Architecture(Protocol):
    """What a module `gguf_<architecture>` provides."""

    def translate(self, model: GgufModel) -> Translation:
        """Raises CorruptFile or UnsupportedModel."""
        ...


# general.file_type (llama_ftype in llama.h), for show
_FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1"}
_FILE_TYPES |= {10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M"}
_FILE_TYPES |= {16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 21: "Q2_K_S", 25: "IQ4_NL", 30: "IQ4_XS"}
_FILE_TYPES |= {32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4"}


class GgufSource:
    """Source over one GGUF model; see `source.Source` for its methods."""

    format: SourceFormat = "gguf"

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self.model = GgufModel(files)
        try:
            translation = _translate(self.model)
        except BaseException:
            self.model.close()
            raise
        self.config = translation.config
        if isinstance(license_name := self.model.metadata.get("general.license"), str):
            self.config["license"] = license_name
        self._placements = translation.placements
        self._stored = self.model.tensors
        self.tensors: dict[str, TensorInfo] = {
            name: TensorInfo(name, placement.shape, self._stored[placement.gguf_name].type_name)
            for name, placement in self._placements.items()
        }
        self.quantization = _quantization(self.model)
        used = {placement.gguf_name for placement in self._placements.values()}
        self.total_bytes = sum(self._stored[name].nbytes for name in used)

    def read(self, name: str) -> Float32:
        """A whole tensor as float32."""
        shape = self._placements[name].shape
        if len(shape) == 1:
            return self.read_rows(name, 0, shape[0])
        values = np.empty((prod(shape[:-1]), shape[-1]), dtype=np.float32)
        for start, stop in row_chunks(*values.shape):
            values[start:stop] = self._decode(name, start, stop)
        return values.reshape(shape)

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop as float32."""
        shape = self._placements[name].shape
        if start == stop:
            return np.empty((0, *shape[1:]), dtype=np.float32)
        if self._is_row_of_matrix(name):
            return self._decode(name, 0, 1).reshape(-1)[start:stop]
        inner = prod(shape[1:-1])  # 1 for vectors and matrices
        rows = self._decode(name, start * inner, stop * inner)
        return rows.reshape(stop - start, *shape[1:])

    def block_layout(self, name: str) -> BlockLayout | None:
        """The layout `blocks` gives, or None for plain types."""
        block = self._block_type(name)
        return block.layout if block else None

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        """Rows start:stop as stored, losslessly, or None for plain types."""
        block = self._block_type(name)
        if block is None:
            return None
        shape = self._placements[name].shape
        stop = prod(shape[:-1]) if stop is None else stop
        columns = shape[-1]
        groups = columns // block.group
        codes = np.empty((stop - start, groups, block.group * block.bits // 8), dtype=np.uint8)
        scales = np.empty((stop - start, groups), dtype=np.float32)
        correction = np.empty_like(scales) if block.has_minima else None
        for first, last in row_chunks(stop - start, columns):
            part = repack(block, self._raw(name, start + first, start + last))
            codes[first:last] = part.codes
            scales[first:last] = part.scales
            if correction is not None and part.correction is not None:
                correction[first:last] = part.correction
        return QuantizedBlocks(block.bits, block.group, codes, scales, correction)

    def close(self) -> None:
        """Close the files; idempotent."""
        self.model.close()

    def _block_type(self, name: str) -> BlockType | None:
        """The block type of a matrix; None for plain types and for vectors."""
        info = self.tensors[name]
        return BLOCK_TYPES.get(info.dtype) if len(info.shape) > 1 else None

    def _is_row_of_matrix(self, name: str) -> bool:
        placement = self._placements[name]
        return len(placement.shape) == 1 < len(self._stored[placement.gguf_name].shape)

    def _raw(self, name: str, start: int, stop: int) -> Bytes:
        """Raw rows start:stop in Hugging Face order."""
        placement = self._placements[name]
        first = placement.first_row
        if placement.rows is None:
            return self.model.read_rows(placement.gguf_name, first + start, first + stop)
        wanted = placement.rows[start:stop] + first
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low <= 2 * len(wanted):
            return self.model.read_rows(placement.gguf_name, low, high)[wanted - low]
        # Rows from all over the tensor: read its runs, not everything between them.
        starts = np.flatnonzero(np.diff(wanted, prepend=wanted[0] - 2) != 1)
        runs = np.split(wanted, starts[1:])
        return np.concatenate(
            [
                self.model.read_rows(placement.gguf_name, int(run[0]), int(run[-1]) + 1)
                for run in runs
            ]
        )

    def _decode(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop of the stored tensor that `name` is, (stop - start, K) float32."""
        placement = self._placements[name]
        type_name = self._stored[placement.gguf_name].type_name
        raw = self._raw(name, start, stop)
        block = BLOCK_TYPES.get(type_name)
        values = dequantize(block, raw) if block is not None else to_float32(raw, type_name)
        return values + np.float32(placement.shift) if placement.shift else values


def _translate(model: GgufModel) -> Translation:
    architecture = model.metadata.get("general.architecture")
    module = check_gguf_architecture(architecture, model.name)
    translator: Architecture = importlib.import_module(f".{module}", __package__)
    return translator.translate(model)


def _quantization(model: GgufModel) -> str:
    file_type = model.metadata.get("general.file_type")
    if isinstance(file_type, int) and file_type in _FILE_TYPES:
        return _FILE_TYPES[file_type]
    weights: Counter[str] = Counter()
    for tensor in model.tensors.values():
        weights[tensor.type_name] += tensor.nbytes
    return weights.most_common(1)[0][0] if weights else "F32"
