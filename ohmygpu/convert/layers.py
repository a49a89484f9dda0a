"""The layers all families are composed of: products, embeddings, the LM head.

Each function adds nodes and returns the value it makes: (B, S, hidden) activations unless said
otherwise. How a linear layer is computed is the recipe's choice, how attention is, the target's
and the shape's; a family never asks. Norms, attention and feed-forward blocks have modules of
their own beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decoder import Emitter, Product
from .weights import Matrix

MS = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_FLOAT = 1  # TensorProto.FLOAT


@dataclass(frozen=True, slots=True)
class Linear:
    """Names of a linear layer's tensors: weight (N, K) and, where it has one, bias (N,)."""

    weight: str
    bias: str | None = None


def linear(
    e: Emitter,
    path: str,
    x: str,
    parts: Sequence[Linear],
    *,
    head: bool = False,
    output: str | None = None,
) -> str:
    """x @ weight.T + bias; `parts` are stacked into one product. `output` names the result."""
    y = _product(e, path, x, parts, head=head, output=output)
    if not head:
        weights = tuple(part.weight for part in parts)
        biases = tuple(part.bias for part in parts if part.bias is not None)
        e.products.append(Product(path, x, y, weights, biases))
    return y


def _product(
    e: Emitter, path: str, x: str, parts: Sequence[Linear], *, head: bool, output: str | None
) -> str:
    """The nodes of `linear`.

    float:      FusedMatMul [─ Add bias]
    quantised:  MatMulNBits
    with minimums:   x ─┬─ MatMulNBits ──────────────────────────── Add
                        └─ Reshape ─ ReduceSum ─ FusedMatMul(mins) ──┘

    Where the weight's columns are stored in another order, x is brought into it first (Gather).
    """
    label = name_of(path)
    matrix = e.weights.matrix([part.weight for part in parts], label, head=head)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = e.weights.vector(biases, f"{label}.bias") if biases else ""
    if not head:
        e.linear_inputs |= dict.fromkeys((part.weight for part in parts), (x, matrix.columns))
    named = [output] if output else None
    rank = 2 if x == HEAD_ROWS else 3
    if matrix.input_order:
        x = _reordered(e, path, x, matrix)
    if not matrix.bits:
        inner = None if bias else named
        y = e.graph.node(f"{path}/FusedMatMul", [x, matrix.data], inner, domain=MS, transB=1)
        return e.graph.node(f"{path}/Add", [y, bias], named) if bias else y
    y = e.graph.node(
        f"{path}/MatMulNBits",
        trim([x, matrix.data, matrix.scales, matrix.zero_points, "", bias]),
        None if matrix.correction else named,
        domain=MS,
        K=matrix.columns,
        N=matrix.rows,
        bits=matrix.bits,
        block_size=matrix.group,
        accuracy_level=e.target.accuracy_level,
    )
    if matrix.correction:
        sums = _group_sums(e, path, x, matrix, rank)
        inputs = [sums, matrix.correction]
        minimums = e.graph.node(f"{path}/minimums/FusedMatMul", inputs, domain=MS, transB=1)
        y = e.graph.node(f"{path}/Add", [y, minimums], named)
    return y


def _reordered(e: Emitter, path: str, x: str, matrix: Matrix) -> str:
    """x with its last axis in the order of the weight's columns; shared between layers."""
    key = (x, matrix.input_order)
    if key not in e.reordered:
        order = e.graph.constant(
            f"{name_of(path)}.input_order", np.array(matrix.input_order, np.int64)
        )
        e.reordered[key] = e.graph.node(f"{path}/input_order/Gather", [x, order], axis=-1)
    return e.reordered[key]


def _group_sums(e: Emitter, path: str, x: str, matrix: Matrix, rank: int) -> str:
    """Sums of x over each group of the weight's columns, (…, groups); shared between layers."""
    key = (x, matrix.group)
    if key not in e.group_sums:
        shape = np.array([0] * (rank - 1) + [matrix.groups, matrix.group], np.int64)
        shape_name = e.graph.constant(f"{name_of(path)}.group_shape", shape)
        grouped = e.graph.node(f"{path}/groups/Reshape", [x, shape_name])
        last = e.graph.constant(f"{name_of(path)}.group_axis", np.array([-1], np.int64))
        e.group_sums[key] = e.graph.node(f"{path}/groups/ReduceSum", [grouped, last], keepdims=0)
    return e.group_sums[key]


