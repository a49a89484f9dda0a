"""A linear layer stored as integer codes with a scale and a zero point for each group of weights.

The weight of row n and column k, whose group is g, is

    scales[n, g] * (codes[n, k] - zeros[n, g])

which GPTQ, AWQ and compressed-tensors all store, each in its own packing. With the columns sorted
by group this is what MatMulNBits computes from, so the codes, scales and zero points go into a
graph as they are. Not for use by several threads at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile

from .source import BlockLayout, Bytes, Float32, QuantizedBlocks

_BLOCK_SIZES = (256, 128, 64, 32, 16)  # MatMulNBits'


class StoredMatrix(Protocol):
    """A weight matrix made of several stored tensors. Rows are outputs."""

    @property
    def name(self) -> str:
        """The weight that a family knows it as."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    @property
    def dtype(self) -> str:
        """How it is stored, for people."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The stored tensors it takes the place of."""
        ...

    def read_rows(self, start: int, stop: int) -> Float32:
        """The weights, (stop - start, columns)."""
        ...

    def layout(self) -> BlockLayout | None:
        """The layout `blocks` gives, None when it is not made of blocks."""
        ...

    def blocks(self, start: int, stop: int) -> QuantizedBlocks | None:
        """The codes and scales as stored, or None."""
        ...

    def release(self) -> None:
        """Let go of what was read; it is read again when needed."""
        ...


@dataclass(slots=True)
class Groups:
    """Scales and zero points of a matrix: (N, G) each; `of_column` names each column's group."""

    scales: Float32
    zeros: NDArray[np.int32]
    of_column: NDArray[np.int64]  # (K,)

    def check(self, name: str, rows: int, columns: int) -> None:
        """Raise CorruptFile when the parts of `name` do not fit each other."""
        count = self.scales.shape[-1]
        fits = self.scales.shape == self.zeros.shape == (rows, count)
        fits = fits and self.of_column.shape == (columns,) and count > 0
        if not fits or self.of_column.min() < 0 or self.of_column.max() >= count:
            raise CorruptFile(
                f"the codes, scales and zero points of {name} do not fit each other; "
                "pull the model again",
                tensor=name,
            )


@dataclass(slots=True)
class IntegerMatrix:
    """See `StoredMatrix` for the methods.

    `packed(start, stop)` gives rows of codes, (R, K * bits / 8), low bits first; `groups()` reads
    scales and zero points. Both are called only when their result is needed.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    dtype: str
    parts: tuple[str, ...]
    packed: Callable[[int, int], Bytes]
    groups: Callable[[], Groups]
    forget: Callable[[], None] = lambda: None
    _read: Groups | None = field(default=None, repr=False)
    _layout: tuple[BlockLayout | None] | None = field(default=None, repr=False)
    _order: NDArray[np.int64] | None = field(default=None, repr=False)

    def read_rows(self, start: int, stop: int) -> Float32:
        """scales * (codes - zeros), in the columns' own order."""
        groups = self._groups()
        codes = unpack(self.packed(start, stop), self.bits)[:, : self.shape[1]]
        zeros = groups.zeros[start:stop].astype(np.float32)
        scales = groups.scales[start:stop]
        values = codes.astype(np.float32)
        if self.layout() is not None and self._order is None:  # groups are equal parts of a row
            parts = values.reshape(stop - start, zeros.shape[1], -1)
            parts -= zeros[..., None]
            parts *= scales[..., None]
        else:
            values -= np.take(zeros, groups.of_column, axis=1)
            values *= np.take(scales, groups.of_column, axis=1)
        return values

    def layout(self) -> BlockLayout | None:
        """None when groups have different sizes, or sizes that no block divides.

        Columns that are not sorted by group (GPTQ's act-order) give a layout with the order in
        which the inputs have to come.
        """
        if self._layout is None:
            self._layout = (self._find_layout(),)
        return self._layout[0]

    def blocks(self, start: int, stop: int) -> QuantizedBlocks | None:
        """The codes as stored; scales are repeated where a group has several blocks."""
        layout = self.layout()
        if layout is None:
            return None
        groups = self._groups()
        packed = self.packed(start, stop)
        if self._order is not None:
            packed = pack(unpack(packed, self.bits)[:, self._order], self.bits)
        count = self.shape[1] // layout.block_size
        repeat = count // groups.scales.shape[1]
        scales = groups.scales[start:stop]
        correction = None
        if layout.has_correction:
            middle = np.float32(1 << (self.bits - 1))
            correction = (middle - groups.zeros[start:stop].astype(np.float32)) * scales
            correction = np.repeat(correction, repeat, axis=1)
        return QuantizedBlocks(
            bits=self.bits,
            block_size=layout.block_size,
            codes=packed.reshape(stop - start, count, layout.block_size * self.bits // 8),
            scales=np.repeat(scales, repeat, axis=1),
            correction=correction,
        )

    def release(self) -> None:
        """Forget codes, scales and zero points; the layout stays."""
        self._read = None
        self.forget()

    def _groups(self) -> Groups:
        if self._read is None:
            groups = self.groups()
            groups.check(self.name, *self.shape)
            self._read = groups
        return self._read

    def _find_layout(self) -> BlockLayout | None:
        groups = self._groups()
        columns, count = self.shape[1], groups.scales.shape[1]
        sizes = np.bincount(groups.of_column, minlength=count)
        size = columns // count
        block = next((block for block in _BLOCK_SIZES if size % block == 0), 0)
        if not block or (sizes != size).any():
            return None
        order: tuple[int, ...] = ()
        if (np.diff(groups.of_column) < 0).any():
            self._order = np.argsort(groups.of_column, kind="stable")
            order = tuple(self._order.tolist())
        has_correction = bool((groups.zeros != 1 << (self.bits - 1)).any())
        return BlockLayout(self.bits, block, has_correction, order)


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Rows of bytes → rows of codes, low bits first."""
    if bits == 8:
        return packed
    codes = np.empty((len(packed), packed.shape[1] * 2), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes


def pack(codes: Bytes, bits: int) -> Bytes:
    """Inverse of `unpack`, for an even number of columns."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    packed: Bytes = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed


def in_order(columns: int, count: int, group: int = 0) -> NDArray[np.int64]:
    """The group of each column when `count` groups of `group` (0 = equal shares) follow each other.

    All -1, which no matrix accepts, when they do not fill the columns.
    """
    if not group or -(-columns // group) != count:
        group = columns // max(count, 1)
        if group * count != columns:
            return np.full(columns, -1, np.int64)
    return np.arange(columns, dtype=np.int64) // group


def companions(name: str, suffixes: Mapping[str, bool], found: Mapping[str, Any]) -> dict[str, str]:
    """The tensors beside `name` (a prefix): suffix → full name, for those that exist.

    `suffixes` says which must. Raises CorruptFile naming one that is missing.
    """
    present = {suffix: f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in found}
    for suffix, needed in suffixes.items():
        if needed and suffix not in present:
            raise CorruptFile(
                f"the quantised layer {name[:200]} has no {suffix}; pull the model again",
                tensor=name,
            )
    return present
