"""Experts as gpt-oss stores them: MXFP4 (OCP Microscaling Formats 1.0), a tensor for all of them.

E experts, N outputs, K inputs in blocks of 32:

    <name>_blocks  (E, N, K / 32, 16)  two E2M1 floats in a byte, low bits first
    <name>_scales  (E, N, K / 32)      E8M0: the byte b stands for 2 ** (b - 127)

Twice an E2M1 float is an integer of -12 … 12, so 8-bit codes with half the scale hold the weights
as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ohmygpu.core.errors import CorruptFile

from .checkpoint import Checkpoint
from .safetensors import SafetensorsSource
from .source import BlockLayout, Bytes, Float32, QuantizedBlocks

_BLOCK = 32
_BIAS = 127  # of the exponent in a scale
_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_CODES = (np.array(_DOUBLED, np.int16) + np.int16(128)).astype(np.uint8)
_NOT_A_NUMBER = 255  # as a scale


class _Stored:
    """The two tensors of one projection; the last expert read is kept until released."""

    def __init__(self, source: SafetensorsSource, name: str) -> None:
        self.name = name
        self.parts = (f"{name}_blocks", f"{name}_scales")
        self._source = source
        self._expert = -1
        self._read: tuple[Bytes, Bytes] | None = None
        shapes = [
            source.tensors[part].shape if part in source.tensors else () for part in self.parts
        ]
        dtypes = {source.tensors[part].dtype for part in self.parts if part in source.tensors}
        blocks, scales = shapes
        if len(blocks) != 4 or blocks[:3] != scales or blocks[3] * 2 != _BLOCK or dtypes != {"U8"}:
            raise CorruptFile(
                f"blocks and scales of {name[:200]} do not fit each other; pull the model again",
                tensor=name,
            )
        self.experts, self.rows, self.groups, _ = blocks

    def expert(self, number: int) -> tuple[Bytes, Bytes]:
        """(blocks (N, K / 32, 16), scales (N, K / 32)) of one expert."""
        if self._read is None or number != self._expert:
            blocks, scales = (
                self._source.read_stored(p, number, number + 1)[0] for p in self.parts
            )
            if (scales == _NOT_A_NUMBER).any():
                raise CorruptFile(f"{self.parts[1]} holds NaN", tensor=self.parts[1])
            self._read, self._expert = (blocks, scales), number
        return self._read

    def release(self) -> None:
        """Forget the expert."""
        self._read = None


class Mxfp4Matrix:
    """One expert's projection; see `checkpoint_integers.StoredMatrix` for the methods."""

    dtype = "MXFP4"

    def __init__(self, stored: _Stored, expert: int) -> None:
        prefix, _, kind = stored.name.rpartition(".")
        self.name = f"{prefix}.{expert}.{kind}.weight"
        self.shape = (stored.rows, stored.groups * _BLOCK)
        self.parts = stored.parts
        self._stored = stored
        self._expert = expert

    def read_rows(self, start: int, stop: int) -> Float32:
        """The weights, (stop - start, columns)."""
        return self.blocks(start, stop).dequantize()

    def layout(self) -> BlockLayout:
        """8 bits in blocks of 32."""
        return BlockLayout(8, _BLOCK, False)

    def blocks(self, start: int, stop: int) -> QuantizedBlocks:
        """The same weights as 8-bit codes."""
        packed, exponents = (part[start:stop] for part in self._stored.expert(self._expert))
        codes = np.empty((*packed.shape[:2], _BLOCK), np.uint8)
        codes[..., 0::2] = _CODES[packed & 0x0F]
        codes[..., 1::2] = _CODES[packed >> 4]
        scales = np.ldexp(np.float32(0.5), exponents.astype(np.int32) - _BIAS)
        return QuantizedBlocks(8, _BLOCK, codes, scales.astype(np.float32), None)

    def release(self) -> None:
        """Forget the expert's blocks."""
        self._stored.release()


def mxfp4_matrices(source: SafetensorsSource, _: Checkpoint) -> Sequence[Mxfp4Matrix]:
    """Every expert's projections, as `<prefix>.<expert>.<projection>.weight`.

    Raises CorruptFile when blocks and scales do not fit each other.
    """
    names = [name.removesuffix("_blocks") for name in source.tensors if name.endswith("_blocks")]
    stored = [_Stored(source, name) for name in names]
    return [Mxfp4Matrix(one, expert) for one in stored for expert in range(one.experts)]
