"""A tiny random Llama-like model with the graph contract of CompiledModel, written in milliseconds.

Two layers, 4 heads of 16 over 2 kv heads, one token per byte: enough to exercise ragged batches,
chunked prefill and prefix reuse bit by bit, without any real weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ohmygpu.core.records import GRAPH_FILE, TEMPLATE_FILE, TOKENIZER_FILE, CompiledModel

LAYERS = 2
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
HIDDEN = HEADS * HEAD_DIM
INNER = 96
BOS = 256
EOS = 257
VOCAB = 258

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}assistant:"
)

_NUMPY = {"float32": np.float32, "float16": np.float16}
_ONNX = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


class _Graph:
    """Collects nodes and initializers; `dtype` is that of weights, activations and KV."""

    def __init__(self, dtype: str, context: int) -> None:
        self.dtype = dtype
        self.context = context
        self.random = np.random.default_rng(7)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        factor = shape[0] ** -0.5 if scale is None else scale
        value = self.random.standard_normal(shape) * factor
        return self.constant(name, value.astype(_NUMPY[self.dtype]))

    def node(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: object
    ) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def norm(self, name: str, value: str) -> str:
        ones = self.constant(f"{name}.weight", np.ones(HIDDEN, _NUMPY[self.dtype]))
        return self.node(
            "SimplifiedLayerNormalization", [value, ones], [f"{name}.out"], axis=-1, epsilon=1e-5
        )

    def layer(self, index: int, hidden: str) -> str:
        name = f"layers.{index}"
        packed = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        normed = self.norm(f"{name}.input_norm", hidden)
        qkv = self.node(
            "MatMul",
            [normed, self.weight(f"{name}.qkv", HIDDEN, packed, scale=0.35)],
            [f"{name}.q"],
        )
        past = f"past_key_values.{index}"
        present = f"present.{index}"
        attention = self.node(
            "GroupQueryAttention",
            [
                *(qkv, "", "", f"{past}.key", f"{past}.value"),
                *("seqlens_k", "total_sequence_length", "cos", "sin"),
            ],
            [f"{name}.attention", f"{present}.key", f"{present}.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        projected = self.node(
            "MatMul", [attention, self.weight(f"{name}.o", HIDDEN, HIDDEN)], [f"{name}.o_out"]
        )
        hidden = self.node("Add", [hidden, projected], [f"{name}.residual"])
        normed = self.norm(f"{name}.post_norm", hidden)
        up = self.node("MatMul", [normed, self.weight(f"{name}.up", HIDDEN, INNER)], [f"{name}.u"])
        active = self.node("Tanh", [up], [f"{name}.tanh"])
        down = self.node(
            "MatMul", [active, self.weight(f"{name}.down", INNER, HIDDEN)], [f"{name}.d"]
        )
        return self.node("Add", [hidden, down], [f"{name}.out"])

    def rotary(self) -> None:
        steps = np.arange(0, HEAD_DIM, 2, dtype=np.float64) / HEAD_DIM
        angles = np.outer(np.arange(self.context), 10000.0**-steps)  # (T, D/2)
        self.constant("cos", np.cos(angles).astype(_NUMPY[self.dtype]))
        self.constant("sin", np.sin(angles).astype(_NUMPY[self.dtype]))

    def model(self) -> onnx.ModelProto:
        kv_type = _ONNX[self.dtype]
        self.rotary()
        embedding = self.weight("embedding", VOCAB, HIDDEN, scale=1.0)
        hidden = self.node("Gather", [embedding, "input_ids"], ["hidden"])
        for index in range(LAYERS):
            hidden = self.layer(index, hidden)
        flat_shape = self.constant("flat_shape", np.array([-1, HIDDEN], np.int64))
        flat = self.node("Reshape", [self.norm("final_norm", hidden), flat_shape], ["flat"])
        rows = self.node("Gather", [flat, "logit_rows"], ["rows"])
        raw = self.node("MatMul", [rows, self.weight("head", HIDDEN, VOCAB, scale=0.5)], ["raw"])
        cast = self.node("Cast", [raw], ["raw32"], to=TensorProto.FLOAT)
        bias = np.full(VOCAB, -1000.0, np.float32)  # only letters and spaces are ever likely
        bias[[ord(letter) for letter in " abcdefghijklmnopqrstuvwxyz"]] = 0.0
        self.node("Add", [cast, self.constant("bias", bias)], ["logits"])
        kv_shape = ["B", KV_HEADS, "T", HEAD_DIM]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
            helper.make_tensor_value_info("logit_rows", TensorProto.INT64, ["R"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["R", VOCAB])]
        for index in range(LAYERS):
            for part in ("key", "value"):
                past, present = f"past_key_values.{index}.{part}", f"present.{index}.{part}"
                inputs.append(helper.make_tensor_value_info(past, kv_type, kv_shape))
                outputs.append(helper.make_tensor_value_info(present, kv_type, kv_shape))
        graph = helper.make_graph(self.nodes, "tiny", inputs, outputs, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write_tokenizer(folder: Path) -> None:
    """One token per byte: tokenizer.json and chat_template.jinja."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {_byte_of(letter): letter for letter in alphabet}
    vocabulary = {by_byte[value]: value for value in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / TOKENIZER_FILE))
    (folder / TEMPLATE_FILE).write_text(TEMPLATE, encoding="utf-8")


def _byte_of(letter: str) -> int:
    """Inverse of the byte-level alphabet (GPT-2): printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if ord(letter) in printable:
        return ord(letter)
    others = [value for value in range(256) if value not in printable]
    return others[ord(letter) - 256]


def write_tiny_model(
    folder: Path, *, context: int = 128, dtype: str = "float32", target: str = "cpu"
) -> CompiledModel:
    """Write graph, tokenizer and compile.json of the tiny model; returns its CompiledModel."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(_Graph(dtype, context).model(), folder / GRAPH_FILE)
    write_tokenizer(folder)
    names = (GRAPH_FILE, TOKENIZER_FILE, TEMPLATE_FILE)
    compiled = CompiledModel(
        family="llama",
        converter_version=1,
        recipe="f32",
        target=target,
        context_length=context,
        vocab_size=VOCAB,
        layers=LAYERS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        kv_dtype=dtype,
        parameters=100_000,
        weights_bytes=(folder / GRAPH_FILE).stat().st_size,
        source_format="safetensors",
        quantization="f32",
        hidden_size=HIDDEN,
        heads=HEADS,
        feed_forward_length=INNER,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
        bos_token="<s>",
        eos_token="</s>",
        files={name: (folder / name).stat().st_size for name in names},
    )
    compiled.save(folder)
    return compiled
