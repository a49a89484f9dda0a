"""From the source's tensors to the graph's constants, in the recipe's precision, a few rows at a
time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, InvalidRequest, UnsupportedModel
from ohmygpu.core.hardware import logical_cores

from .calibration import Calibration
from .graph import Graph
from .quantize import Quantized, quantize_rows
from .recipes import GROUP, Recipe, Target
from .source import Place, Source, TensorInfo, row_chunks

Float32 = NDArray[np.float32]

_STORED_AS = {"BF16": "bfloat16", "F16": "float16"}  # types that graphs can use as files hold them
_MAX_WORKERS = 8  # beyond that the disk is the limit

Progress = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes) of the source."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight matrix in the graph: (rows, columns), each row giving one output.

    `bits` 0 means one float per weight in `data`; otherwise `data` holds codes (rows, groups,
    group * bits / 8), `scales` (rows, groups), of asymmetric groups `zero_points` (rows, groups / 2
    rounded up) and, where the source's blocks have a minimum, `correction` (rows, groups), which is
    to be added to every weight of its group. Where there is an `input_order`, the columns are in
    that order, and the input has to be too.
    """

    rows: int
    columns: int
    bits: int
    group: int
    data: str
    scales: str = ""
    correction: str = ""
    input_order: tuple[int, ...] = ()
    zero_points: str = ""

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return -(-self.columns // self.group)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a matrix will be stored, known before it is read."""

    bits: int
    group: int = GROUP
    from_blocks: bool = False
    has_correction: bool = False
    input_order: tuple[int, ...] = ()
    asymmetric: bool = False
    place: Place | None = None  # where a file holds it just so: it is used in place, unless stacked


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of a quantised matrix."""

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    correction: NDArray[Any] | None = None
    zero_points: NDArray[np.uint8] | None = None


class Weights:
    """The source's tensors on their way into the graph, each written once.

    Raises CorruptFile for one that holds NaN or infinity.
    """

    def __init__(
        self,
        source: Source,
        graph: Graph,
        recipe: Recipe,
        target: Target,
        layers: int,
        progress: Progress,
        calibration: Calibration | None = None,
    ) -> None:
        self._calibration = calibration
        self.dtype = np.dtype(target.dtype)
        self._source = source
        self._graph = graph
        self._recipe = recipe
        self._layers = layers
        self._progress = progress
        self._matrices: dict[tuple[str, ...], Matrix] = {}
        self._elements = sum(info.elements for info in source.tensors.values()) or 1
        self._done_elements = 0
        workers = min(logical_cores(), _MAX_WORKERS)
        self._pool = ThreadPoolExecutor(workers, "quantise")
        self._ahead = workers + 1  # pieces in flight: bounds the memory

    def close(self) -> None:
        """Stop the helper threads."""
        self._pool.shutdown(cancel_futures=True)

    def vector(self, names: Sequence[str], label: str) -> str:
        """One-dimensional tensors, joined, as one float constant of the graph."""
        parts = [self._narrowed(name, self._source.read(name)) for name in names]
        for part in parts:
            self._advance(part.size)
        return self._graph.constant(label, np.concatenate(parts))

    def layout(self, name: str, *, head: bool = False) -> Layout:
        """How the recipe stores the matrix `name`."""
        recipe = self._recipe
        bits = recipe.head_bits if head else recipe.bits(name, self._layers)
        if bits is not None:
            group = recipe.group(bits, self.columns(name))
            place = self._place(self._source.tensors[name]) if not bits else None
            return Layout(bits, group, asymmetric=bits == 4, place=place)
        blocks = self._source.block_layout(name)
        if blocks is None:
            return Layout(0)
        return Layout(
            blocks.bits, blocks.block_size, True, blocks.has_correction, blocks.input_order
        )

    def matrix(
        self, names: Sequence[str], label: str, *, head: bool = False, layout: Layout | None = None
    ) -> Matrix:
        """Matrices with equal columns and layouts, stacked by rows; the same names are written
        once. `layout` is the recipe's unless given.
        """
        key = tuple(names)
        if key not in self._matrices:
            layout = layout or self.layout(names[0], head=head)
            write = self._write_quantised if layout.bits else self._write_floats
            self._matrices[key] = write(names, label, layout)
        return self._matrices[key]

    def floats(self, name: str, label: str) -> Matrix:
        """The matrix `name` unquantised, whatever the recipe says."""
        return self._write_floats([name], label, Layout(0))

    def columns(self, name: str) -> int:
        """Columns of the matrix `name`."""
        return self._shape([name])[1]

    def _write_floats(self, names: Sequence[str], label: str, layout: Layout) -> Matrix:
        rows, columns = self._shape(names)

        def parts() -> Iterator[NDArray[Any]]:
            for name, chunk in self._chunks(names):
                yield self._narrowed(name, chunk)

        place = layout.place if len(names) == 1 else None
        file = None if place is None else self._graph.share(place.path)
        if place is None or file is None:
            data = self._graph.weight(f"{label}.weight", self.dtype, (rows, columns), parts())
        else:
            for name, chunk in self._chunks(names):
                self._checked(name, chunk)
            data = self._graph.shared_weight(
                f"{label}.weight", self.dtype, (rows, columns), file, place.offset
            )
        return Matrix(rows, columns, 0, layout.group, data)

    def _write_quantised(self, names: Sequence[str], label: str, layout: Layout) -> Matrix:
        rows, columns = self._shape(names)
        groups = -(-columns // layout.group)
        scales: list[NDArray[Any]] = []
        corrections: list[NDArray[Any]] = []
        zero_points: list[NDArray[Any]] = []

        def codes() -> Iterator[NDArray[Any]]:
            pieces = self._block_pieces if layout.from_blocks else self._rounded_pieces
            for name, piece in pieces(names, layout):
                scales.append(self._checked(name, piece.scales))
                if piece.correction is not None:
                    corrections.append(self._checked(name, piece.correction))
                if piece.zero_points is not None:
                    zero_points.append(piece.zero_points)
                yield piece.codes

        shape = (rows, groups, layout.group * layout.bits // 8)
        data = self._graph.weight(f"{label}.weight_q{layout.bits}", np.uint8, shape, codes())
        small = (rows, groups)
        scale = self._graph.weight(f"{label}.scales", self.dtype, small, scales)
        correction = ""
        if corrections:
            correction = self._graph.weight(f"{label}.minimums", self.dtype, small, corrections)
        zeros = ""
        if zero_points:
            packed = (rows, -(-groups // 2))
            zeros = self._graph.weight(f"{label}.zero_points", np.uint8, packed, zero_points)
        return Matrix(
            rows,
            columns,
            layout.bits,
            layout.group,
            data,
            scale,
            correction,
            layout.input_order,
            zeros,
        )

    def _block_pieces(self, names: Sequence[str], _: Layout) -> Iterator[tuple[str, _Piece]]:
        """The source's own blocks, by the name of their tensor."""
        for name in names:
            rows, columns = self._source.tensors[name].shape
            for start, stop in row_chunks(rows, columns):
                blocks = self._source.blocks(name, start, stop)
                assert blocks is not None  # block_layout said so
                correction = blocks.correction
                with np.errstate(over="ignore"):
                    yield (
                        name,
                        _Piece(
                            blocks.codes,
                            blocks.scales.astype(self.dtype, copy=False),
                            None if correction is None else correction.astype(self.dtype),
                        ),
                    )
                self._advance((stop - start) * columns)

    def _rounded_pieces(self, names: Sequence[str], layout: Layout) -> Iterator[tuple[str, _Piece]]:
        """Rows rounded on all cores, in order, by the name of their tensor."""
        pending: deque[tuple[str, Future[Quantized]]] = deque()
        round_rows = self._rounding(names[0], layout)
        for name, chunk in self._chunks(names):
            pending.append((name, self._pool.submit(round_rows, chunk)))
            while len(pending) > self._ahead:
                yield _finished(pending)
        while pending:
            yield _finished(pending)

    def _rounding(self, name: str, layout: Layout) -> Callable[[Float32], Quantized]:
        """How rows of the matrix `name` are rounded: knowing its inputs, where that is possible."""
        if layout.asymmetric and self._calibration is not None:
            feedback = self._calibration.feedback(name)
            if feedback is not None and feedback.columns % layout.group == 0:
                return partial(feedback.quantize, group=layout.group, scale_dtype=self.dtype)
        return partial(
            quantize_rows,
            bits=layout.bits,
            group=layout.group,
            scale_dtype=self.dtype,
            asymmetric=layout.asymmetric,
        )

    def _chunks(self, names: Sequence[str]) -> Iterator[tuple[str, Float32]]:
        for name in names:
            rows, columns = self._source.tensors[name].shape
            for start, stop in row_chunks(rows, columns):
                yield name, self._source.read_rows(name, start, stop)
                self._advance((stop - start) * columns)

    def _shape(self, names: Sequence[str]) -> tuple[int, int]:
        shapes = [self._source.tensors[name].shape for name in names]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def _checked(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        if not np.isfinite(values).all():
            raise CorruptFile(f"{name} holds NaN or infinity", tensor=name)
        return values

    def _narrowed(self, name: str, values: Float32) -> NDArray[Any]:
        """`values` in the graph's floats. Raises InvalidRequest where one is too large for them."""
        self._checked(name, values)
        with np.errstate(over="ignore"):
            narrow = values.astype(self.dtype, copy=False)
        if self.dtype.itemsize < values.dtype.itemsize and not np.isfinite(narrow).all():
            instead = "bf16" if self.dtype == np.float16 else "f32"
            raise InvalidRequest(
                f"{name} holds {float(np.abs(values).max()):.6g}, which is more than a "
                f"{self.dtype} can be; choose the recipe {instead}",
                param="recipe",
            )
        return narrow

    def _place(self, info: TensorInfo) -> Place | None:
        """Where the matrix can be used in place, if the recipe leaves it as the file has it."""
        if not self._recipe.dtype or _STORED_AS.get(info.dtype) != self.dtype:
            return None
        return info.place

    def _advance(self, elements: int) -> None:
        self._done_elements = min(self._done_elements + elements, self._elements)
        total = self._source.total_bytes
        self._progress(total * self._done_elements // self._elements, total)


def check_names(
    source: Source, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]
) -> None:
    """Compare the source with the names and shapes the family expects.

    Raises CorruptFile for a tensor that is missing or of another shape than the config says,
    UnsupportedModel for one that the family does not know.
    """
    found = source.tensors
    missing = [name for name in expected if name not in found]
    if missing:
        raise CorruptFile(
            f"the weights lack {missing[0]} ({len(missing)} of {len(expected)} tensors are "
            "missing); the files do not belong to this config",
            tensor=missing[0],
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CorruptFile(
                f"{name} has shape {list(found[name].shape)} where the config says {list(shape)}",
                tensor=name,
            )
    unknown = [
        name
        for name in found
        if name not in expected and not ignored(name) and not _is_zero_bias(source, name)
    ]
    if unknown:
        raise UnsupportedModel(
            f"the weights hold {unknown[0]}, which this architecture does not have "
            f"({len(unknown)} such tensors)",
            tensor=unknown[0],
        )


def _is_zero_bias(source: Source, name: str) -> bool:
    """Whether it is a bias that adds nothing: some quantisers give one to every layer."""
    weight = source.tensors.get(f"{name.removesuffix('.bias')}.weight")
    if not name.endswith(".bias") or weight is None:
        return False
    return source.tensors[name].shape == weight.shape[:1] and not source.read(name).any()


def _finished(pending: deque[tuple[str, Future[Quantized]]]) -> tuple[str, _Piece]:
    name, job = pending.popleft()
    found = job.result()
    return name, _Piece(found.codes, found.scales, None, found.zero_points)
