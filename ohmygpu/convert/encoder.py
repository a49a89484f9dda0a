"""Layers of encoders: attention in both directions, learned positions.

Rows of a batch have different lengths; what lies behind a row's end is padding, which no token
sees and whose own values are never used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from ohmygpu.core.errors import UnsupportedModel

from .embedding import EmbeddingEmitter
from .layers import MS, name_of, trim
from .rope import Rope

_INT64 = 7  # TensorProto type for Cast


def learned_positions(e: EmbeddingEmitter, path: str, weight: str, first: int) -> str:
    """Rows first, first + 1, … of a position embedding, one for each column: (S, hidden)."""
    g, label = e.graph, name_of(path)
    table = e.weights.floats(weight, label)
    zero = g.constant(f"{label}.first", np.array([first], np.int64))
    stop = g.node(f"{path}/Add", [e.columns, zero])
    return g.node(f"{path}/Slice", [table.data, zero, stop])


def token_type(e: EmbeddingEmitter, path: str, weight: str) -> str:
    """The first row of the token type embedding, (1, hidden): all tokens are of one text."""
    g, label = e.graph, name_of(path)
    table = e.weights.floats(weight, label)
    row = g.constant(f"{label}.row", np.array([0], np.int64))
    return g.node(f"{path}/Gather", [table.data, row])


def turned_by_columns(e: EmbeddingEmitter, rope: Rope, name: str) -> Callable[[str, str], str]:
    """RoPE for rows that all begin at position 0: (path, x) → x turned, (B, S, heads * head_dim).

    Raises UnsupportedModel for RoPE whose frequencies depend on the length.
    """
    if rope.stretched is not None:
        raise UnsupportedModel("RoPE that depends on the length has no converter for encoders")
    g, path = e.graph, f"/{name}"
    shape = (rope.context_tokens, rope.rotary_dim // 2)
    cos, sin = (
        g.weight(f"{name}.{table}", e.dtype, shape, rope.tables(table)) for table in ("cos", "sin")
    )
    rows = g.node(f"{path}/positions/Cast", [e.steps], to=_INT64)
    axis = g.constant(f"{name}.axis", np.array([0], np.int64))
    positions = g.node(f"{path}/positions/Unsqueeze", [rows, axis])
    batch = g.node(f"{path}/batch/Shape", [e.input_ids])
    positions = g.node(f"{path}/positions/Expand", [positions, batch])  # (B, S)

    def turn(at: str, x: str) -> str:
        return g.node(
            f"{at}/RotaryEmbedding",
            [x, cos, sin, positions],
            interleaved=0,
            num_heads=e.decoder.heads,
            rotary_embedding_dim=rope.rotary_dim,
        )

    return turn


def distance_bias(e: EmbeddingEmitter, path: str, weight: str, rows: NDArray[np.int64]) -> str:
    """A bias for the distance between a query and a key, (1, H, S, S).

    `rows` gives the row of `weight` (·, H) for each distance key - query, from the smallest,
    1 - context, on.
    """
    g, label = e.graph, name_of(path)
    table = e.weights.floats(weight, label)
    index = g.constant(f"{label}.rows", rows.astype(np.int64))
    by_distance = g.node(f"{path}/distances/Gather", [table.data, index])  # (2·context - 1, H)
    zero = g.constant(f"{label}.zero", np.array(e.decoder.context_tokens - 1, np.int32))
    columns, lines = (
        g.constant(f"{label}.{name}", np.array([axis], np.int64))
        for name, axis in (("columns", 0), ("lines", 1))
    )
    keys = g.node(f"{path}/keys/Unsqueeze", [e.steps, columns])  # (1, S)
    queries = g.node(f"{path}/queries/Unsqueeze", [e.steps, lines])  # (S, 1)
    distance = g.node(f"{path}/Sub", [keys, queries])
    distance = g.node(f"{path}/Add", [distance, zero])
    bias = g.node(f"{path}/Gather", [by_distance, distance])  # (S, S, H)
    bias = g.node(f"{path}/Transpose", [bias], perm=[2, 0, 1])
    batch = g.constant(f"{label}.batch", np.array([0], np.int64))
    return g.node(f"{path}/Unsqueeze", [bias, batch])


def full_attention(
    e: EmbeddingEmitter, path: str, q: str, k: str, v: str, bias: str | None = None
) -> str:
    """Every token of a row attends to all of it: (B, S, hidden).

    `bias` is added to the scores, (1, H, S, S). Without one, a batch that has no padding takes the
    attention that never holds all scores at once:

        If(every row is full) ─ MultiHeadAttention(q, k, v)
                             └─ MultiHeadAttention(q, k, v, lengths)
    """
    if bias is not None:
        return _multi_head(e, path, [q, k, v, "", e.lengths, bias])
    d, outputs = e.decoder, []
    branches = {}
    for name, inputs in (("then", [q, k, v]), ("else", [q, k, v, "", e.lengths])):
        node = f"{path}/{name}/MultiHeadAttention"
        outputs.append(f"{node}/output_0")
        made = helper.make_node(
            "MultiHeadAttention",
            inputs,
            outputs[-1:],
            node,
            domain=MS,
            num_heads=d.heads,
            scale=d.head_dim**-0.5,
        )
        kind = helper.np_dtype_to_tensor_dtype(e.dtype)
        value = helper.make_tensor_value_info(outputs[-1], kind, None)
        branches[f"{name}_branch"] = helper.make_graph([made], f"{path}/{name}", [], [value])
    return e.graph.node(f"{path}/If", [e.is_full], **branches)


def local_attention(e: EmbeddingEmitter, path: str, q: str, k: str, v: str, reach: int) -> str:
    """Every token attends to those at most `reach` before or after it: (B, S, hidden).

    Queries are cut into N blocks of C >= reach tokens; a block sees itself and its neighbours, so
    that the work and the memory grow with the length and not with its square.

        q (B, S, ·) ─ Pad ─ (B·N, C, ·) ──────────────┐
        k, v ─ Pad ─ three slices ─ (B·N, 3C, ·) ─ MultiHeadAttention(· + bias) ─ (B, S, ·)
    """
    g, d, label = e.graph, e.decoder, name_of(path)
    blocks = e.blocks(reach)
    width = d.heads * d.head_dim
    shape = g.constant(f"{label}.block", np.array([-1, blocks.size, width], np.int64))
    axis = g.constant(f"{label}.axis", np.array([1], np.int64))

    def cut(name: str, x: str, start: str, stop: str) -> str:
        """Columns start:stop of a padded value, as (B·N, C, ·)."""
        part = g.node(f"{path}/{name}/Slice", [x, start, stop, axis])
        return g.node(f"{path}/{name}/Reshape", [part, shape])

    padded = {
        name: g.node(f"{path}/{name}/Pad", [x, blocks.pads])
        for name, x in zip("qkv", (q, k, v), strict=True)
    }
    queries = cut("q", padded["q"], blocks.starts[1], blocks.stops[1])
    keys, values = (
        g.node(
            f"{path}/{name}/Concat",
            [
                cut(f"{name}/{part}", padded[name], blocks.starts[part], blocks.stops[part])
                for part in range(3)
            ],
            axis=1,
        )
        for name in "kv"
    )
    y = _multi_head(e, path, [queries, keys, values, "", "", blocks.bias])
    whole = g.node(f"{path}/joined/Reshape", [y, blocks.joined])  # (B, N·C, ·)
    first = g.constant(f"{label}.first", np.array([0], np.int64))
    return g.node(f"{path}/whole/Slice", [whole, first, e.columns, axis])


def _multi_head(e: EmbeddingEmitter, path: str, inputs: list[str]) -> str:
    d = e.decoder
    return e.graph.node(
        f"{path}/MultiHeadAttention",
        trim(inputs),
        domain=MS,
        num_heads=d.heads,
        scale=d.head_dim**-0.5,
    )
