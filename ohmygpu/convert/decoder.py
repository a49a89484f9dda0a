"""The shape of a decoder and the inputs and outputs that every decoder's graph has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .graph import Graph
from .recipes import Recipe, Target
from .rope import Stretched
from .weights import Weights

_HEAD_DIM_MULTIPLE = 8  # GroupQueryAttention's


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Sizes of a decoder-only transformer, as its config gives them."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward_length: int
    norm_epsilon: float
    context_tokens: int  # how far the model reaches
    rope_theta: float = 0.0  # for show; 0 = positions are not told by RoPE
    rope_switch_tokens: int = 0  # as in CompiledModel; set when the graph is built
    rope_grows: bool = False
    score_heads: int = 0  # see `core.records.CompiledModel`
    prompt_bytes: int = 0  # that prompts.onnx uses; 0 = there is none

    @property
    def cache_dim(self) -> int:
        """head_dim as the KV cache stores it: padded with zeros to what the attention takes."""
        return -(-self.head_dim // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE


@dataclass(frozen=True, slots=True)
class Product:
    """A linear layer as it was emitted, but for LM heads: y = x @ W.T + bias.

    `x` and `y` are values of the graph; W is the matrices `weights` stacked by rows, its bias the
    vectors `biases` joined, or none.
    """

    path: str
    x: str
    y: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]


class Emitter:
    """What layer functions write to: the graph, the weights, the recipe's and target's choices."""

    def __init__(
        self, graph: Graph, weights: Weights, recipe: Recipe, target: Target, decoder: Decoder
    ) -> None:
        self.prepare(graph, weights, recipe, target, decoder)
        self.input_ids = graph.input("input_ids", np.int64, ["B", "S"])
        self.seqlens_k = graph.input("seqlens_k", np.int32, ["B"])
        self.total_sequence_length = graph.input("total_sequence_length", np.int32, [])
        self.logit_rows = graph.input("logit_rows", np.int64, ["R"])
        graph.output("logits", np.float32, ["R", decoder.vocab_size])
        cache: list[int | str] = ["B", decoder.kv_heads, "T", decoder.cache_dim]
        for layer in range(decoder.layers):
            past, present = self.cache(layer)
            for name in past:
                graph.input(name, self.dtype, cache)
            for name in present:
                graph.output(name, self.dtype, cache)

    def prepare(
        self, graph: Graph, weights: Weights, recipe: Recipe, target: Target, decoder: Decoder
    ) -> None:
        """What every graph needs, whatever its inputs and outputs."""
        self.graph = graph
        self.weights = weights
        self.recipe = recipe
        self.target = target
        self.decoder = decoder
        self.dtype = np.dtype(target.dtype)
        self.group_sums: dict[tuple[str, int], str] = {}  # (value, group) → its sums by group
        self.reordered: dict[tuple[str, tuple[int, ...]], str] = {}  # (value, order) → value
        self.linear_inputs: dict[str, tuple[str, int]] = {}  # weight → (value it multiplies, K)
        self.products: list[Product] = []
        self.positions = ""  # positions of the new tokens, once `rotary.positions` made them
        self.rope_length = ""  # the input of RoPE whose frequencies depend on the length, if any
        self.stretched: Stretched | None = None  # how they do
        self.keeps_scores = False  # whether an attention writes out all scores on the CPU

    def cache(self, layer: int) -> tuple[list[str], list[str]]:
        """Names of a layer's (past key and value, present key and value)."""
        kinds = ("key", "value")
        past = [f"past_key_values.{layer}.{kind}" for kind in kinds]
        return past, [f"present.{layer}.{kind}" for kind in kinds]

    def ends_at(self, hidden: str) -> bool:
        """Whether the graph ends with the last hidden states; if so, they are taken care of.

        False: their logits are wanted.
        """
        return False
