"""prompts.onnx: the graph in model.onnx with its linear layers as products of 8-bit integers.

It has the same inputs, outputs and KV cache, shares the embedding, the LM head and every constant
that stays as it is, and computes prompts several times faster where the processor multiplies 8-bit
integers. The input x of a linear layer is multiplied by Hadamard matrices H along blocks of 64
channels, which are folded into the weights too (`hadamard`); then each row is divided by its
largest magnitude m and rounded to 255 steps:

    x ─ Reshape ─ MatMul(H) ─ Reshape ─┬─ Abs ─ ReduceMax ─ Max(tiny) ─┬─ m
                                       └───────────── Div ─────────────┘
                                                       └─ QuantizeLinear(1/127, 128) ─┐
                       Mul(m) ─ [Add bias] ─────────── MatMulIntegerToFloat(weights) ─┘

Sums of integers are exact, so a row gives the same bits alone, in any batch and in any chunk. What
else was tried, and how far each is from float32: docs/benchmarks.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ohmygpu.core.records import PROMPT_GRAPH

from .decoder import Emitter, Product
from .family import CONVERTER_VERSION
from .graph import Graph
from .hadamard import hadamard, power_of_two
from .integers import IntegerReader
from .layers import MS, name_of
from .recipes import Recipe, Target
from .source import Source
from .weights import Progress

BLOCK = 64  # channels that an online Hadamard matrix spreads a value over
_MIN_BLOCK = 16
_SMALLEST = 1e-30  # what a row of zeros is divided by
_EXPERTS = ("MoE", "QMoE")


def wants_prompt_graph(recipe: Recipe, target: Target) -> bool:
    """Whether a compile writes a prompts.onnx: not for unquantised weights."""
    return bool(target.integers) and recipe.body_bits != 0


def write_prompt_graph(e: Emitter, source: Source, progress: Progress) -> int:
    """Write prompts.onnx beside the finished graph of `e`, from the weights of `source`.

    Returns the bytes of the constants it uses, shared ones among them; 0, with nothing written, for
    mixtures of experts: most of their weights are in operators that take no products of integers.
    """
    if any(node.op_type in _EXPERTS for node in e.graph.nodes):
        progress(source.total_bytes, source.total_bytes)
        return 0
    dtype = np.dtype(e.target.integers)
    with Graph(e.graph.folder, PROMPT_GRAPH) as graph, IntegerReader(source, dtype) as reader:
        _Writer(e, source, graph, reader, progress).write()
        graph.save(str(CONVERTER_VERSION))
        return graph.used_bytes


def halves(progress: Progress) -> tuple[Progress, Progress]:
    """Two that report what is done of a work's first and second half."""

    def first(done: int, total: int) -> None:
        progress(done // 2, total)

    def second(done: int, total: int) -> None:
        progress((total + done) // 2, total)

    return first, second


class _Writer:
    """Copies the live nodes of one graph to another, with other nodes for its linear layers."""

    def __init__(
        self, e: Emitter, source: Source, graph: Graph, reader: IntegerReader, progress: Progress
    ) -> None:
        self._old = e.graph
        self._constants = e.graph.constants
        self._e = e
        self._source = source
        self._graph = graph
        self._reader = reader
        self._zero = np.array(0 if reader.dtype == np.int8 else 128, reader.dtype)
        self._progress = progress
        self._products = {product.y: product for product in e.products}
        self._nodes = self._live()
        self._rounded: dict[tuple[str, int], tuple[str, str]] = {}  # (x, block) → codes, largest
        self._shared: set[str] = set()
        self._done = 0  # weights written

    def write(self) -> None:
        """Write all nodes."""
        self._graph.take_signature(self._old)
        declared = {value.name for value in self._old.inputs}
        for name in sorted(declared & self._constants.keys()):  # inputs that may be left out
            self._graph.take_constant(self._constants[name])
        taken = set(declared)
        for node in self._nodes:
            product = self._products.get(node.output[0])
            if product is not None:
                self._linear(product)
                self._report(product)
                continue
            for name in node.input:
                if name in self._constants and name not in taken:
                    self._graph.take_constant(self._constants[name])
                    taken.add(name)
            self._graph.take_node(node)

    def _report(self, product: Product) -> None:
        tensors = self._source.tensors
        self._done += sum(tensors[name].elements for name in product.weights)
        names = (name for each in self._products.values() for name in each.weights)
        everything = sum(tensors[name].elements for name in names)
        total = self._source.total_bytes
        self._progress(total * self._done // everything, total)

    def _live(self) -> list[onnx.NodeProto]:
        """The nodes that outputs still depend on, in order."""
        wanted = {value.name for value in self._old.outputs}
        live = []
        for node in reversed(self._old.nodes):
            if wanted.isdisjoint(node.output):
                continue
            live.append(node)
            product = self._products.get(node.output[0])
            wanted.update(node.input if product is None else [product.x])
        return live[::-1]

    def _linear(self, product: Product) -> None:
        """The nodes of one linear layer."""
        g, label = self._graph, name_of(product.path)
        block = power_of_two(self._source.tensors[product.weights[0]].shape[1], BLOCK)
        if block < _MIN_BLOCK:
            block = 0
        codes, largest = self._round(product.x, block)
        matrix = self._reader.read(product.weights, block)
        weight = g.constant(f"{label}.weight_integers", matrix.codes)
        scales = g.constant(f"{label}.weight_scales", matrix.scales)
        step, zero = self._scalar("step", _STEP), self._scalar("zero", _ZERO)
        weight_zero = self._scalar("weight_zero", self._zero)
        y = g.node(
            f"{product.path}/MatMulIntegerToFloat",
            [codes, weight, step, scales, zero, weight_zero],
            domain=MS,
        )
        y = g.node(
            f"{product.path}/largest/Mul", [y, largest], None if product.biases else [product.y]
        )
        if product.biases:
            bias = np.concatenate([self._source.read(name) for name in product.biases])
            added = g.constant(f"{label}.bias_vector", bias.astype(self._e.dtype))
            g.node(f"{product.path}/bias/Add", [y, added], [product.y])

    def _round(self, x: str, block: int) -> tuple[str, str]:
        """(rows of x as uint8, the largest magnitude of each); shared between layers."""
        key = (x, block)
        if key in self._rounded:
            return self._rounded[key]
        g, path = self._graph, f"{x.removesuffix('/output_0')}/rounded"
        if block:
            x = self._blockwise(path, x, block)
        axis = self._scalar("last_axis", np.array([-1], np.int64))
        largest = g.node(f"{path}/Abs", [x])
        largest = g.node(f"{path}/ReduceMax", [largest, axis], keepdims=1)
        largest = g.node(f"{path}/Max", [largest, self._scalar("smallest", _SMALL)])
        unit = g.node(f"{path}/Div", [x, largest])
        steps = [unit, self._scalar("step", _STEP), self._scalar("zero", _ZERO)]
        self._rounded[key] = (g.node(f"{path}/QuantizeLinear", steps), largest)
        return self._rounded[key]

    def _blockwise(self, path: str, x: str, block: int) -> str:
        """x with each block of its channels multiplied by the Hadamard matrix."""
        g = self._graph
        apart = self._scalar(f"blocks_of_{block}", np.array([0, 0, -1, block], np.int64))
        joined = self._scalar("joined", np.array([0, 0, -1], np.int64))
        x_apart = g.node(f"{path}/apart/Reshape", [x, apart])
        spread = g.node(
            f"{path}/MatMul", [x_apart, self._scalar(f"hadamard_{block}", hadamard(block))]
        )
        return g.node(f"{path}/joined/Reshape", [spread, joined])

    def _scalar(self, name: str, value: NDArray[Any]) -> str:
        """A constant of this graph that several nodes use."""
        full = f"integers.{name}"
        if full not in self._shared:
            self._shared.add(full)
            self._graph.constant(full, value)
        return full


_STEP = np.array(np.float32(1) / np.float32(127))
_ZERO = np.array(128, np.uint8)
_SMALL = np.array(_SMALLEST, np.float32)
