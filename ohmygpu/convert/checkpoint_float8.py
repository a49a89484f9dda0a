"""Linear layers stored in 8-bit floats with scales: per tensor, per row or per block.

    weight            (N, K)                     F8_E4M3 or F8_E5M2
    weight_scale_inv  1, (N, 1) or (N / b, K / c)  or weight_scale

The weight is code * scale in float32, as transformers computes it (`scale_inv` is the inverse of
what the quantiser multiplied by, so it too is a factor). Scales of the inputs say how to round
activations to 8 bits when computing in 8-bit floats; products with unrounded activations are
closer to the original model, so they are left out, as are scales of the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile

from .checkpoint import Checkpoint
from .safetensors import SafetensorsSource
from .source import BlockLayout, Float32, QuantizedBlocks

SCALE_SUFFIXES = ("weight_scale_inv", "weight_scale")
ACTIVATION_SUFFIXES = (
    ".input_scale",
    ".activation_scale",
    ".input_zero_point",
    ".output_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
)


@dataclass(slots=True)
class FloatMatrix:
    """See `checkpoint_integers.StoredMatrix` for the methods."""

    source: SafetensorsSource
    name: str
    shape: tuple[int, int]
    dtype: str
    parts: tuple[str, ...]
    scale: str
    scale_shape: tuple[int, int]  # one scale for each block of the matrix
    block: tuple[int, int]  # rows and columns of a block
    _factors: Float32 | None = field(default=None, repr=False)

    def read_rows(self, start: int, stop: int) -> Float32:
        """code * scale."""
        if self._factors is None:
            self._factors = _read_scales(self.source, self.scale).reshape(self.scale_shape)
        values = self.source.read_rows(self.name, start, stop)
        rows = np.arange(start, stop) // self.block[0]
        columns = np.arange(self.shape[1]) // self.block[1]
        values *= np.take(self._factors[rows], columns, axis=1)
        return values

    def layout(self) -> BlockLayout | None:
        """None: codes are floats."""
        return None

    def blocks(self, start: int, stop: int) -> QuantizedBlocks | None:
        """None: codes are floats."""
        return None

    def release(self) -> None:
        """Forget the scales."""
        self._factors = None


def float8_matrices(source: SafetensorsSource, checkpoint: Checkpoint) -> list[FloatMatrix]:
    """The layers that have a scale beside their weight."""
    found = []
    for name in source.tensors:
        prefix, _, last = name.rpartition(".")
        scales = [f"{prefix}.{suffix}" for suffix in SCALE_SUFFIXES]
        scale = next((scale for scale in scales if scale in source.tensors), None)
        if last == "weight" and scale is not None:
            found.append(float8_matrix(source, name, scale, checkpoint))
    return found


def float8_matrix(
    source: SafetensorsSource, name: str, scale: str, checkpoint: Checkpoint
) -> FloatMatrix:
    """One layer. Raises CorruptFile when its scales do not fit its weights."""
    info = source.tensors[name]
    grid = tuple(size for size in source.tensors[scale].shape) or (1,)
    if len(info.shape) != 2 or 0 in info.shape or not info.dtype.startswith("F8_E"):
        raise CorruptFile(
            f"{name} is {info.dtype} {list(info.shape)}, where 8-bit floats in rows and columns "
            "are needed; pull the model again",
            tensor=name,
        )
    rows, columns = info.shape
    if grid in ((1,), (1, 1)):
        grid, block = (1, 1), (rows, columns)
    elif grid in ((rows,), (rows, 1)):
        grid, block = (rows, 1), (1, columns)
    else:
        block = checkpoint.block_shape or (0, 0)
        if not all(block) or grid != (-(-rows // block[0]), -(-columns // block[1])):
            raise CorruptFile(
                f"{scale} has shape {list(grid)}, which does not fit a weight of {list(info.shape)}"
                "; pull the model again",
                tensor=scale,
            )
    return FloatMatrix(
        source=source,
        name=name,
        shape=(rows, columns),
        dtype=info.dtype,
        parts=(name, scale),
        scale=scale,
        scale_shape=(grid[0], grid[1]),
        block=block,
    )


def _read_scales(source: SafetensorsSource, name: str) -> Float32:
    """Factors; stored as floats, or as the bytes of powers of two (e8m0)."""
    values: NDArray[np.float32] = source.read(name)
    if source.tensors[name].dtype == "U8":
        values = np.exp2(values - np.float32(127))
    return values
