"""prompts.onnx: the graph in model.onnx with its linear layers as products of 8-bit integers.

It has the same inputs, outputs and KV cache, shares the embedding, the LM head and every constant
that stays as it is, and computes prompts several times faster where the processor multiplies 8-bit
integers. Each row x of activations is divided by its largest magnitude m and rounded to 255 steps:

    x ─[* H]─┬─ Abs ─ ReduceMax ─ Max(tiny) ─┬──────────────────────────────────┐
             └─────── Div ───────────────────┘                                  │
              └─ QuantizeLinear(1/127, 128) ─ MatMulIntegerToFloat(codes) ─ Mul(m) ─ [Add bias]

Sums of integers are exact, so a row gives the same bits alone, in any batch and any chunk. H are
Hadamard matrices along blocks of 64 channels; where the residual stream can be rotated offline
(`residual_stream`), the layers that read it do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ohmygpu.core.records import PROMPT_GRAPH

from .decoder import Emitter, Product, PromptGraph
from .family import CONVERTER_VERSION
from .graph import Graph
from .integers import Change, IntegerReader
from .layers import HEAD_ROWS, MS, name_of
from .recipes import Recipe, Target
from .residual_stream import find_residual_stream
from .rotation import Rotation, hadamard, power_of_two
from .source import Source
from .weights import Progress

BLOCK = 64  # channels that an online Hadamard matrix spreads a value over
_MIN_BLOCK = 16
_SMALLEST = 1e-30  # what a row of zeros is divided by
_EXPERTS = ("MoE", "QMoE")


def wants_prompt_graph(recipe: Recipe, target: Target) -> bool:
    """Whether a compile writes a prompts.onnx: not for unquantised weights."""
    return bool(target.integers) and recipe.body_bits != 0


def write_prompt_graph(e: Emitter, source: Source, progress: Progress) -> PromptGraph | None:
    """Write prompts.onnx beside the finished graph of `e`, from the weights of `source`.

    None, and nothing written, for mixtures of experts: most of their weights are in operators that
    take no products of integers.
    """
    if any(node.op_type in _EXPERTS for node in e.graph.nodes):
        return None
    dtype = np.dtype(e.target.integers)
    with Graph(e.graph.folder, PROMPT_GRAPH) as graph, IntegerReader(source, dtype) as reader:
        writer = _Writer(e, source, graph, reader, progress)
        writer.write()
        graph.save(str(CONVERTER_VERSION))
        return PromptGraph(graph.used_bytes, rotated=writer.stream is not None)


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
        self._dtype = reader.dtype
        self._progress = progress
        self._products = {product.y: product for product in e.products}
        self._nodes = self._live()
        self.stream = find_residual_stream(self._nodes, self._constants, self._products, e.embedded)
        self._rotation = Rotation(e.decoder.hidden_size) if self.stream else None
        self._rounded: dict[tuple[str, int], tuple[str, str]] = {}  # (x, block) → codes, largest
        self._shared: set[str] = set()
        self._ones = ""
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
            changed = self._changed(node)
            for name in changed.input:
                if name in self._constants and name not in taken:
                    self._graph.take_constant(self._constants[name])
                    taken.add(name)
            self._graph.take_node(changed)
            self._turn(changed)

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

    # the rotated basis

    def _changed(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The node as it is in the rotated basis."""
        stream = self.stream
        if stream is None:
            return node
        node = onnx.NodeProto.FromString(node.SerializeToString())
        if node.name in stream.norms:
            node.input[2 if node.op_type.startswith("Skip") else 1] = self._unit_weight()
        if node.output[0] in (stream.start, HEAD_ROWS):
            node.output[0] = _unturned(node.output[0])
        return node

    def _unit_weight(self) -> str:
        if not self._ones:
            ones = np.ones(self._e.decoder.hidden_size, self._e.dtype)
            self._ones = self._graph.constant("rotation.unit_weight", ones)
        return self._ones

    def _turn(self, node: onnx.NodeProto) -> None:
        """After the embedding and before the LM head: into the rotated basis and out of it."""
        if self.stream is None or self._rotation is None:
            return
        g, turned = self._graph, self._rotation
        size = self._e.decoder.hidden_size
        if node.output[0] == _unturned(self.stream.start):
            path = "/rotation"
            x = g.node(f"{path}/signs/Mul", [node.output[0], self._signs()])
            x = self._spread(path, x, [0, 0, turned.blocks, turned.block])
            g.node(
                f"{path}/joined/Reshape", [x, self._shape(path, [0, 0, size])], [self.stream.start]
            )
        elif node.output[0] == _unturned(HEAD_ROWS):
            path = "/rotation_back"
            x = self._spread(path, node.output[0], [0, turned.blocks, turned.block])
            x = g.node(f"{path}/joined/Reshape", [x, self._shape(path, [0, size])])
            signs = turned.signs * self._old.values(self.stream.head_norm)
            weight = g.constant("rotation_back.signed_norm", signs.astype(self._e.dtype))
            g.node(f"{path}/norm/Mul", [x, weight], [HEAD_ROWS])

    def _signs(self) -> str:
        assert self._rotation is not None
        return self._graph.constant("rotation.signs", self._rotation.signs)

    def _spread(self, path: str, x: str, shape: Sequence[int]) -> str:
        """x cut into blocks by `shape`, times C ⊗ H."""
        g, turned = self._graph, self._rotation
        assert turned is not None
        x = g.node(f"{path}/apart/Reshape", [x, self._shape(f"{path}/apart", shape)])
        x = g.node(f"{path}/inner/MatMul", [x, self._hadamard(turned.block)])
        if turned.blocks == 1:
            return x
        across = g.constant(f"{name_of(path)}.across", turned.across)
        return g.node(f"{path}/across/MatMul", [across, x])

    # linear layers

    def _linear(self, product: Product) -> None:
        """The nodes of one linear layer."""
        g, label = self._graph, name_of(product.path)
        change = self._change(product)
        codes, largest = self._round(product.x, change.block)
        matrix = self._reader.read(product.weights, change)
        weight = g.constant(f"{label}.weight_integers", matrix.codes)
        scales = g.constant(f"{label}.weight_scales", matrix.scales)
        zero = self._scalar(
            "weight_zero", np.array(128 if self._dtype == np.uint8 else 0, self._dtype)
        )
        y = g.node(
            f"{product.path}/MatMulIntegerToFloat",
            [codes, weight, self._scalar("step", _STEP), scales, self._scalar("zero", _ZERO), zero],
            domain=MS,
        )
        named = [product.y]
        y = g.node(f"{product.path}/largest/Mul", [y, largest], None if product.biases else named)
        if product.biases:
            g.node(f"{product.path}/bias/Add", [y, self._bias(product, change)], named)

    def _change(self, product: Product) -> Change:
        stream, rotation = self.stream, self._rotation
        writes = rotation if stream and product.y in stream.writers else None
        if stream is not None and product.y in stream.readers:
            scale = self._old.values(stream.readers[product.y]).astype(np.float32)
            return Change(reads=rotation, scale=scale, writes=writes)
        columns = self._source.tensors[product.weights[0]].shape[1]
        block = power_of_two(columns, BLOCK)
        return Change(writes=writes, block=block if block >= _MIN_BLOCK else 0)

    def _bias(self, product: Product, change: Change) -> str:
        bias = np.concatenate([self._source.read(name) for name in product.biases])
        if change.writes is not None:
            bias = change.writes.rows(bias[None])[0]
        return self._graph.constant(
            f"{name_of(product.path)}.bias_turned", bias.astype(self._e.dtype)
        )

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
        spread = g.node(f"{path}/MatMul", [x_apart, self._hadamard(block)])
        return g.node(f"{path}/joined/Reshape", [spread, joined])

    # constants

    def _hadamard(self, size: int) -> str:
        return self._scalar(f"hadamard_{size}", hadamard(size))

    def _shape(self, path: str, shape: Sequence[int]) -> str:
        return self._graph.constant(f"{name_of(path)}.shape", np.array(shape, np.int64))

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


def _unturned(name: str) -> str:
    return f"{name}/unturned"
