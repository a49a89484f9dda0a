"""Queries that grow with their position, so that attention over long texts stays sharp."""

from __future__ import annotations

import numpy as np
from onnx import helper

from .decoder import Emitter
from .layers import name_of
from .rotary import positions

_FLOAT = 1  # TensorProto.FLOAT


def position_temperature(e: Emitter, path: str, beta: float, original_tokens: int) -> str:
    """Factors of the queries of each token, (B, S, 1): 1 + beta * ln(1 + ⌊position / original⌋).

    1 within the `original_tokens` that the model was first trained on (Llama 4, Ministral 3).
    """
    g, label = e.graph, name_of(path)
    original = g.constant(f"{label}.original_tokens", np.array(original_tokens, np.int64))
    one = g.constant(f"{label}.one", np.array(1, np.float32))
    slope = g.constant(f"{label}.beta", np.array(beta, np.float32))
    axis = g.constant(f"{label}.axis", np.array([-1], np.int64))
    times = g.node(f"{path}/Div", [positions(e), original])  # of integers: rounded down
    value = g.node(f"{path}/times/Cast", [times], to=_FLOAT)
    value = g.node(f"{path}/times/Add", [value, one])
    value = g.node(f"{path}/Log", [value])
    value = g.node(f"{path}/Mul", [value, slope])
    value = g.node(f"{path}/Add", [value, one])
    value = g.node(f"{path}/Unsqueeze", [value, axis])
    if e.dtype != np.float32:
        value = g.node(f"{path}/Cast", [value], to=helper.np_dtype_to_tensor_dtype(e.dtype))
    return value
