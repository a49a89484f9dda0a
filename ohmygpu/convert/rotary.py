"""How RoPE enters a graph: inside the attention, or as nodes before it.

Attention turns queries and keys itself when it can: a constant table, and widths that are
multiples of 16. Otherwise cos and sin are made once per run, for each row's own positions, and
RotaryEmbedding applies them in each layer. Both take positions from `seqlens_k`: the S new tokens
of a row end at its total length, and a row that is shorter than S is padded and starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from .decoder import Emitter
from .rope import Rope, Stretched

_FUSED_MULTIPLE = 16  # of the head and of the part that turns, when attention does RoPE
_INT64, _FLOAT = 7, 1  # TensorProto types for Cast
ROPE_LENGTH_INPUT = "rope_length"


@dataclass(frozen=True, slots=True)
class Rotary:
    """RoPE as the layers of one graph use it: `fused` tables, or cos and sin for `turn`."""

    e: Emitter
    rope: Rope
    fused: bool
    cos: str  # fused: the table, an input of the attention; else empty
    sin: str
    row_cos: str = ""  # (B, S, rotary_dim / 2)
    row_sin: str = ""

    def turn(self, path: str, x: str, heads: int) -> str:
        """Turn (B, S, heads * head_dim) by the rows' positions."""
        return self.e.graph.node(
            f"{path}/RotaryEmbedding",
            [x, self.row_cos, self.row_sin],
            interleaved=0,
            num_heads=heads,
            rotary_embedding_dim=self.rope.rotary_dim,
        )


def rotary(e: Emitter, rope: Rope, name: str = "rotary") -> Rotary:
    """Choose how this graph does RoPE and emit what all layers with this `rope` share.

    `name` tells the ropes of a graph apart, where layers have different ones.
    """
    if rope.stretched is not None:
        return Rotary(e, rope, False, "", "", *_stretched_rows(e, rope, rope.stretched, name))
    cos, sin = (_table(e, rope, f"{name}.{table}", table) for table in ("cos", "sin"))
    if _fuses(rope, e.decoder.head_dim):
        return Rotary(e, rope, True, cos, sin)
    row_cos, row_sin = (
        e.graph.node(f"/model/{name}/{part}/Gather", [table, positions(e)])
        for part, table in (("cos", cos), ("sin", sin))
    )
    return Rotary(e, rope, False, "", "", row_cos, row_sin)


def _fuses(rope: Rope, head_dim: int) -> bool:
    """Whether attention can turn queries and keys itself, from a constant table."""
    return head_dim % _FUSED_MULTIPLE == 0 and rope.rotary_dim % _FUSED_MULTIPLE == 0


