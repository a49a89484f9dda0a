"""Normalisation layers. Weights are (hidden,), or (head_dim,) for norms of single heads."""

from __future__ import annotations

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
    g, label, head_dim = e.graph, name_of(path), e.decoder.head_dim
    apart = g.constant(f"{label}.apart", np.array([0, 0, heads, head_dim], np.int64))
    joined = g.constant(f"{label}.joined", np.array([0, 0, heads * head_dim], np.int64))
    value = rms_norm(e, path, g.node(f"{path}/apart/Reshape", [x, apart]), weight)
    return g.node(f"{path}/joined/Reshape", [value, joined])
