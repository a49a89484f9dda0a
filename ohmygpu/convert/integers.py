"""Weight matrices as 8-bit integers with one scale per output channel, for integer products."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.hardware import logical_cores

from .rotation import Rotation, hadamard_rows
from .source import Source, row_chunks

Float32 = NDArray[np.float32]

_MAX_WORKERS = 8


@dataclass(frozen=True, slots=True)
class Change:
    """What is folded into a matrix W (N, K) before it is rounded: Qᵀ W diag(scale) Q or W H.

    `reads` is the Q that W's input has, after its norm's weight `scale` was taken out; `writes` the
    Q that its output gets; `block` the size of the Hadamard matrices H that its input is multiplied
    by, 0 = none.
    """

    reads: Rotation | None = None
    scale: Float32 | None = None
    writes: Rotation | None = None
    block: int = 0

    def of_rows(self, rows: Float32) -> Float32:
        """The part that acts on each row of W."""
        if self.scale is not None:
            rows = rows * self.scale
        if self.reads is not None:
            rows = self.reads.rows(rows)
        return hadamard_rows(rows, self.block) if self.block else rows


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

    def read(self, names: Sequence[str], change: Change) -> Integers:
        """The matrices `names`, (N, K) each, stacked by rows, changed and rounded."""
        shapes = [self._source.tensors[name].shape for name in names]
        count, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        found = Integers(np.empty((columns, count), self.dtype), np.empty(count, np.float32))
        whole = None if change.writes is None else np.empty((count, columns), np.float32)

        def take(rows: Float32, place: slice) -> None:
            changed = change.of_rows(rows)
            if whole is None:
                _round(changed, found.codes[:, place], found.scales[place])
            else:
                whole[place] = changed

        self._run(take, self._pieces(names))
        if whole is not None and change.writes is not None:
            self._turn_columns(whole, change.writes)
            self._run(
                lambda rows, place: _round(rows, found.codes[:, place], found.scales[place]),
                (
                    (whole[start:stop], slice(start, stop))
                    for start, stop in row_chunks(*whole.shape)
                ),
            )
        return found

    def _pieces(self, names: Sequence[str]) -> Iterator[tuple[Float32, slice]]:
        first = 0
        for name in names:
            rows, columns = self._source.tensors[name].shape
            for start, stop in row_chunks(rows, columns):
                yield self._source.read_rows(name, start, stop), slice(first + start, first + stop)
            first += rows

    def _turn_columns(self, whole: Float32, rotation: Rotation) -> None:
        """Replace W by Qᵀ W."""

        def turn(place: slice, _: None) -> None:
            whole[:, place] = rotation.rows(np.ascontiguousarray(whole[:, place].T)).T

        chunks = row_chunks(whole.shape[1], whole.shape[0])
        self._run(turn, ((slice(start, stop), None) for start, stop in chunks))

    def _run(self, work: Callable[[Any, Any], None], arguments: Iterable[tuple[Any, Any]]) -> None:
        pending: deque[Future[None]] = deque()
        for pair in arguments:
            pending.append(self._pool.submit(work, *pair))
            if len(pending) > self._ahead:
                pending.popleft().result()
        for job in pending:
            job.result()


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
