"""The layers families are composed of. Each function adds nodes and returns the value it makes.

Values are (B, S, hidden) activations unless said otherwise. How a linear layer is computed is the
recipe's choice, how attention is, the target's and the shape's; a family never asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decoder import Emitter
from .rotary import Rotary
from .weights import Matrix

_MS = "com.microsoft"


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
    """x @ weight.T + bias; several parts are stacked into one product. `output` names the result.

    float:      FusedMatMul [─ Add bias]
    quantised:  MatMulNBits
    with minimums:   x ─┬─ MatMulNBits ──────────────────────────── Add
                        └─ Reshape ─ ReduceSum ─ FusedMatMul(mins) ──┘
    """
    label = _label(path)
    matrix = e.weights.matrix([part.weight for part in parts], label, head=head)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = e.weights.vector(biases, f"{label}.bias") if biases else ""
    named = [output] if output else None
    if not matrix.bits:
        inner = None if bias else named
        y = e.graph.node(f"{path}/FusedMatMul", [x, matrix.data], inner, domain=_MS, transB=1)
        return e.graph.node(f"{path}/Add", [y, bias], named) if bias else y
    y = e.graph.node(
        f"{path}/MatMulNBits",
        _trim([x, matrix.data, matrix.scales, "", "", bias]),
        None if matrix.correction else named,
        domain=_MS,
        K=matrix.columns,
        N=matrix.rows,
        bits=matrix.bits,
        block_size=matrix.group,
        accuracy_level=e.target.accuracy_level,
    )
    if matrix.correction:
        sums = _group_sums(e, path, x, matrix)
        inputs = [sums, matrix.correction]
        minimums = e.graph.node(f"{path}/minimums/FusedMatMul", inputs, domain=_MS, transB=1)
        y = e.graph.node(f"{path}/Add", [y, minimums], named)
    return y


def _group_sums(e: Emitter, path: str, x: str, matrix: Matrix) -> str:
    """Sums of x over each group of the weight's columns, (…, groups); shared between layers."""
    key = (x, matrix.group)
    if key not in e.group_sums:
        rank = 2 if x == _HEAD_ROWS else 3
        shape = np.array([0] * (rank - 1) + [matrix.groups, matrix.group], np.int64)
        shape_name = e.graph.constant(f"{_label(path)}.group_shape", shape)
        grouped = e.graph.node(f"{path}/groups/Reshape", [x, shape_name])
        last = e.graph.constant(f"{_label(path)}.group_axis", np.array([-1], np.int64))
        e.group_sums[key] = e.graph.node(f"{path}/groups/ReduceSum", [grouped, last], keepdims=0)
    return e.group_sums[key]


def embedding(e: Emitter, weight: str, *, path: str = "/model/embed_tokens") -> str:
    """Rows of the embedding matrix for `input_ids`.

    Quantised matrices are read in place by GatherBlockQuantized, so that an embedding tied to the
    LM head is stored once. Blocks with minimums, or rows that groups do not divide:

        GatherBlockQuantized ─ Reshape ─ Add ─ Reshape        Gather of unquantised rows
              Gather(minimums) ─ Unsqueeze ┘
    """
    g, label = e.graph, _label(path)
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
        [data, e.input_ids, matrix.scales],
        domain=_MS,
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


def rms_norm(e: Emitter, path: str, x: str, weight: str) -> str:
    """x / sqrt(mean(x²) + epsilon) * weight."""
    gamma = e.weights.vector([weight], f"{_label(path)}.weight")
    return e.graph.node(
        f"{path}/SimplifiedLayerNormalization",
        [x, gamma],
        axis=-1,
        epsilon=e.decoder.norm_epsilon,
        stash_type=1,
    )


def skip_rms_norm(e: Emitter, path: str, x: str, skip: str, weight: str) -> tuple[str, str]:
    """(rms_norm(x + skip), x + skip): the residual sum and its norm in one node."""
    gamma = e.weights.vector([weight], f"{_label(path)}.weight")
    node = f"{path}/SkipSimplifiedLayerNormalization"
    outputs = [f"{node}/output_0", "", "", f"{node}/output_3"]
    e.graph.node(node, [x, skip, gamma], outputs, domain=_MS, epsilon=e.decoder.norm_epsilon)
    return outputs[0], outputs[3]


