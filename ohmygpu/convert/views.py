"""A source seen differently: tensors renamed, cut by rows, reordered or shifted, nothing copied.

A family whose files store its weights in another arrangement than its layers compute with (one
matrix for q, k and v; heads interleaved; a prefix before every name) describes that here, in its
`view` function, and its `build` never sees it. Rows keep their blocks, so views are lossless.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decoder import Decoder
from .source import (
    BlockLayout,
    Float32,
    QuantizedBlocks,
    Source,
    SourceFormat,
    TensorInfo,
)


@dataclass(frozen=True, slots=True)
class View:
    """Where a tensor comes from: the source's tensor `of`, or some of its rows, in this order.

    `offset` is added to every value (norm weights stored as w - 1); only tensors that are not
    stored in blocks may have one.
    """

    of: str
    rows: range | NDArray[np.int64] | None = None
    offset: float = 0.0


class ViewedSource:
    """`source` with the tensors that `views` describes (name → View), and no others.

    Config, format and files are the source's. Raises KeyError for a view of a tensor it lacks.
    """

    def __init__(self, source: Source, views: Mapping[str, View]) -> None:
        self._source = source
        self._views = dict(views)
        self.tensors = {name: self._info(name, view) for name, view in self._views.items()}

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
        view = self._views[name]
        if view.rows is None:
            return _shifted(self._source.read(view.of), view)
        return self.read_rows(name, 0, len(view.rows))

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop of the view as float32."""
        view = self._views[name]
        if view.rows is None or start == stop:
            return _shifted(self._source.read_rows(view.of, start, stop), view)
        first, last, order = _span(view.rows, start, stop)
        rows = self._source.read_rows(view.of, first, last)
        return _shifted(rows if order is None else rows[order], view)

    def block_layout(self, name: str) -> BlockLayout | None:
        """The layout of the source's tensor."""
        return self._source.block_layout(self._views[name].of)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        """Rows start:stop as stored, losslessly, or None for plain types."""
        view = self._views[name]
        stop = self.tensors[name].shape[0] if stop is None else stop
        if view.rows is None or start == stop:
            return self._source.blocks(view.of, start, stop)
        first, last, order = _span(view.rows, start, stop)
        blocks = self._source.blocks(view.of, first, last)
        if blocks is None or order is None:
            return blocks
        return QuantizedBlocks(
            blocks.bits,
            blocks.block_size,
            blocks.codes[order],
            blocks.scales[order],
            None if blocks.correction is None else blocks.correction[order],
        )

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def _info(self, name: str, view: View) -> TensorInfo:
        info = self._source.tensors[view.of]
        shape = info.shape if view.rows is None else (len(view.rows), *info.shape[1:])
        whole = view.rows is None and not view.offset
        return TensorInfo(name, shape, info.dtype, info.place if whole else None)


def neighbours_apart(names: Iterable[str], decoder: Decoder, rotary_dim: int) -> dict[str, View]:
    """Views of all `names`, with the rows of q_proj and k_proj in the order RoPE over halves wants.

    For models whose RoPE turns element 2i of a head with 2i + 1 (GPT-J's way): in each head the
    even ones of the first `rotary_dim` elements come first, then the odd ones, then the others.
    Scores are sums over a head's elements and do not change.
    """
    turned = np.arange(rotary_dim).reshape(-1, 2).T.reshape(-1)
    head = np.concatenate([turned, np.arange(rotary_dim, decoder.head_dim)])

    def rows(heads: int) -> NDArray[np.int64]:
        order: NDArray[np.int64] = np.arange(heads)[:, None] * decoder.head_dim + head
        return order.ravel()

    orders = {".q_proj.": rows(decoder.heads), ".k_proj.": rows(decoder.kv_heads)}
    return {
        name: View(name, next((orders[part] for part in orders if part in name), None))
        for name in names
    }


def gate_and_up_apart(views: Mapping[str, View], decoder: Decoder) -> dict[str, View]:
    """The views with gate_proj and up_proj cut out of each layer's gate_up_proj."""
    size, changed = decoder.feed_forward_length, dict(views)
    for layer in range(decoder.layers):
        prefix = f"model.layers.{layer}.mlp"
        stacked = f"{prefix}.gate_up_proj.weight"
        del changed[stacked]
        changed[f"{prefix}.gate_proj.weight"] = View(stacked, range(size))
        changed[f"{prefix}.up_proj.weight"] = View(stacked, range(size, 2 * size))
    return changed


def with_class_prefix(source: Source, expected: Collection[str]) -> Source:
    """`source` with the prefix of the model's class ("model.", "transformer.") before its names.

    The prefix is that of the first of the names `expected`. Files saved from the network without
    its LM head lack it (openai-community/gpt2); files that have it are returned as they are.
    """
    prefix = next(iter(expected)).partition(".")[0] + "."
    if any(name.startswith(prefix) for name in source.tensors):
        return source
    named = {
        prefix + name if prefix + name in expected else name: View(name) for name in source.tensors
    }
    return ViewedSource(source, named)


def _span(
    rows: range | NDArray[np.int64], start: int, stop: int
) -> tuple[int, int, NDArray[np.int64] | None]:
    """(first, last, order): the rows to read for start:stop, and how to arrange them."""
    wanted = rows[start:stop]
    if isinstance(wanted, range) and wanted.step == 1:
        return wanted.start, wanted.stop, None
    places = np.asarray(wanted, dtype=np.int64)
    first, last = int(places.min()), int(places.max()) + 1
    return first, last, places - first


def _shifted(values: Float32, view: View) -> Float32:
    return values + np.float32(view.offset) if view.offset else values