def embedding(e: Emitter, weight: str, *, path: str = "/model/embed_tokens") -> str:
    """Rows of the embedding matrix for `input_ids`.

    Quantised matrices are read in place by GatherBlockQuantized, so that an embedding tied to the
    LM head is stored once. Blocks with minimums, or rows that groups do not divide:

        GatherBlockQuantized ─ Reshape ─ Add ─ Reshape        Gather of unquantised rows
              Gather(minimums) ─ Unsqueeze ┘
    """
    g, label = e.graph, name_of(path)
    layout = e.weights.layout(weight, head=True)
    if not layout.bits or e.decoder.hidden_size % layout.group:
        matrix = (
            e.weights.floats(weight, label)
            if layout.bits
            else e.weights.matrix([weight], label, head=True)
        )
        return g.node(f"{path}/Gather", [matrix.data, e.input_ids])
    matrix = e.weights.matrix([weight], label, head=True)
    packed = (matrix.rows, matrix.columns * matrix.bits // 8)
    data = g.alias(f"{label}.rows_q{matrix.bits}", matrix.data, np.uint8, packed)
    rows = g.node(
        f"{path}/GatherBlockQuantized",
        trim([data, e.input_ids, matrix.scales, matrix.zero_points]),
        domain=MS,
        bits=matrix.bits,
        block_size=matrix.group,
        gather_axis=0,
        quantize_axis=1,
    )
    if not matrix.correction:
        return rows
    shape = g.constant(f"{label}.groups", np.array([0, 0, matrix.groups, matrix.group], np.int64))
    grouped = g.node(f"{path}/groups/Reshape", [rows, shape])
    minimums = g.node(f"{path}/minimums/Gather", [matrix.correction, e.input_ids])
    axis = g.constant(f"{label}.axis", np.array([-1], np.int64))
    minimums = g.node(f"{path}/minimums/Unsqueeze", [minimums, axis])
    summed = g.node(f"{path}/Add", [grouped, minimums])
    flat = g.constant(f"{label}.flat", np.array([0, 0, matrix.columns], np.int64))
    return g.node(f"{path}/Reshape", [summed, flat])


HEAD_ROWS = "/lm_head/Gather/output_0"
"""The hidden states that get logits, (R, hidden)."""


def head_rows(e: Emitter, x: str) -> str:
    """The rows of (B * S) hidden states that `logit_rows` names, (R, hidden)."""
    shape = e.graph.constant("lm_head.flat", np.array([-1, e.decoder.hidden_size], np.int64))
    flat = e.graph.node("/lm_head/Reshape", [x, shape])
    return e.graph.node("/lm_head/Gather", [flat, e.logit_rows], [HEAD_ROWS])


def lm_head(e: Emitter, x: str, head: Linear) -> None:
    """Logits, (R, V) float32, of the rows that `logit_rows` names in (B * S) hidden states."""
    if e.ends_at(x):
        return
    rows = head_rows(e, x)
    if e.dtype == np.float32:
        linear(e, "/lm_head", rows, [head], head=True, output="logits")
    else:
        logits = linear(e, "/lm_head", rows, [head], head=True)
        e.graph.node("/lm_head/Cast", [logits], ["logits"], to=_FLOAT)


def softcapped_lm_head(e: Emitter, x: str, head: Linear, cap: float) -> None:
    """`lm_head` with every logit l replaced by cap * tanh(l / cap) (Gemma 2)."""
    if e.ends_at(x):
        return
    logits = linear(e, "/lm_head", head_rows(e, x), [head], head=True)
    if e.dtype != np.float32:
        logits = e.graph.node("/lm_head/Cast", [logits], to=_FLOAT)
    inverse, ceiling = (
        e.graph.constant(f"lm_head.{name}", np.array(value, np.float32))
        for name, value in (("inverse_cap", 1 / cap), ("cap", cap))
    )
    logits = e.graph.node("/lm_head/inverse/Mul", [logits, inverse])
    logits = e.graph.node("/lm_head/Tanh", [logits])
    e.graph.node("/lm_head/Mul", [logits, ceiling], ["logits"])


def add(e: Emitter, path: str, a: str, b: str) -> str:
    """a + b."""
    return e.graph.node(f"{path}/Add", [a, b])


def scaled(e: Emitter, path: str, x: str, factor: float) -> str:
    """x * factor; x itself where the factor is 1."""
    if factor == 1.0:
        return x
    constant = e.graph.constant(f"{name_of(path)}.factor", np.array(factor, e.dtype))
    return e.graph.node(f"{path}/Mul", [x, constant])


def split(e: Emitter, path: str, x: str, sizes: Sequence[int]) -> list[str]:
    """x cut along its last axis into parts of these sizes."""
    name = e.graph.constant(f"{name_of(path)}.Split.sizes", np.array(sizes, np.int64))
    outputs = [f"{path}/Split/output_{index}" for index in range(len(sizes))]
    e.graph.node(f"{path}/Split", [x, name], outputs, axis=-1)
    return outputs


def name_of(path: str) -> str:
    """The name weights of this node carry: `/model/layers.0/mlp` → `model.layers.0.mlp`."""
    return path.strip("/").replace("/", ".")


def trim(inputs: list[str]) -> list[str]:
    """Without the empty names at the end, which ONNX leaves out."""
    while inputs and not inputs[-1]:
        inputs.pop()
    return inputs
