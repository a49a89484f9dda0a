"""A small graph with the inputs and outputs of an exported one, and its twin in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from ohmygpu.core.records import CompiledModel, ExportedGraph

VOCABULARY, WIDTH, CONTEXT = 32, 4, 64
_PAST, _PRESENT = "input.past_key_values.layers.0", "output.past_key_values.layers.0"
_GRAPH = """
<ir_version: 9, opset_import: ["": 18]>
step (
    int64[B, S] input_ids, int64[B, T] attention_mask, int64[B, S] position_ids,
    float[B, 1, P, 4] past_keys, float[B, 1, P, 4] past_values
) => (float[B, Z, 32] logits, float[B, 1, T, 4] present_keys, float[B, 1, T, 4] present_values) {
    token = Gather (table, input_ids)
    position = Gather (positions, position_ids)
    x = Add (token, position)
    keys = Unsqueeze (x, one)
    present_keys = Concat <axis = 2> (past_keys, keys)
    twice = Add (keys, keys)
    present_values = Concat <axis = 2> (past_values, twice)
    turned = Transpose <perm = [0, 1, 3, 2]> (present_keys)
    scores = MatMul (keys, turned)
    total = Shape <start = 1, end = 2> (attention_mask)
    new = Shape <start = 1, end = 2> (input_ids)
    total_ = Squeeze (total)
    new_ = Squeeze (new)
    past_ = Sub (total_, new_)
    columns = Range (zero_, total_, one_)
    rows = Range (past_, total_, one_)
    rows_ = Unsqueeze (rows, one)
    causal = LessOrEqual (columns, rows_)
    told = Cast <to = 9> (attention_mask)
    told_ = Unsqueeze (told, one_two)
    seen = And (causal, told_)
    masked = Where (seen, scores, low)
    weights = Softmax <axis = -1> (masked)
    y = MatMul (weights, present_values)
    y_ = Squeeze (y, one)
    END
    logits = MatMul (kept, head)
}
"""
_LAST = "kept = Slice (y_, minus_one, end, one)"
_ALL = "kept = Identity (y_)"


def constants() -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng(5)

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.normal(size=shape).astype(np.float32)

    return {
        "table": normal(VOCABULARY, WIDTH),
        "positions": normal(CONTEXT, WIDTH),
        "head": normal(WIDTH, VOCABULARY),
        "one": np.array([1]),
        "one_two": np.array([1, 2]),
        "minus_one": np.array([-1]),
        "end": np.array([CONTEXT * 2]),
        "zero_": np.array(0),
        "one_": np.array(1),
        "low": np.array(-1e30, np.float32),
    }


def session(last_only: bool = True) -> Any:
    model = parser.parse_model(_GRAPH.replace("END", _LAST if last_only else _ALL))
    for name, value in constants().items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for old, new in (("past", _PAST), ("present", _PRESENT)):
        for part in ("keys", "values"):
            _rename(model.graph, f"{old}_{part}", f"{new}.{part}")
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def compiled(last_only: bool = True, batches: bool = True) -> CompiledModel:
    names = [(f"{_PAST}.{part}", f"{_PRESENT}.{part}", 1, WIDTH) for part in ("keys", "values")]
    return CompiledModel(
        family="tiny",
        converter_version=1,
        recipe="f32",
        target="cpu",
        context_length=CONTEXT,
        vocab_size=VOCABULARY,
        layers=1,
        kv_heads=1,
        head_dim=WIDTH,
        kv_dtype="float32",
        parameters=1,
        weights_bytes=1,
        source_format="safetensors",
        quantization="f32",
        hidden_size=WIDTH,
        heads=1,
        feed_forward_length=0,
        rope_theta=0.0,
        norm_epsilon=0.0,
        bos_token_id=None,
        eos_token_ids=(0,),
        exported=ExportedGraph(
            "a test",
            ("input_ids", "attention_mask", "position_ids"),
            tuple(names),
            last_only,
            batches,
        ),
    )


def expected(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Logits (V,) after `tokens`."""
    known = constants()
    x = known["table"][list(tokens)] + known["positions"][: len(tokens)]  # (T, D)
    scores = x[-1] @ x.T
    weights = np.exp(scores - scores.max())
    hidden = (weights / weights.sum()) @ (2 * x)
    logits: NDArray[np.float32] = hidden @ known["head"]
    return logits


def _rename(graph: Any, old: str, new: str) -> None:
    for value in (*graph.input, *graph.output):
        if value.name == old:
            value.name = new
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
