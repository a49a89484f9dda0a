"""A Source that lives in memory: config and arrays made by a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ohmygpu.convert.source import (
    BlockLayout,
    Float32,
    QuantizedBlocks,
    SourceFormat,
    TensorInfo,
)


class MemorySource:
    """`arrays` by Hugging Face name; matrices in `blocked` are stored in blocks."""

    def __init__(
        self,
        config: Mapping[str, Any],
        arrays: Mapping[str, Float32],
        blocked: Mapping[str, QuantizedBlocks] | None = None,
    ) -> None:
        self.blocked = dict(blocked or {})
        self.arrays = {**arrays, **{name: b.dequantize() for name, b in self.blocked.items()}}
        self.config = dict(config)
        self.format: SourceFormat = "gguf" if blocked else "safetensors"
        self.quantization = "F32"
        self.files: dict[str, Path] = {}
        self.tensors = {
            name: TensorInfo(name, array.shape, "F32") for name, array in self.arrays.items()
        }
        self.total_bytes = sum(array.nbytes for array in self.arrays.values())

    def read(self, name: str) -> Float32:
        return self.arrays[name]

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        return self.arrays[name][start:stop]

    def block_layout(self, name: str) -> BlockLayout | None:
        blocks = self.blocked.get(name)
        if blocks is None:
            return None
        return BlockLayout(blocks.bits, blocks.block_size, blocks.correction is not None)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        blocks = self.blocked.get(name)
        if blocks is None:
            return None
        correction = None if blocks.correction is None else blocks.correction[start:stop]
        return QuantizedBlocks(
            blocks.bits,
            blocks.block_size,
            blocks.codes[start:stop],
            blocks.scales[start:stop],
            correction,
        )

    def close(self) -> None:
        pass


def random_blocks(
    rng: np.random.Generator, shape: tuple[int, int], bits: int, group: int, correction: bool
) -> QuantizedBlocks:
    """Random blocks whose weights are about 1 / sqrt(K) large."""
    rows, columns = shape
    groups = columns // group
    size = 1.5 / np.sqrt(columns)
    step = size / 2 ** (bits - 2)
    scales = rng.uniform(0.5, 1.5, (rows, groups)) * step * rng.choice([-1, 1], (rows, groups))
    minimums = rng.normal(0, size / 2, (rows, groups)).astype(np.float32)
    return QuantizedBlocks(
        bits,
        group,
        rng.integers(0, 256, (rows, groups, group * bits // 8), dtype=np.uint8),
        scales.astype(np.float32),
        minimums if correction else None,
    )
