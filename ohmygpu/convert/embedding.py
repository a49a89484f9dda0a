"""The graph of an embedding model: token ids in, one vector for each row out, no KV cache.

Decoder families build it as they stand, from their own `build`: the emitter gives their layers
lengths in place of a cache, and takes the last hidden states where the LM head would.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from ohmygpu.core.records import CompiledModel

from .decoder import Decoder, Emitter
from .extent import check_extent
from .family import CONVERTER_VERSION, ENCODERS, family
from .graph import Graph
from .recipes import Recipe, Target
from .safetensors import SafetensorsFile
from .sentence import Dense, Embedder, default_embedder, gguf_embedder, read_embedder
from .source import Source
from .views import View, ViewedSource
from .weights import Progress, Weights, check_names

_FLOAT, _INT32, _INT64 = 1, 6, 7  # TensorProto types for Cast
_MASKED = -1e4  # added to a score: its weight is 0, and a row of them alone stays finite
_SMALLEST_NORM = 1e-12  # as sentence-transformers: a zero vector stays zero
_ACTIVATIONS = {"tanh": ("Tanh", ""), "relu": ("Relu", ""), "gelu": ("Gelu", "com.microsoft")}


@dataclass(frozen=True, slots=True)
class Blocks:
    """What layers of local attention share; N blocks of `size` tokens, see `encoder`."""

    size: int
    pads: str  # of (B, S, ·): a block before, and up to a whole block and one more behind
    starts: tuple[str, ...]  # of the block before, of itself, of the block behind
    stops: tuple[str, ...]
    bias: str  # (B·N, 1, size, 3·size)
    joined: str  # shape (B, N·size, ·)


class EmbeddingEmitter(Emitter):
    """An Emitter whose graph has `lengths` for input and `embeddings` for output.

    `columns` is S, (1,) int64; what lies behind a row's length is padding.
    """

    def __init__(  # in place of Emitter's: another contract
        self,
        graph: Graph,
        weights: Weights,
        recipe: Recipe,
        target: Target,
        decoder: Decoder,
        embedder: Embedder,
        dense: Mapping[str, SafetensorsFile],
    ) -> None:
        self.prepare(graph, weights, recipe, target, decoder)
        self._embedder = embedder
        self._dense = dense
        self._blocks: dict[int, Blocks] = {}
        self.input_ids = graph.input("input_ids", np.int64, ["B", "S"])
        self.lengths = graph.input("lengths", np.int32, ["B"])
        one = self._constant("one", np.int32(1))
        self.seqlens_k = graph.node("/seqlens_k/Sub", [self.lengths, one])
        self.columns = graph.node("/columns/Shape", [self.input_ids], start=1, end=2)
        scalar = graph.node("/columns/Squeeze", [self.columns])
        self.total_sequence_length = graph.node("/columns/Cast", [scalar], to=_INT32)
        graph.output("embeddings", np.float32, ["B", embedder.length(decoder.hidden_size)])

    def cache(self, layer: int) -> tuple[list[str], list[str]]:
        """No past; the keys and values of a layer are used by it alone."""
        return ["", ""], [f"/layers.{layer}/{kind}" for kind in ("key", "value")]

    def ends_at(self, hidden: str) -> bool:
        """Pool the last hidden states, (B, S, hidden), into `embeddings`: True."""
        g = self.graph
        if self.dtype != np.float32:
            hidden = g.node("/pooling/hidden/Cast", [hidden], to=_FLOAT)
        vector = self._pool(hidden)
        for number, step in enumerate(self._embedder.steps):
            path = f"/steps.{number}"
            if isinstance(step, Dense):
                vector = self._dense_layer(path, vector, step)
            else:
                vector = self._normalized(path, vector)
        g.node("/Identity", [vector], ["embeddings"])
        return True

    @cached_property
    def is_full(self) -> str:
        """Whether every row has S tokens, bool scalar."""
        shortest = self.graph.node("/is_full/ReduceMin", [self.lengths], keepdims=0)
        return self.graph.node("/is_full/Equal", [shortest, self.total_sequence_length])

    @cached_property
    def steps(self) -> str:
        """0 to S - 1, (S,) int32."""
        zero, one = self._constant("steps.0", np.int32(0)), self._constant("steps.1", np.int32(1))
        return self.graph.node("/steps/Range", [zero, self.total_sequence_length, one])

    @cached_property
    def row_lengths(self) -> str:
        """`lengths` as (B, 1) int32."""
        axis = self._constant("rows.axis", np.array([1], np.int64))
        return self.graph.node("/row_lengths/Unsqueeze", [self.lengths, axis])

    def blocks(self, reach: int) -> Blocks:
        """What layers share whose tokens attend to `reach` others on both sides."""
        if reach not in self._blocks:
            self._blocks[reach] = self._make_blocks(f"/blocks.{reach}", reach)
        return self._blocks[reach]

    def _make_blocks(self, path: str, size: int) -> Blocks:
        g, name = self.graph, f"blocks.{size}"

        def number(value: int) -> str:
            return self._constant(f"{name}.{value}", np.array([value], np.int64))

        rounded = g.node(f"{path}/count/Add", [self.columns, number(size - 1)])
        one_block = number(size) if size > 1 else number(1)
        count = g.node(f"{path}/count/Div", [rounded, one_block])
        length = g.node(f"{path}/length/Mul", [count, one_block])
        longer = g.node(f"{path}/behind/Add", [length, one_block])
        behind = g.node(f"{path}/behind/Sub", [longer, self.columns])
        none = self._constant(f"{name}.none", np.array([0], np.int64))
        pads = [none, one_block, none, none, behind, none]
        width = self._constant(f"{name}.width", np.array([-1], np.int64))
        rows = g.node(f"{path}/rows/Shape", [self.input_ids], start=0, end=1)
        two_blocks = self._constant(f"{name}.two", np.array([2 * size], np.int64))
        return Blocks(
            size=size,
            pads=g.node(f"{path}/pads/Concat", pads, axis=0),
            starts=(none, one_block, two_blocks),
            stops=(length, longer, g.node(f"{path}/stop/Add", [length, two_blocks])),
            bias=self._block_bias(path, name, size, count),
            joined=g.node(f"{path}/joined/Concat", [rows, length, width], axis=0),
        )

    def _block_bias(self, path: str, name: str, size: int, count: str) -> str:
        """0 where a query of a block sees a key of the three blocks about it, (B·N, 1, C, 3C)."""
        g = self.graph
        query, key = np.arange(size)[:, None], np.arange(3 * size)[None, :] - size
        near = self._constant(f"{name}.near", np.abs(query - key) <= size)  # (C, 3C)
        keys = self._constant(f"{name}.keys", key.astype(np.int32))  # (1, 3C)
        zero, one = (self._constant(f"{name}.i{n}", np.int32(n)) for n in (0, 1))
        blocks = g.node(f"{path}/count/Squeeze", [count])
        blocks = g.node(f"{path}/count/Cast", [blocks], to=_INT32)
        blocks = g.node(f"{path}/Range", [zero, blocks, one])  # (N,)
        blocks = g.node(
            f"{path}/start/Mul", [blocks, self._constant(f"{name}.size", np.int32(size))]
        )
        column = self._constant(f"{name}.column", np.array([1], np.int64))
        blocks = g.node(f"{path}/start/Unsqueeze", [blocks, column])  # (N, 1)
        places = g.node(f"{path}/places/Add", [blocks, keys])  # (N, 3C)
        after = g.node(f"{path}/after/GreaterOrEqual", [places, zero])
        last = self._constant(f"{name}.last", np.array([2], np.int64))
        ends = g.node(f"{path}/ends/Unsqueeze", [self.row_lengths, last])  # (B, 1, 1)
        before = g.node(f"{path}/before/Less", [places, ends])  # (B, N, 3C)
        real = g.node(f"{path}/real/And", [after, before])
        inner = self._constant(f"{name}.inner", np.array([2], np.int64))
        real = g.node(f"{path}/real/Unsqueeze", [real, inner])  # (B, N, 1, 3C)
        seen = g.node(f"{path}/seen/And", [real, near])  # (B, N, C, 3C)
        values = (self._constant(f"{name}.f{n}", np.array(n, self.dtype)) for n in (0, _MASKED))
        bias = g.node(f"{path}/Where", [seen, *values])
        shape = self._constant(f"{name}.shape", np.array([-1, 1, size, 3 * size], np.int64))
        return g.node(f"{path}/bias/Reshape", [bias, shape])

    # --- the vector of a row ---

    def _pool(self, hidden: str) -> str:
        """(B, S, hidden) → (B, hidden) float32."""
        g, pooling, path = self.graph, self._embedder.pooling, "/pooling"
        axis = self._constant("pooling.axis", np.array([1], np.int64))
        if pooling == "cls":
            first = self._constant("pooling.first", np.array([0], np.int64))
            vector = g.node(f"{path}/Gather", [hidden, first], axis=1)  # (B, 1, hidden)
            return g.node(f"{path}/Squeeze", [vector, axis])
        if pooling == "max":
            real = self._is_real(f"{path}/real")
            last = self._constant("pooling.last", np.array([2], np.int64))
            real = g.node(f"{path}/real/Unsqueeze", [real, last])
            lowest = self._constant("pooling.lowest", np.array(np.finfo(np.float32).min))
            hidden = g.node(f"{path}/Where", [real, hidden, lowest])
            return g.node(f"{path}/ReduceMax", [hidden, axis], keepdims=0)
        weights = g.node(f"{path}/Unsqueeze", [self._pooling_weights(path), axis])  # (B, 1, S)
        vector = g.node(f"{path}/MatMul", [weights, hidden])
        return g.node(f"{path}/Squeeze", [vector, axis])

    def _pooling_weights(self, path: str) -> str:
        """How much of each token is in the vector, (B, S) float32."""
        g, pooling = self.graph, self._embedder.pooling
        if pooling == "last":
            one = self._constant("pooling.one", np.int32(1))
            last = g.node(f"{path}/last/Sub", [self.row_lengths, one])
            found = g.node(f"{path}/last/Equal", [self.steps, last])
            return g.node(f"{path}/last/Cast", [found], to=_FLOAT)
        weights = g.node(f"{path}/real/Cast", [self._is_real(f"{path}/real")], to=_FLOAT)
        if pooling == "weighted_mean":  # the n-th token n times
            steps = g.node(f"{path}/steps/Cast", [self.steps], to=_FLOAT)
            counted = g.node(f"{path}/Add", [steps, self._constant("pooling.1", np.float32(1))])
            weights = g.node(f"{path}/Mul", [weights, counted])
            axis = self._constant("pooling.columns", np.array([1], np.int64))
            total = g.node(f"{path}/ReduceSum", [weights, axis], keepdims=1)
        else:
            total = g.node(f"{path}/total/Cast", [self.row_lengths], to=_FLOAT)
        if pooling == "mean_sqrt_len":
            total = g.node(f"{path}/total/Sqrt", [total])
        return g.node(f"{path}/Div", [weights, total])

    def _is_real(self, path: str) -> str:
        """Which tokens are not padding, (B, S) bool."""
        return self.graph.node(f"{path}/Less", [self.steps, self.row_lengths])

    def _normalized(self, path: str, vector: str) -> str:
        g, name = self.graph, path.strip("/")
        axis = self._constant(f"{name}.axis", np.array([1], np.int64))
        length = g.node(f"{path}/ReduceL2", [vector, axis], keepdims=1)
        smallest = self._constant(f"{name}.smallest", np.array(_SMALLEST_NORM, np.float32))
        length = g.node(f"{path}/Max", [length, smallest])
        return g.node(f"{path}/Div", [vector, length])

    def _dense_layer(self, path: str, vector: str, step: Dense) -> str:
        g, name, file = self.graph, path.strip("/"), self._dense[step.folder]
        wanted: dict[str, tuple[int, ...]] = {"linear.weight": (step.outputs, step.inputs)}
        if step.bias:
            wanted["linear.bias"] = (step.outputs,)
        found = {key: info.shape for key, info in file.tensors.items()}
        if found != wanted:
            raise CorruptFile(f"{file.name} holds {found} where its config says {wanted}")
        inputs = [vector]
        for key, shape in wanted.items():
            values = file.read_rows(key, 0, step.outputs).reshape(shape)
            inputs.append(g.weight(f"{name}.{key}", np.float32, shape, [values]))
        vector = g.node(f"{path}/Gemm", inputs, transB=1)
        if step.activation:
            operator, domain = _ACTIVATIONS[step.activation]
            vector = g.node(f"{path}/{operator}", [vector], domain=domain)
        return vector

    def _constant(self, name: str, value: Any) -> str:
        return self.graph.constant(f"embedding.{name}", np.asarray(value))


def embedder_of(source: Source, name: str) -> Embedder | None:
    """How a model of the family `name` embeds; None for a model that generates text."""
    if source.format == "gguf":
        from .adapter import without_adapter
        from .gguf_source import GgufSource

        source = without_adapter(source)
        return gguf_embedder(source.model.metadata) if isinstance(source, GgufSource) else None
    found = read_embedder(source)
    return default_embedder() if found is None and name in ENCODERS else found


def as_embedding_model(compiled: CompiledModel, embedder: Embedder) -> CompiledModel:
    """What compile.json says of a graph that `write_embedding_graph` wrote."""
    own = compiled.context_length
    return replace(
        compiled,
        kind="encoder",
        context_length=min(own, embedder.max_tokens or own),
        pooling=embedder.pooling,
        normalize=embedder.normalize,
        embedding_length=embedder.length(compiled.hidden_size),
        lower_case=embedder.lower_case,
        prompts=dict(embedder.prompts),
    )


def write_embedding_graph(
    source: Source,
    output: Path,
    recipe: Recipe,
    target: Target,
    progress: Progress,
    name: str,
    embedder: Embedder,
) -> tuple[Decoder, int]:
    """Write model.onnx and its data; returns the model's sizes and the bytes of its weights.

    Raises what the family raises, and UnsupportedModel for a decoder made to see both ways.
    """
    _check_direction(name, source.config)
    builder = family(name)
    check_extent(source.config, len(source.tensors))
    config = builder.Config.read(source.config)
    expected = {key: shape for key, shape in builder.weights(config).items() if not _is_head(key)}
    named = aligned(source, expected)
    check_names(named, expected, lambda key: _is_head(key) or builder.ignored(config, key))
    viewed = builder.view(config, named)
    decoder = config.decoder
    folders = [step.folder for step in embedder.steps if isinstance(step, Dense)]
    with ExitStack() as stack:
        graph = stack.enter_context(Graph(output))
        weights = Weights(viewed, graph, recipe, target, decoder.layers, progress)
        stack.enter_context(closing(weights))
        dense = {folder: _open_dense(source, folder) for folder in folders}
        for file in dense.values():
            stack.enter_context(closing(file))
        emitter = EmbeddingEmitter(graph, weights, recipe, target, decoder, embedder, dense)
        builder.build(config, emitter)
        graph.save(str(CONVERTER_VERSION))
        return decoder, graph.weights_bytes


def aligned(source: Source, expected: Mapping[str, tuple[int, ...]]) -> Source:
    """`source` under the names that `expected` has.

    The same weights are saved with the prefix of their class ("bert.", "model.") or without, and
    norms of the first BERTs have gamma and beta. Raises CorruptFile when two tensors are one then.
    """
    views: dict[str, View] = {}
    for found in source.tensors:
        modern = found.replace(".gamma", ".weight").replace(".beta", ".bias")
        inner = modern.partition(".")[2]
        choices = (found, modern, inner, f"model.{modern}")
        name = next((choice for choice in choices if choice in expected), found)
        if name in views:
            raise CorruptFile(f"the weights hold {name} twice; pull the model again", tensor=name)
        views[name] = View(found)
    return ViewedSource(source, views)


def _check_direction(name: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for a decoder whose tokens attend to those behind them, too."""
    both_ways = config.get("is_causal") is False or config.get("use_bidirectional_attention")
    if name not in ENCODERS and both_ways:
        raise UnsupportedModel(
            f"this {name} attends in both directions, which has no converter; embedding models "
            "of this family that attend backwards alone (Qwen3-Embedding) have one"
        )


def _is_head(name: str) -> bool:
    return name.startswith("lm_head.")


def _open_dense(source: Source, folder: str) -> SafetensorsFile:
    name = f"{folder}/model.safetensors"
    if name not in source.files:
        raise UnsupportedModel(f"{name} is missing: the model's last layers cannot be built")
    return SafetensorsFile(name, source.files[name])