def attention(
    e: Emitter, path: str, x: str, layer: int, rotary: Rotary, qkv: Sequence[Linear], o: Linear
) -> str:
    """Causal grouped-query attention over the KV cache, RoPE included.

        x ─ q, k, v in one product where they are stored alike ─ GroupQueryAttention ─ o

    Where the attention cannot turn queries and keys itself, `rotary` does, before it; heads whose
    size it does not take are padded with zeros, which changes no score and is cut off again.
    """
    d = e.decoder
    sizes = [d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kv_heads * d.head_dim]
    layouts = [e.weights.layout(part.weight) for part in qkv]
    if layouts[0] == layouts[1] == layouts[2]:
        inputs = [linear(e, f"{path}/qkv_proj", x, qkv), "", ""]
        if not rotary.fused:
            inputs = _split(e, f"{path}/qkv_proj/Split", inputs[0], sizes)
    else:
        names = ("q_proj", "k_proj", "v_proj")
        inputs = [
            linear(e, f"{path}/{name}", x, [part]) for name, part in zip(names, qkv, strict=True)
        ]
    if not rotary.fused:
        inputs[0] = rotary.turn(f"{path}/q_rotary", inputs[0], d.heads)
        inputs[1] = rotary.turn(f"{path}/k_rotary", inputs[1], d.kv_heads)
        inputs = [
            _pad_heads(e, f"{path}/{name}_pad", value, heads)
            for name, value, heads in zip(
                "qkv", inputs, (d.heads, d.kv_heads, d.kv_heads), strict=True
            )
        ]
    past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
    present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
    node = f"{path}/GroupQueryAttention"
    y = e.graph.node(
        node,
        _trim([*inputs, *past, e.seqlens_k, e.total_sequence_length, rotary.cos, rotary.sin]),
        [f"{node}/output_0", *present],
        domain=_MS,
        num_heads=d.heads,
        kv_num_heads=d.kv_heads,
        scale=d.head_dim**-0.5,
        do_rotary=int(rotary.fused),
        rotary_interleaved=0,
    )
    return linear(e, f"{path}/o_proj", _cut_heads(e, f"{path}/cut", y), [o])


def gated_mlp(e: Emitter, path: str, x: str, gate: Linear, up: Linear, down: Linear) -> str:
    """down(silu(gate(x)) * up(x))."""
    gated = linear(e, f"{path}/gate_proj", x, [gate])
    raised = linear(e, f"{path}/up_proj", x, [up])
    gated = e.graph.node(f"{path}/act/QuickGelu", [gated], domain=_MS, alpha=1.0)  # SiLU
    product = e.graph.node(f"{path}/Mul", [gated, raised])
    return linear(e, f"{path}/down_proj", product, [down])


_HEAD_ROWS = "/lm_head/Gather/output_0"


def lm_head(e: Emitter, x: str, weight: str) -> None:
    """Logits, (R, V) float32, of the rows that `logit_rows` names in (B * S) hidden states."""
    g = e.graph
    shape = g.constant("lm_head.flat", np.array([-1, e.decoder.hidden_size], np.int64))
    flat = g.node("/lm_head/Reshape", [x, shape])
    rows = g.node("/lm_head/Gather", [flat, e.logit_rows], [_HEAD_ROWS])
    if e.dtype == np.float32:
        linear(e, "/lm_head", rows, [Linear(weight)], head=True, output="logits")
    else:
        logits = linear(e, "/lm_head", rows, [Linear(weight)], head=True)
        g.node("/lm_head/Cast", [logits], ["logits"], to=1)  # float32


def _split(e: Emitter, node: str, x: str, sizes: Sequence[int]) -> list[str]:
    name = e.graph.constant(f"{_label(node)}.sizes", np.array(sizes, np.int64))
    outputs = [f"{node}/output_{index}" for index in range(len(sizes))]
    e.graph.node(node, [x, name], outputs, axis=-1)
    return outputs


def _pad_heads(e: Emitter, path: str, x: str, heads: int) -> str:
    """(B, S, heads * head_dim) → (B, S, heads * cache_dim), zeros behind each head."""
    d, g, label = e.decoder, e.graph, _label(path)
    if d.cache_dim == d.head_dim:
        return x
    apart = g.constant(f"{label}.apart", np.array([0, 0, heads, d.head_dim], np.int64))
    pads = g.constant(f"{label}.pads", np.array([0] * 7 + [d.cache_dim - d.head_dim], np.int64))
    joined = g.constant(f"{label}.joined", np.array([0, 0, heads * d.cache_dim], np.int64))
    value = g.node(f"{path}/apart/Reshape", [x, apart])
    value = g.node(f"{path}/Pad", [value, pads])
    return g.node(f"{path}/joined/Reshape", [value, joined])


def _cut_heads(e: Emitter, path: str, x: str) -> str:
    """Inverse of `_pad_heads` for the attention's output."""
    d, g, label = e.decoder, e.graph, _label(path)
    if d.cache_dim == d.head_dim:
        return x
    apart = g.constant(f"{label}.apart", np.array([0, 0, d.heads, d.cache_dim], np.int64))
    joined = g.constant(f"{label}.joined", np.array([0, 0, d.heads * d.head_dim], np.int64))
    start, stop, axis = (
        g.constant(f"{label}.{name}", np.array([value], np.int64))
        for name, value in (("start", 0), ("stop", d.head_dim), ("axis", -1))
    )
    value = g.node(f"{path}/apart/Reshape", [x, apart])
    value = g.node(f"{path}/Slice", [value, start, stop, axis])
    return g.node(f"{path}/joined/Reshape", [value, joined])


def _label(path: str) -> str:
    """The name weights of this node carry: `/model/layers.0/mlp` → `model.layers.0.mlp`."""
    return path.strip("/").replace("/", ".")


def _trim(inputs: list[str]) -> list[str]:
    """Without the empty names at the end."""
    while inputs and not inputs[-1]:
        inputs.pop()
    return inputs
