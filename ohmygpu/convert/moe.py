"""A sparse mixture of experts: a router picks a few feed-forward blocks for each token.

ONNX Runtime's MoE (float) and QMoE (4 or 8 bits) compute it: they group tokens by expert and read
the chosen experts only. Both hold all experts of a layer in two tensors, `gate_up` (experts, 2 *
inner, hidden), with a gate's row before each row of up, and `down` (experts, hidden, inner);
`convert/experts.py` gives a source that shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from . import config as fields
from .decoder import Emitter
from .feed_forward import gated_mlp
from .layers import MS, Linear, name_of, trim
from .weights import Layout, Matrix

_SMALLEST_GROUP = 16
_WITHOUT_INT8 = 0  # accuracy levels that MoE operators take: this one, and 4


@dataclass(frozen=True, slots=True)
class Experts:
    """Tensors of a layer's experts, stacked: (count * 2 * inner, hidden), (count * hidden, inner).

    Biases are (count, 2 * inner) and (count, hidden).
    """

    count: int
    gate_up: str
    down: str
    gate_up_bias: str | None = None
    down_bias: str | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """Each token goes to the `used` experts with the largest logits.

    Their outputs are weighted by softmax, over these experts alone (`normalised`: the weights sum
    to 1) or over all.
    """

    used: int
    normalised: bool = True


@dataclass(frozen=True, slots=True)
class GatedUnit:
    """g * sigmoid(alpha * g) * (u + beta), g = min(gate, limit), u = clip(up, -limit, limit).

    As it stands: SwiGLU (arXiv 2002.05202). gpt-oss has another alpha, a beta and a limit.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


def read_routing(
    config: Mapping[str, Any], experts_key: str, *, normalised: bool
) -> tuple[int, Routing]:
    """(experts of a layer, how tokens reach them): `experts_key` and `num_experts_per_tok`.

    Raises CorruptFile when more experts are used than there are.
    """
    experts = fields.integer(config, experts_key)
    used = fields.integer(config, "num_experts_per_tok")
    if used > experts:
        raise CorruptFile(f"the model's config uses {used} of {experts} experts for each token")
    return experts, Routing(used, normalised)


def check_activation(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel unless the experts' gates are SiLU, the one the operators have."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(
            f"a {config.get('model_type')} whose experts have the activation "
            f"{str(config['hidden_act'])[:40]!r} has no converter; they can have silu"
        )


def mixture(
    e: Emitter,
    path: str,
    x: str,
    router: Linear,
    experts: Experts,
    routing: Routing,
    unit: GatedUnit = GatedUnit(),
) -> str:
    """sum over the chosen experts of weight * down(unit(gate(x), up(x))).

    The router is never quantised: a near tie decides which weights a token meets.

        x ─ Reshape ─ FusedMatMul(router) ─┬─────────────┐
        └──────────────────────────────────┴─ Softmax* ─ QMoE    (* weights over all experts)
    """
    logits = _router_logits(e, path, x, router)
    attributes: dict[str, Any] = {
        "k": routing.used,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": unit.alpha,
        "activation_beta": unit.beta,
        "normalize_routing_weights": int(routing.normalised),
    }
    if unit.limit is not None:
        attributes["swiglu_limit"] = unit.limit
    label = f"{name_of(path)}.experts"
    layout = _layout(e, experts)
    gate_up, down = (
        _stacked(e, experts.count, name, f"{label}.{kind}_proj", layout)
        for name, kind in ((experts.gate_up, "gate_up"), (experts.down, "down"))
    )
    biases = [
        e.weights.vector([name], f"{label}.{kind}_proj.bias") if name else ""
        for name, kind in ((experts.gate_up_bias, "gate_up"), (experts.down_bias, "down"))
    ]
    if not layout.bits:
        inputs = [x, logits, gate_up.data, biases[0], down.data, biases[1]]
        return e.graph.node(f"{path}/experts/MoE", trim(inputs), domain=MS, **attributes)
    inputs = [x, logits, gate_up.data, gate_up.scales, biases[0]]
    inputs += [down.data, down.scales, biases[1]]
    shares = ""
    if not routing.normalised:
        shares = e.graph.node(f"{path}/router/Softmax", [logits], axis=-1)
    inputs += ["", "", "", gate_up.zero_points, down.zero_points, "", shares]
    if e.target.accuracy_level != _WITHOUT_INT8:
        attributes["accuracy_level"] = e.target.accuracy_level
    return e.graph.node(
        f"{path}/experts/QMoE",
        trim(inputs),
        domain=MS,
        expert_weight_bits=layout.bits,
        block_size=layout.group,
        weights_prepacked=0,
        **attributes,
    )


