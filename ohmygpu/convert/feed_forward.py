"""Feed-forward blocks and their activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ohmygpu.core.errors import UnsupportedModel

from .decoder import Emitter
from .layers import MS, Linear, linear

Activation = Callable[[Emitter, str, str], str]
"""(emitter, path, x) → f(x), the same shape."""


def silu(e: Emitter, path: str, x: str) -> str:
    """x * sigmoid(x)."""
    return e.graph.node(f"{path}/QuickGelu", [x], domain=MS, alpha=1.0)


def quick_gelu(e: Emitter, path: str, x: str) -> str:
    """x * sigmoid(1.702 x)."""
    return e.graph.node(f"{path}/QuickGelu", [x], domain=MS, alpha=1.702)


def gelu(e: Emitter, path: str, x: str) -> str:
    """x * Φ(x), Φ the normal distribution: GELU as defined (arXiv 1606.08415)."""
    return e.graph.node(f"{path}/Gelu", [x], domain=MS)


def gelu_tanh(e: Emitter, path: str, x: str) -> str:
    """x / 2 * (1 + tanh(√(2/π) (x + 0.044715 x³))): GELU's usual approximation."""
    return e.graph.node(f"{path}/FastGelu", [x], domain=MS)


def relu(e: Emitter, path: str, x: str) -> str:
    """max(x, 0)."""
    return e.graph.node(f"{path}/Relu", [x])


def squared_relu(e: Emitter, path: str, x: str) -> str:
    """max(x, 0)²."""
    value = relu(e, path, x)
    return e.graph.node(f"{path}/Mul", [value, value])


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": silu,
        "swish": silu,
        "gelu": gelu,
        "gelu_python": gelu,
        "gelu_new": gelu_tanh,
        "gelu_fast": gelu_tanh,
        "gelu_pytorch_tanh": gelu_tanh,
        "gelu_accurate": gelu_tanh,
        "quick_gelu": quick_gelu,
        "relu": relu,
        "relu2": squared_relu,
    }
)
"""Activations by the names that configs use for them."""


def read_activation(config: Mapping[str, Any], key: str, default: str) -> Activation:
    """The activation that `config[key]` names. Raises UnsupportedModel for one we do not have."""
    name = config.get(key) or default
    found = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedModel(
            f"a {config.get('model_type')} with the activation {str(name)[:40]!r} has no "
            f"converter; known activations: {', '.join(ACTIVATIONS)}"
        )
    return found


def gated_mlp(
    e: Emitter,
    path: str,
    x: str,
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation = silu,
) -> str:
    """down(activation(gate(x)) * up(x))."""
    gated = linear(e, f"{path}/gate_proj", x, [gate])
    raised = linear(e, f"{path}/up_proj", x, [up])
    gated = activation(e, f"{path}/act", gated)
    product = e.graph.node(f"{path}/Mul", [gated, raised])
    return linear(e, f"{path}/down_proj", product, [down])


def mlp(e: Emitter, path: str, x: str, up: Linear, down: Linear, activation: Activation) -> str:
    """down(activation(up(x)))."""
    raised = linear(e, f"{path}/up_proj", x, [up])
    return linear(e, f"{path}/down_proj", activation(e, f"{path}/act", raised), [down])
