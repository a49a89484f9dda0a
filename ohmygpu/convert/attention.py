"""Attention over the KV cache, and the projections around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decoder import Emitter
from .layers import MS, Linear, linear, name_of, split, trim
from .rotary import Rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How a layer's attention weighs the positions it sees.

    A score is scale * (q · k), then softcap * tanh(score / softcap) where there is a softcap
    (Gemma 2). `window` positions are seen, the token's own among them; None = all. `sinks` names a
    tensor (H,): one more score per head that takes weight and gives no value (gpt-oss).
    """

    scale: float
    softcap: float = 0.0
    window: int | None = None
    sinks: str | None = None


def usual_scores(e: Emitter) -> Scores:
    """Scores divided by √head_dim, all positions seen."""
    return Scores(scale=e.decoder.head_dim**-0.5)


def attention(
    e: Emitter,
    path: str,
    x: str,
    layer: int,
    rotary: Rotary | None,
    qkv: Sequence[Linear],
    o: Linear,
    scores: Scores | None = None,
) -> str:
    """Causal grouped-query attention with its projections: o(attend(q(x), k(x), v(x)))."""
    inputs = projections(e, path, x, qkv)
    y = attend(e, path, inputs, layer, rotary, scores or usual_scores(e))
    return linear(e, f"{path}/o_proj", y, [o])


def projections(e: Emitter, path: str, x: str, qkv: Sequence[Linear]) -> list[str]:
    """Queries, keys and values of x: [all three in one value], or [q, k, v].

    One product where the three are stored alike; a single Linear holds them stacked already.
    """
    layouts = [e.weights.layout(part.weight) for part in qkv]
    if all(layout == layouts[0] for layout in layouts):
        return [linear(e, f"{path}/qkv_proj", x, qkv)]
    names = ("q_proj", "k_proj", "v_proj")
    return [linear(e, f"{path}/{name}", x, [part]) for name, part in zip(names, qkv, strict=True)]


def separate(e: Emitter, path: str, qkv: Sequence[str]) -> list[str]:
    """[q, k, v] from what `projections` gave."""
    if len(qkv) == 3:
        return list(qkv)
    d = e.decoder
    keys = d.kv_heads * d.head_dim
    return split(e, f"{path}/qkv_proj", qkv[0], [d.heads * d.head_dim, keys, keys])


def attend(
    e: Emitter,
    path: str,
    qkv: Sequence[str],
    layer: int,
    rotary: Rotary | None,
    scores: Scores,
) -> str:
    """Causal grouped-query attention over the KV cache of `layer`, (B, S, heads * head_dim).

    `qkv` is what `projections` gave, or q, k and v after more was done to them. `rotary` turns
    queries and keys: inside the attention where that can, else before it; None = no RoPE. Heads
    whose size the attention does not take are padded with zeros, which changes no score, and cut.
    """
    d = e.decoder
    inputs = list(qkv) if len(qkv) == 3 else [qkv[0], "", ""]
    fused = rotary is not None and rotary.fused
    if (rotary is not None and not fused) or d.cache_dim != d.head_dim:
        inputs = separate(e, path, qkv)
    if rotary is not None and not fused:
        inputs[0] = rotary.turn(f"{path}/q_rotary", inputs[0], d.heads)
        inputs[1] = rotary.turn(f"{path}/k_rotary", inputs[1], d.kv_heads)
    if d.cache_dim != d.head_dim:
        inputs = [
            _pad_heads(e, f"{path}/{name}_pad", value, heads)
            for name, value, heads in zip(
                "qkv", inputs, (d.heads, d.kv_heads, d.kv_heads), strict=True
            )
        ]
    past, present = e.cache(layer)
    tables = [rotary.cos, rotary.sin] if rotary is not None else ["", ""]
    sinks = e.weights.vector([scores.sinks], f"{name_of(path)}.sinks") if scores.sinks else ""
    node = f"{path}/GroupQueryAttention"
    optional: dict[str, float | int] = {}
    e.keeps_scores |= bool(sinks or scores.softcap)
    if scores.softcap:
        optional["softcap"] = scores.softcap
    if scores.window is not None:
        optional["local_window_size"] = scores.window
    lengths = [e.seqlens_k, e.total_sequence_length]
    y = e.graph.node(
        node,
        trim([*inputs, *past, *lengths, *tables, "", "", sinks]),
        [f"{node}/output_0", *present],
        domain=MS,
        num_heads=d.heads,
        kv_num_heads=d.kv_heads,
        scale=scores.scale,
        do_rotary=int(fused),
        rotary_interleaved=0,
        **optional,
    )
    return _cut_heads(e, f"{path}/cut", y)


def _pad_heads(e: Emitter, path: str, x: str, heads: int) -> str:
    """(B, S, heads * head_dim) → (B, S, heads * cache_dim), zeros behind each head."""
    d, g, label = e.decoder, e.graph, name_of(path)
    apart = g.constant(f"{label}.apart", np.array([0, 0, heads, d.head_dim], np.int64))
    pads = g.constant(f"{label}.pads", np.array([0] * 7 + [d.cache_dim - d.head_dim], np.int64))
    joined = g.constant(f"{label}.joined", np.array([0, 0, heads * d.cache_dim], np.int64))
    value = g.node(f"{path}/apart/Reshape", [x, apart])
    value = g.node(f"{path}/Pad", [value, pads])
    return g.node(f"{path}/joined/Reshape", [value, joined])


def _cut_heads(e: Emitter, path: str, x: str) -> str:
    """Inverse of `_pad_heads` for the attention's output."""
    d, g, label = e.decoder, e.graph, name_of(path)
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
