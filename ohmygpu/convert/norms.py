"""Normalisation layers. Weights are (hidden,), or (head_dim,) for norms of single heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .decoder import Emitter
from .layers import MS, name_of


def rms_norm(e: Emitter, path: str, x: str, weight: str) -> str:
    """x / sqrt(mean(x²) + epsilon) * weight."""
    gamma = e.weights.vector([weight], f"{name_of(path)}.weight")
    return e.graph.node(
        f"{path}/SimplifiedLayerNormalization",
        [x, gamma],
        axis=-1,
        epsilon=e.decoder.norm_epsilon,
        stash_type=1,
    )


def skip_rms_norm(e: Emitter, path: str, x: str, skip: str, weight: str) -> tuple[str, str]:
    """(rms_norm(x + skip), x + skip): the residual sum and its norm in one node."""
    gamma = e.weights.vector([weight], f"{name_of(path)}.weight")
    node = f"{path}/SkipSimplifiedLayerNormalization"
    outputs = [f"{node}/output_0", "", "", f"{node}/output_3"]
    e.graph.node(node, [x, skip, gamma], outputs, domain=MS, epsilon=e.decoder.norm_epsilon)
    return outputs[0], outputs[3]


def layer_norm(e: Emitter, path: str, x: str, weight: str, bias: str | None) -> str:
    """(x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias."""
    gamma = e.weights.vector([weight], f"{name_of(path)}.weight")
    inputs = [x, gamma]
    if bias is not None:
        inputs.append(e.weights.vector([bias], f"{name_of(path)}.bias"))
    return e.graph.node(
        f"{path}/LayerNormalization",
        inputs,
        axis=-1,
        epsilon=e.decoder.norm_epsilon,
        stash_type=1,
    )


def skip_layer_norm(
    e: Emitter, path: str, x: str, skip: str, weight: str, bias: str | None
) -> tuple[str, str]:
    """(layer_norm(x + skip), x + skip): the residual sum and its norm in one node."""
    inputs = [x, skip, e.weights.vector([weight], f"{name_of(path)}.weight")]
    if bias is not None:
        inputs.append(e.weights.vector([bias], f"{name_of(path)}.bias"))
    node = f"{path}/SkipLayerNormalization"
    outputs = [f"{node}/output_0", "", "", f"{node}/output_3"]
    e.graph.node(node, inputs, outputs, domain=MS, epsilon=e.decoder.norm_epsilon)
    return outputs[0], outputs[3]


def head_rms_norm(e: Emitter, path: str, x: str, heads: int, weight: str) -> str:
    """`rms_norm` of each head of (B, S, heads * head_dim) with one weight, (head_dim,)."""
    value = rms_norm(e, path, _heads_apart(e, path, x, heads), weight)
    return _heads_joined(e, path, value, heads)


def head_layer_norm(e: Emitter, path: str, x: str, heads: int, name: str) -> str:
    """`layer_norm` of each head of (B, S, heads * head_dim) with one `name`.weight and `.bias`."""
    apart = _heads_apart(e, path, x, heads)
    return _heads_joined(
        e, path, layer_norm(e, path, apart, f"{name}.weight", f"{name}.bias"), heads
    )


def own_head_layer_norms(e: Emitter, path: str, x: str, weights: Sequence[str]) -> str:
    """`layer_norm` of each head of (B, S, heads * head_dim) with its own weight, (head_dim,)."""
    g, label, heads = e.graph, name_of(path), len(weights)
    ones = g.constant(f"{label}.ones", np.ones(e.decoder.head_dim, e.dtype))
    value = g.node(
        f"{path}/LayerNormalization",
        [_heads_apart(e, path, x, heads), ones],
        axis=-1,
        epsilon=e.decoder.norm_epsilon,
        stash_type=1,
    )
    gamma = e.weights.vector(weights, f"{label}.weight")  # (heads * head_dim,)
    return g.node(f"{path}/Mul", [_heads_joined(e, path, value, heads), gamma])


def _heads_apart(e: Emitter, path: str, x: str, heads: int) -> str:
    shape = np.array([0, 0, heads, e.decoder.head_dim], np.int64)
    name = e.graph.constant(f"{name_of(path)}.apart", shape)
    return e.graph.node(f"{path}/apart/Reshape", [x, name])


def _heads_joined(e: Emitter, path: str, x: str, heads: int) -> str:
    shape = np.array([0, 0, heads * e.decoder.head_dim], np.int64)
    name = e.graph.constant(f"{name_of(path)}.joined", shape)
    return e.graph.node(f"{path}/joined/Reshape", [x, name])