def _table(e: Emitter, rope: Rope, name: str, table: str) -> str:
    shape = (rope.context_tokens, rope.rotary_dim // 2)
    return e.graph.weight(f"model.{name}", e.dtype, shape, rope.tables(table))


def positions(e: Emitter) -> str:
    """Positions of the new tokens, (B, S) int64; emitted once."""
    if not e.positions:
        g, path = e.graph, "/model/positions"
        zero, one = (_constant(e, f"positions.{n}", np.int64(n)) for n in (0, 1))
        axis = _constant(e, "positions.axis", np.array([1], np.int64))
        new = g.node(f"{path}/new/Shape", [e.input_ids], start=1, end=2)  # (1,): S
        new_scalar = g.node(f"{path}/new/Squeeze", [new])
        last = g.node(f"{path}/last/Cast", [e.seqlens_k], to=_INT64)  # (B,): total - 1
        total = g.node(f"{path}/total/Add", [last, one])
        past = g.node(f"{path}/past/Sub", [total, new])
        past = g.node(f"{path}/past/Max", [past, zero])
        past = g.node(f"{path}/past/Unsqueeze", [past, axis])  # (B, 1)
        steps = g.node(f"{path}/steps/Range", [zero, new_scalar, one])  # (S,)
        e.positions = g.node(f"{path}/Add", [past, steps])
    return e.positions


def _stretched_rows(e: Emitter, rope: Rope, stretched: Stretched, name: str) -> tuple[str, str]:
    """cos and sin, (B, S, rotary_dim / 2), with each row's frequencies chosen by its length.

    The length of a row is its total length after this run or, where that is larger, the optional
    input `rope_length` (B,) int32: set it to a prompt's full length while computing the prompt in
    pieces, and all pieces get the frequencies the whole prompt would.
    """
    g, path = e.graph, f"/model/{name}"
    one = _constant(e, f"{name}.one_token", np.int32(1))
    columns = _constant(e, f"{name}.length_axis", np.array([1], np.int64))
    if not e.rope_length:
        e.rope_length = g.default_input(ROPE_LENGTH_INPUT, np.zeros(1, np.int32))
    e.stretched = stretched
    length = g.node(f"{path}/length/Add", [e.seqlens_k, one])
    length = g.node(f"{path}/length/Max", [length, e.rope_length])
    length = g.node(f"{path}/length/Unsqueeze", [length, columns])  # (B, 1)
    original = _constant(e, f"{name}.original_tokens", np.int32(stretched.original_tokens))
    longer = g.node(f"{path}/length/Greater", [length, original])  # (B, 1) bool
    base = _constant(e, f"{name}.frequencies", rope.frequencies)
    if stretched.frequencies is not None:
        long = _constant(e, f"{name}.long_frequencies", stretched.frequencies)
    else:
        long = _dynamic_frequencies(e, rope, stretched, length, name)
    frequencies = g.node(f"{path}/frequencies/Where", [longer, long, base])  # (B, D/2)
    frequencies = g.node(f"{path}/frequencies/Unsqueeze", [frequencies, columns])
    places = g.node(f"{path}/positions/Cast", [positions(e)], to=_FLOAT)  # (B, S)
    last = _constant(e, f"{name}.angle_axis", np.array([2], np.int64))
    places = g.node(f"{path}/positions/Unsqueeze", [places, last])
    angles = g.node(f"{path}/angles/Mul", [places, frequencies])  # (B, S, D/2)
    return _scaled(e, rope, "Cos", angles, name), _scaled(e, rope, "Sin", angles, name)


def _dynamic_frequencies(
    e: Emitter, rope: Rope, stretched: Stretched, length: str, name: str
) -> str:
    """Frequencies of dynamic NTK scaling for each row's length, (B, rotary_dim / 2)."""
    g, path = e.graph, f"/model/{name}/dynamic"
    dim, factor, original = rope.rotary_dim, stretched.factor, stretched.original_tokens
    exponents = -np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    tokens = g.node(f"{path}/Cast", [length], to=_FLOAT)
    slope = _constant(e, f"{name}.dynamic_slope", np.float32(factor / original))
    offset = _constant(e, f"{name}.dynamic_offset", np.float32(factor - 1))
    power = _constant(e, f"{name}.dynamic_power", np.float32(dim / (dim - 2)))
    theta = _constant(e, f"{name}.theta", np.float32(rope.theta))
    growth = g.node(f"{path}/growth/Mul", [tokens, slope])
    growth = g.node(f"{path}/growth/Sub", [growth, offset])
    growth = g.node(f"{path}/growth/Max", [growth, _constant(e, f"{name}.one", np.float32(1))])
    growth = g.node(f"{path}/growth/Pow", [growth, power])
    base = g.node(f"{path}/base/Mul", [growth, theta])  # (B, 1)
    return g.node(f"{path}/Pow", [base, _constant(e, f"{name}.exponents", exponents)])


def _scaled(e: Emitter, rope: Rope, function: str, angles: str, name: str) -> str:
    path, factor = f"/model/{name}/{function.lower()}", rope.attention_factor
    value = e.graph.node(f"{path}/{function}", [angles])
    if factor != 1.0:
        scale = _constant(e, f"{name}.{function.lower()}_factor", np.float32(factor))
        value = e.graph.node(f"{path}/Mul", [value, scale])
    if e.dtype != np.float32:
        kind = helper.np_dtype_to_tensor_dtype(e.dtype)
        value = e.graph.node(f"{path}/Cast", [value], to=kind)
    return value


def _constant(e: Emitter, name: str, value: np.generic | NDArray[Any]) -> str:
    return e.graph.constant(f"model.{name}", np.asarray(value))
