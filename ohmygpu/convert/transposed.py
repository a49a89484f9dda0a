"""Linear layers that files store as (in, out), seen as (out, in)."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from .source import BlockLayout, Float32, QuantizedBlocks, Source, TensorInfo
from .views import View, ViewedSource


class TransposedSource(ViewedSource):
    """`source` with the matrices `names` turned round.

    Rows of the result are columns of the file, so the last matrix read is kept, whole: the memory
    needed is that of the largest one. Blocks run along the file's rows and cannot be turned with
    them: such weights are given as floats.
    """

    def __init__(self, source: Source, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._kept_name = ""
        self._kept: Float32 = np.empty((0, 0), np.float32)
        super().__init__(source, {name: View(name) for name in source.tensors})

    def read(self, name: str) -> Float32:
        """A whole tensor as float32."""
        if name not in self._names:
            return super().read(name)
        if name != self._kept_name:
            self._kept_name, self._kept = "", np.empty((0, 0), np.float32)  # free it first
            self._kept = np.ascontiguousarray(super().read(name).T)
            self._kept_name = name
        return self._kept

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop as float32."""
        if name not in self._names:
            return super().read_rows(name, start, stop)
        return self.read(name)[start:stop]

    def block_layout(self, name: str) -> BlockLayout | None:
        """The layout of the source's tensor, None for one that is turned round."""
        return None if name in self._names else super().block_layout(name)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        """Rows start:stop as stored, losslessly, or None."""
        return None if name in self._names else super().blocks(name, start, stop)

    def _info(self, name: str, view: View) -> TensorInfo:
        info = super()._info(name, view)
        return TensorInfo(name, info.shape[::-1], info.dtype) if name in self._names else info
