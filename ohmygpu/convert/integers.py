"""Weight matrices as 8-bit integers with one scale per output channel, for integer products."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.hardware import logical_cores

from .hadamard import spread_rows
from .source import Source, row_chunks

Float32 = NDArray[np.float32]

_MAX_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix (K, N), each column one output: codes of int8, or uint8 with 128 for zero."""

    codes: NDArray[np.int8] | NDArray[np.uint8]
    scales: Float32  # (N,)


class IntegerReader:
    """Reads matrices of `source` as integers, on all cores. Use as a context manager."""

    def __init__(self, source: Source, dtype: np.dtype[Any]) -> None:
        self._source = source
        self.dtype = dtype
        workers = min(logical_cores(), _MAX_WORKERS)
        self._pool = ThreadPoolExecutor(workers, "integers")
        self._ahead = workers + 1  # pieces in flight: bounds the memory

    def __enter__(self) -> IntegerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, names: Sequence[str], block: int) -> Integers:
        """The matrices `names`, (N, K) each, stacked by rows and rounded.

        Every `block` columns are multiplied by the Hadamard matrix before; 0 = none are.
        """
        shapes = [self._source.tensors[name].shape for name in names]
        count, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        found = Integers(np.empty((columns, count), self.dtype), np.empty(count, np.float32))

        def take(rows: Float32, place: slice) -> None:
            spread = spread_rows(rows, block) if block else rows
            _round(spread, found.codes[:, place], found.scales[place])

        pending: deque[Future[None]] = deque()
        for piece in self._pieces(names):
            pending.append(self._pool.submit(take, *piece))
            if len(pending) > self._ahead:
                pending.popleft().result()
        for job in pending:
            job.result()
        return found

    def _pieces(self, names: Sequence[str]) -> Iterator[tuple[Float32, slice]]:
        first = 0
        for name in names:
            rows, columns = self._source.tensors[name].shape
            for start, stop in row_chunks(rows, columns):
                yield self._source.read_rows(name, start, stop), slice(first + start, first + stop)
            first += rows


def _round(rows: Float32, codes: NDArray[np.int8] | NDArray[np.uint8], scales: Float32) -> None:
    """Fill codes (K, n) and scales (n,) with the rows (n, K)."""
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    np.divide(largest, np.float32(127), out=scales)
    inverse = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), 0)
    work = rows * inverse.astype(np.float32)[:, None]
    np.rint(work, out=work)
    if codes.dtype == np.uint8:
        work += np.float32(128)
    codes[...] = work.astype(codes.dtype).T
