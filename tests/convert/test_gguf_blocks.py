"""Block types: the reference decoder's values, bit for bit, in float32 and as MatMulNBits codes."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ohmygpu.convert.gguf_blocks import BLOCK_TYPES, dequantize, repack
from ohmygpu.convert.source import QuantizedBlocks
from ohmygpu.core.errors import CorruptFile
from tests.convert.gguf_files import SCALE_OFFSETS, random_blocks

TYPES = sorted(BLOCK_TYPES)


def _reference(type_name: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    return values


@pytest.mark.parametrize("type_name", TYPES)
def test_sizes_are_those_of_the_format(type_name: str) -> None:
    block = BLOCK_TYPES[type_name]
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    assert (block.elements, block.nbytes) == sizes


@pytest.mark.parametrize("type_name", TYPES)
def test_dequantised_rows_equal_the_reference_bit_for_bit(type_name: str) -> None:
    raw = random_blocks(type_name, 64, 1024, np.random.default_rng(1))
    ours, reference = dequantize(BLOCK_TYPES[type_name], raw), _reference(type_name, raw)
    np.testing.assert_array_equal(ours.view(np.uint32), reference.view(np.uint32))


@pytest.mark.parametrize("type_name", TYPES)
def test_repacked_codes_give_the_reference_weights_exactly(type_name: str) -> None:
    block = BLOCK_TYPES[type_name]
    raw = random_blocks(type_name, 64, 1024, np.random.default_rng(2))
    blocks = repack(block, raw)
    assert (blocks.bits, blocks.block_size) == (block.bits, block.group)
    assert blocks.codes.shape == (64, 1024 // block.group, block.group * block.bits // 8)
    assert (blocks.correction is not None) == block.has_minima
    np.testing.assert_array_equal(blocks.dequantize(), _reference(type_name, raw))


def _any_scales(type_name: str, seed: int) -> NDArray[np.uint8]:
    """Random rows with every kind of finite scale: subnormal, huge, negative, zero."""
    rng = np.random.default_rng(seed)
    raw = random_blocks(type_name, 64, 1024, rng)
    blocks = raw.reshape(64, -1, BLOCK_TYPES[type_name].nbytes)
    for offset in SCALE_OFFSETS[type_name]:
        bits = rng.integers(0, 1 << 16, blocks.shape[:2]).astype("<u2")
        bits[(bits & 0x7C00) == 0x7C00] = 0x8001  # no infinity: the smallest negative number
        bits[:5, 0] = 0x7BFF, 0xFBFF, 0x0001, 0x0000, 0x8000
        blocks[..., offset : offset + 2] = bits[..., None].view(np.uint8)
    if type_name == "MXFP4":
        blocks[..., 0] = rng.integers(0, 253, blocks.shape[:2])
    return raw


@pytest.mark.parametrize("type_name", TYPES)
def test_dequantised_rows_equal_the_reference_whatever_their_scales(type_name: str) -> None:
    raw = _any_scales(type_name, 8)
    reference = _reference(type_name, raw)
    np.testing.assert_array_equal(dequantize(BLOCK_TYPES[type_name], raw), reference)
    if not BLOCK_TYPES[type_name].has_minima:
        found = repack(BLOCK_TYPES[type_name], raw).dequantize()
        np.testing.assert_array_equal(found, reference)


@pytest.mark.parametrize("type_name", [name for name in TYPES if BLOCK_TYPES[name].has_minima])
def test_scale_and_minimum_of_any_size_cost_one_rounding_at_most(type_name: str) -> None:
    rng = np.random.default_rng(3)
    raw = random_blocks(type_name, 64, 1024, rng).reshape(64, -1, BLOCK_TYPES[type_name].nbytes)
    for offset in SCALE_OFFSETS[type_name]:
        scale = rng.standard_normal(raw.shape[:2]) * 10.0 ** rng.uniform(-6, 3, raw.shape[:2])
        raw[..., offset : offset + 2] = scale.astype("<f2")[..., None].view(np.uint8)
    rows = raw.reshape(64, -1)
    blocks, reference = repack(BLOCK_TYPES[type_name], rows), _reference(type_name, rows)
    assert blocks.correction is not None
    group = blocks.block_size
    largest = np.abs(blocks.correction) + np.abs(blocks.scales) * 2.0 ** (blocks.bits - 1)
    bound = np.repeat(largest, group, axis=1) * 2.0**-23
    assert (np.abs(blocks.dequantize() - reference) <= bound).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_onnx_runtime_multiplies_by_the_repacked_weights(type_name: str) -> None:
    rng = np.random.default_rng(4)
    raw = random_blocks(type_name, 48, 512, rng)
    inputs = rng.standard_normal((3, 512)).astype(np.float32)
    expected = inputs.astype(np.float64) @ _reference(type_name, raw).astype(np.float64).T
    found = _matmul_nbits(inputs, repack(BLOCK_TYPES[type_name], raw))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def _matmul_nbits(inputs: NDArray[np.float32], blocks: QuantizedBlocks) -> NDArray[np.float32]:
    """inputs @ weights.T by MatMulNBits in float32, the correction by block sums and Gemm."""
    rows, groups, _ = blocks.codes.shape
    columns = groups * blocks.block_size
    tensors = [
        numpy_helper.from_array(blocks.codes, "codes"),
        numpy_helper.from_array(blocks.scales, "scales"),
    ]
    attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": blocks.bits}
    attributes |= {"block_size": blocks.block_size, "accuracy_level": 0}
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes
        )
    ]
    if blocks.correction is not None:
        tensors += [
            numpy_helper.from_array(blocks.correction, "correction"),
            numpy_helper.from_array(np.array([-1, groups, blocks.block_size]), "shape"),
            numpy_helper.from_array(np.array([2]), "axis"),
        ]
        nodes[0].output[0] = "product"
        nodes += [
            helper.make_node("Reshape", ["x", "shape"], ["split"]),
            helper.make_node("ReduceSum", ["split", "axis"], ["sums"], keepdims=0),
            helper.make_node("Gemm", ["sums", "correction", "product"], ["y"], transB=1),
        ]
    graph = helper.make_graph(
        nodes,
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, rows])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: NDArray[np.float32] = session.run(None, {"x": inputs})[0]
    return result


@pytest.mark.parametrize("type_name", [name for name in TYPES if SCALE_OFFSETS[name]])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_scale_that_is_no_finite_number_is_refused(type_name: str, bad: float) -> None:
    raw = random_blocks(type_name, 2, 256, np.random.default_rng(5))
    offset = SCALE_OFFSETS[type_name][0]
    raw[1, offset : offset + 2] = np.array([bad], "<f2").view(np.uint8)
    with pytest.raises(CorruptFile, match="finite"):
        dequantize(BLOCK_TYPES[type_name], raw)


def test_an_mxfp4_scale_beyond_float32_is_refused() -> None:
    raw = random_blocks("MXFP4", 1, 32, np.random.default_rng(6))
    raw[0, 0] = 255
    with pytest.raises(CorruptFile, match="too large"):
        repack(BLOCK_TYPES["MXFP4"], raw)


def test_a_ternary_weight_that_is_not_ternary_is_refused() -> None:
    raw = random_blocks("TQ2_0", 1, 256, np.random.default_rng(7))
    raw[0, 5] = 0xFF
    with pytest.raises(CorruptFile, match="TQ2_0"):
        repack(BLOCK_TYPES["TQ2_0"], raw)
