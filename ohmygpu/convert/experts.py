"""Experts of a layer seen as two matrices, whatever the files store: nothing is copied.

The tensors `gate_up` and `down` of `convert/moe.py` hold all experts one below the other, with the
rows of gate and up alternating. Files have a tensor for each expert and projection, or one for all
experts; their rows, and with them their blocks, are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .source import (
    BlockLayout,
    Float32,
    QuantizedBlocks,
    Source,
    SourceFormat,
    TensorInfo,
    read_whole,
)


class Part(Protocol):
    """A matrix somewhere in a source. Rows are outputs."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    def read_rows(self, start: int, stop: int) -> Float32:
        """Rows start:stop as float32."""
        ...

    def block_layout(self) -> BlockLayout | None:
        """The layout `blocks` gives; None for plain types."""
        ...

    def blocks(self, start: int, stop: int) -> QuantizedBlocks | None:
        """Rows start:stop as stored, or None for plain types."""
        ...


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A whole tensor of `source`, a matrix."""

    source: Source
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.source.tensors[self.name].shape
        return rows, columns

    def read_rows(self, start: int, stop: int) -> Float32:
        """Rows start:stop as float32."""
        return self.source.read_rows(self.name, start, stop)

    def block_layout(self) -> BlockLayout | None:
        """The tensor's."""
        return self.source.block_layout(self.name)

    def blocks(self, start: int, stop: int) -> QuantizedBlocks | None:
        """Rows start:stop as stored."""
        return self.source.blocks(self.name, start, stop)


@dataclass(frozen=True, slots=True)
class SlicePart:
    """One expert of a tensor of floats that holds all: (experts, inputs, outputs) where
    `transposed`, else (experts, outputs, inputs), of which rows first:last are taken.

    An expert is read whole, and kept until another one is.
    """

    reader: ExpertReader
    expert: int
    first: int
    last: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        _, a, b = self.reader.source.tensors[self.reader.name].shape
        return self.last - self.first, a if self.transposed else b

    def read_rows(self, start: int, stop: int) -> Float32:
        """Rows start:stop as float32."""
        values = self.reader.read(self.expert)
        if self.transposed:
            values = values.T
        return np.ascontiguousarray(values[self.first + start : self.first + stop])

    def block_layout(self) -> BlockLayout | None:
        """None."""
        return None

    def blocks(self, start: int, stop: int) -> QuantizedBlocks | None:
        """None."""
        return None


class ExpertReader:
    """Reads single experts of a tensor whose first axis counts them; remembers the last one."""

    def __init__(self, source: Source, name: str) -> None:
        self.source = source
        self.name = name
        self._expert = -1
        self._values: Float32 = np.empty((0, 0), np.float32)

    def read(self, expert: int) -> Float32:
        """(a, b) of the tensor's (experts, a, b)."""
        if expert != self._expert:
            self._values = self.source.read_rows(self.name, expert, expert + 1)[0]
            self._expert = expert
        return self._values


