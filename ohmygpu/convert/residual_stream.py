"""Finds in an emitted graph what an orthogonal change of the residual stream's basis touches.

The residual stream can be rotated when nothing but these reads or writes it, whatever the family:

    embedding ─(* factor)─┬─ RMSNorm ─(* factor)─ linear layers …   (or the LM head's rows)
                          └─ + linear layer (* factor) …

An RMSNorm without its weight commutes with an orthogonal matrix Q, so with h' = h Q the embedding's
rows get Q behind them, linear layers that read a norm become (W diag(weight) Q), those that write
the stream Qᵀ W, and the head's rows get Qᵀ and the last norm's weight. Layer norms subtract a mean,
norms behind a block sit between it and the stream, experts keep their weights: no rotation there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import onnx

from .decoder import Product
from .layers import HEAD_ROWS

_NORM = "SimplifiedLayerNormalization"
_SKIP_NORM = "SkipSimplifiedLayerNormalization"


@dataclass(slots=True)
class ResidualStream:
    """What changes in a rotated graph.

    `readers` and `writers` are outputs of linear layers; norms are named by their nodes.
    """

    start: str  # the embedding's rows
    norms: set[str] = field(default_factory=set)
    readers: dict[str, str] = field(default_factory=dict)  # → weight of the norm they read
    writers: set[str] = field(default_factory=set)
    head_norm: str = ""  # weight of the norm that the LM head reads


class _NotRotatableError(Exception):
    pass


def find_residual_stream(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
    products: Mapping[str, Product],
    embedded: Sequence[str],
) -> ResidualStream | None:
    """The residual stream, or None where rotating it would change what the graph computes.

    `nodes` in order, of which the outputs of linear layers are in `products` by name.
    """
    if len(embedded) != 1:
        return None
    try:
        return _Walk(nodes, constants, products, embedded[0]).found
    except _NotRotatableError:
        return None


class _Walk:
    """Follows the stream through the nodes; `found` is complete when all are read."""

    def __init__(
        self,
        nodes: Sequence[onnx.NodeProto],
        constants: Mapping[str, onnx.TensorProto],
        products: Mapping[str, Product],
        start: str,
    ) -> None:
        self.found = ResidualStream(start)
        self._constants = constants
        self._products = products
        self._stream = {start}
        self._normed: dict[str, str] = {}  # value → weight of its norm
        self._written: dict[str, frozenset[str]] = {}  # value → linear layers it is the sum of
        self._uses = Counter(name for node in nodes for name in node.input)
        for node in nodes:
            self._read(node)
        if not self.found.head_norm:
            raise _NotRotatableError

    def _read(self, node: onnx.NodeProto) -> None:
        output = node.output[0]
        product = self._products.get(output)
        touched = any(
            name in self._stream or name in self._normed or name in self._written
            for name in node.input
        )
        if product is not None:
            self._read_product(product)
        elif not touched:
            return
        elif node.op_type == _NORM:
            self._norm(node, node.input[1])
        elif node.op_type == _SKIP_NORM:
            self._sum(node.input[:2], node.output[3])
            if node.output[3] not in self._stream:
                raise _NotRotatableError
            self._norm(node, node.input[2])
        elif node.op_type == "Add":
            self._sum(node.input, output)
        elif node.op_type == "Mul":
            self._scale(node)
        elif node.op_type in ("Reshape", "Gather"):
            self._head(node)
        elif any(name in self._stream or name in self._normed for name in node.input):
            raise _NotRotatableError

    def _read_product(self, product: Product) -> None:
        if product.x in self._normed:
            self.found.readers[product.y] = self._normed[product.x]
        elif product.x in self._stream or product.x in self._written:
            raise _NotRotatableError
        self._written[product.y] = frozenset([product.y])

    def _norm(self, node: onnx.NodeProto, weight: str) -> None:
        if node.op_type == _NORM and node.input[0] not in self._stream:
            if node.input[0] in self._normed:
                raise _NotRotatableError
            return  # of queries or keys
        self.found.norms.add(node.name)
        self._normed[node.output[0]] = weight

    def _sum(self, parts: Sequence[str], total: str) -> None:
        """stream + written, or two that are to be written."""
        streams = [part for part in parts if part in self._stream]
        written = [part for part in parts if part in self._written]
        if len(streams) + len(written) != 2 or any(self._uses[part] != 1 for part in written):
            if streams or any(part in self._normed for part in parts):
                raise _NotRotatableError
            return  # somewhere inside a block
        layers = frozenset[str]().union(*(self._written[part] for part in written))
        if streams:
            if len(streams) == 2:
                raise _NotRotatableError
            self.found.writers |= layers
            self._stream.add(total)
        else:
            self._written[total] = layers

    def _scale(self, node: onnx.NodeProto) -> None:
        """By one constant factor; any other product is the inside of a block."""
        values = [name for name in node.input if name not in self._constants]
        factors = [name for name in node.input if name in self._constants]
        by_factor = len(values) == 1 and all(prod(self._constants[n].dims) == 1 for n in factors)
        for name in values:
            if name in self._stream or name in self._normed:
                if not by_factor:
                    raise _NotRotatableError
                if name in self._stream:
                    self._stream.add(node.output[0])
                else:
                    self._normed[node.output[0]] = self._normed[name]
            elif name in self._written and by_factor and self._uses[name] == 1:
                self._written[node.output[0]] = self._written[name]

    def _head(self, node: onnx.NodeProto) -> None:
        """The way of the last norm's rows to the LM head; reshapes of queries are no matter."""
        source = node.input[0]
        if source in self._stream:
            raise _NotRotatableError
        if source in self._normed:
            if node.output[0] == HEAD_ROWS:
                self.found.head_norm = self._normed[source]
            else:
                self._normed[node.output[0]] = self._normed[source]