def shared_expert(e: Emitter, path: str, x: str, block: Sequence[Linear], gate: Linear) -> str:
    """sigmoid(gate(x)) * the gated feed-forward block (gate, up, down): an expert for all tokens.

    `gate` has one output and is never quantised.
    """
    fed = gated_mlp(e, path, x, block[0], block[1], block[2])
    matrix = e.weights.floats(gate.weight, f"{name_of(path)}.gate")
    share = e.graph.node(f"{path}/gate/FusedMatMul", [x, matrix.data], domain=MS, transB=1)
    share = e.graph.node(f"{path}/gate/Sigmoid", [share])
    return e.graph.node(f"{path}/gate/Mul", [fed, share])


def _router_logits(e: Emitter, path: str, x: str, router: Linear) -> str:
    """(B * S, experts)."""
    label = f"{name_of(path)}.router"
    matrix = e.weights.floats(router.weight, label)
    shape = e.graph.constant(f"{label}.flat", np.array([-1, e.decoder.hidden_size], np.int64))
    flat = e.graph.node(f"{path}/router/Reshape", [x, shape])
    inputs = [flat, matrix.data]
    logits = e.graph.node(f"{path}/router/FusedMatMul", inputs, domain=MS, transB=1)
    if router.bias is None:
        return logits
    bias = e.weights.vector([router.bias], f"{label}.bias")
    return e.graph.node(f"{path}/router/Add", [logits, bias])


def _layout(e: Emitter, experts: Experts) -> Layout:
    """How both tensors are stored: the operators take one width and one group for the two.

    Experts whose sizes the groups do not divide stay floats. Raises UnsupportedModel for blocks
    with minimums: inside an operator that computes whole experts there is no place to add them.
    """
    gate_up, down = (e.weights.layout(name) for name in (experts.gate_up, experts.down))
    if gate_up.has_correction or gate_up.input_order:
        raise UnsupportedModel(
            "the experts of this model are stored in blocks with minimums or in permuted order, "
            "which the mixture-of-experts operator cannot hold as they are; "
            "choose the recipe q8 (as good) or q4 (smaller)",
            tensor=experts.gate_up,
        )
    columns = [e.weights.columns(name) for name in (experts.gate_up, experts.down)]
    group = min(gate_up.group, down.group)
    while group > _SMALLEST_GROUP and any(count % group for count in columns):
        group //= 2
    if not (gate_up.bits and down.bits) or any(count % group for count in columns):
        return Layout(0)
    bits = max(gate_up.bits, down.bits)
    # With one group in a row, the operators take zero points in another arrangement.
    asymmetric = gate_up.asymmetric and down.asymmetric and min(columns) > group
    return replace(gate_up, bits=bits, group=group, asymmetric=asymmetric)


def _stacked(e: Emitter, count: int, name: str, label: str, layout: Layout) -> Matrix:
    """The constants of a stacked tensor, in the shape the operators take."""
    if not layout.bits:
        matrix = e.weights.floats(name, label)
        e.graph.reshape(matrix.data, (count, matrix.rows // count, matrix.columns))
        return matrix
    matrix = e.weights.matrix([name], label, layout=layout)
    rows = matrix.rows // count
    e.graph.reshape(matrix.data, (count, rows, matrix.columns * matrix.bits // 8))
    e.graph.reshape(matrix.scales, (count, rows, matrix.groups))
    if matrix.zero_points:
        e.graph.reshape(matrix.zero_points, (count, rows, -(-matrix.groups // 2)))
    return matrix