@dataclass(frozen=True, slots=True)
class Stack:
    """A matrix made of others: for each expert, the parts whose rows alternate."""

    experts: Sequence[Sequence[Part]]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.experts[0][0].shape
        return len(self.experts) * len(self.experts[0]) * rows, columns

    def layout(self) -> BlockLayout | None:
        """The narrowest layout that holds all parts; None where one is not stored in blocks."""
        return widest([part.block_layout() for parts in self.experts for part in parts])

    def read_rows(self, start: int, stop: int) -> Float32:
        """Rows start:stop."""
        pieces = []
        for parts, first, last in self._spans(start, stop):
            low, high = first // len(parts), -(-last // len(parts))
            rows = [part.read_rows(low, high) for part in parts]
            pieces.append(_alternating(rows)[first - low * len(parts) :][: last - first])
        return np.concatenate(pieces)

    def blocks(self, start: int, stop: int, layout: BlockLayout) -> QuantizedBlocks:
        """Rows start:stop in `layout`, which holds every part's blocks."""
        codes, scales = [], []
        for parts, first, last in self._spans(start, stop):
            low, high = first // len(parts), -(-last // len(parts))
            stored = [widen(_present(part.blocks(low, high)), layout) for part in parts]
            cut = slice(first - low * len(parts), last - low * len(parts))
            codes.append(_alternating([blocks.codes for blocks in stored])[cut])
            scales.append(_alternating([blocks.scales for blocks in stored])[cut])
        return QuantizedBlocks(
            layout.bits, layout.block_size, np.concatenate(codes), np.concatenate(scales), None
        )

    def _spans(self, start: int, stop: int) -> list[tuple[Sequence[Part], int, int]]:
        """(parts, first row, last row + 1) of the experts that rows start:stop meet."""
        height = self.shape[0] // len(self.experts)
        return [
            (
                self.experts[expert],
                max(start - expert * height, 0),
                min(stop - expert * height, height),
            )
            for expert in range(start // height, -(-stop // height))
        ]


def widest(layouts: Sequence[BlockLayout | None]) -> BlockLayout | None:
    """The layout that holds blocks of all of `layouts` as they are; None where one is None."""
    present = [layout for layout in layouts if layout is not None]
    if len(present) < len(layouts):
        return None

    def both(a: BlockLayout, b: BlockLayout) -> BlockLayout:
        return BlockLayout(
            max(a.bits, b.bits),
            min(a.block_size, b.block_size),
            a.has_correction or b.has_correction,
            a.input_order or b.input_order,
        )

    return reduce(both, present)


def widen(blocks: QuantizedBlocks, layout: BlockLayout) -> QuantizedBlocks:
    """The same weights in wider codes and smaller blocks. Minimums are not for experts."""
    rows, count, _ = blocks.codes.shape
    codes, scales = blocks.codes, blocks.scales
    if blocks.bits < layout.bits:  # 4 → 8
        wide = np.stack((codes & 0x0F, codes >> 4), axis=-1)
        codes = wide.reshape(rows, count, -1) + np.uint8((1 << 7) - (1 << 3))
    ratio = blocks.block_size // layout.block_size
    if ratio > 1:
        codes = codes.reshape(rows, count * ratio, -1)
        scales = np.repeat(scales, ratio, axis=1)
    return QuantizedBlocks(layout.bits, layout.block_size, codes, scales, None)


def _alternating(parts: Sequence[Any]) -> Any:
    """Arrays (R, …) → (R * parts, …), a row of each in turn."""
    if len(parts) == 1:
        return parts[0]
    return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def _present(blocks: QuantizedBlocks | None) -> QuantizedBlocks:
    assert blocks is not None  # the layout said so
    return blocks


class ExpertsSource:
    """`source` with the experts of some layers stacked, in place of the tensors they are made of.

    `layers` maps a prefix, such as `model.layers.0.mlp.experts`, to the stacks (gate_up, down)
    that become `<prefix>.gate_up` and `<prefix>.down`; `used` are the tensors that go into them;
    `biases` are tensors made of others, whose values alternate along the last axis.
    """

    def __init__(
        self,
        source: Source,
        layers: Mapping[str, tuple[Stack, Stack]],
        used: set[str],
        biases: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._source = source
        self._stacks: dict[str, Stack] = {}
        self._layouts: dict[str, BlockLayout | None] = {}
        self._biases = dict(biases or {})
        gone = used | {name for names in self._biases.values() for name in names}
        self.tensors = {name: info for name, info in source.tensors.items() if name not in gone}
        for prefix, stacks in layers.items():
            layout = widest([stack.layout() for stack in stacks])
            for kind, stack in zip(("gate_up", "down"), stacks, strict=True):
                name = f"{prefix}.{kind}"
                self._stacks[name] = stack
                self._layouts[name] = layout
                self.tensors[name] = TensorInfo(name, stack.shape, "stacked")
        for name, parts in self._biases.items():
            *outer, last = source.tensors[parts[0]].shape
            self.tensors[name] = TensorInfo(name, (*outer, last * len(parts)), "stacked")

    @property
    def format(self) -> SourceFormat:
        """The format of the source."""
        return self._source.format

    @property
    def config(self) -> dict[str, Any]:
        """The config of the source."""
        return self._source.config

    @property
    def files(self) -> Mapping[str, Path]:
        """The files of the source."""
        return self._source.files

    @property
    def quantization(self) -> str:
        """The quantisation of the source."""
        return self._source.quantization

    @property
    def total_bytes(self) -> int:
        """Bytes of the source's weights."""
        return self._source.total_bytes

    def read(self, name: str) -> Float32:
        """A whole tensor as float32."""
        if name in self._biases:
            values = np.stack([self._source.read(part) for part in self._biases[name]], axis=-1)
            return values.reshape(self.tensors[name].shape)
        return self._source.read(name) if name not in self._stacks else read_whole(self, name)

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop as float32."""
        stack = self._stacks.get(name)
        if stack is None:
            return self._source.read_rows(name, start, stop)
        if start == stop:
            return np.empty((0, stack.shape[1]), np.float32)
        return stack.read_rows(start, stop)

    def block_layout(self, name: str) -> BlockLayout | None:
        """For stacks, one layout that holds both of a layer."""
        return self._layouts[name] if name in self._stacks else self._source.block_layout(name)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        """Rows start:stop as stored, losslessly, or None for plain types."""
        if name not in self._stacks:
            return self._source.blocks(name, start, stop)
        layout = self._layouts[name]
        if layout is None:
            return None
        stop = self.tensors[name].shape[0] if stop is None else stop
        return self._stacks[name].blocks(start, stop, layout)

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def stack_tensors(
    source: Source,
    gate_up: Sequence[Sequence[str]],
    down: Sequence[str],
) -> tuple[tuple[Stack, Stack], set[str]]:
    """((gate_up, down), names used) of experts with a tensor for each projection."""
    stacks = (
        Stack([[TensorPart(source, name) for name in names] for names in gate_up]),
        Stack([[TensorPart(source, name)] for name in down]),
    )
    return stacks, {name for names in gate_up for name in names} | set(down)
