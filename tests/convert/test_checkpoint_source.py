"""Quantised SafeTensors checkpoints: dequantised by their definition, kept bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.graph import DATA_FILE
from ohmygpu.convert.source import Source, open_source
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from ohmygpu.core.records import GRAPH_FILE
from tests.convert import quantised_layers as layers
from tests.convert.quantised_layers import Float32, Layer
from tests.convert.test_compile import EXACT_CPU
from tests.converters.test_llama import assert_close
from tests.ladder.models import Case, cases
from tests.memory_source import MemorySource
from tests.onnx_run import OnnxRun

Quantise = Callable[[str, Float32], Layer]
Opener = Callable[[Path], Source]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 24]}


def compressed(layout: str, kind: str, bits: int, **weights: Any) -> dict[str, Any]:
    settings = {"num_bits": bits, "type": kind, "symmetric": True, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": settings}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


def gptq(bits: int, group: int, **how: Any) -> Quantise:
    return lambda _, weight: layers.gptq_layer(weight, bits, group or weight.shape[1], **how)


@dataclass(frozen=True)
class Stored:
    """A way to store layers; `integers`: `exact` can keep them; `ordered`: columns are permuted."""

    settings: dict[str, Any]
    quantise: Quantise
    integers: bool = True
    ordered: bool = False


STORED: dict[str, Stored] = {
    "gptq": Stored(GPTQ, gptq(4, 32)),
    "gptq int8": Stored(GPTQ | {"bits": 8}, gptq(8, 32)),
    "gptq with zero points": Stored(GPTQ | {"sym": False}, gptq(4, 16, symmetric=False)),
    "gptq int8 with zero points": Stored(GPTQ | {"bits": 8}, gptq(8, 32, symmetric=False)),
    "gptq with act-order": Stored(
        GPTQ | {"desc_act": True}, gptq(4, 32, symmetric=False, act_order=True), ordered=True
    ),
    "gptq with act-order by layer": Stored(
        GPTQ | {"desc_act": True},
        lambda name, weight: layers.gptq_layer(
            weight, 4, 32, act_order=True, seed=sum(name.encode())
        ),
        ordered=True,
    ),
    "gptq int8 with act-order": Stored(
        GPTQ | {"bits": 8}, gptq(8, 16, act_order=True), ordered=True
    ),
    "gptq v2": Stored(
        GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(4, 32, symmetric=False, shift=0)
    ),
    "gptq by row": Stored(GPTQ | {"group_size": -1}, gptq(4, 0, symmetric=False)),
    "awq": Stored(AWQ, lambda _, weight: layers.awq_layer(weight, 32)),
    "fp8": Stored(FP8, lambda _, weight: layers.float8_layer(weight, (48, 24)), integers=False),
    "fp8 per tensor": Stored(
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda _, weight: layers.float8_layer(weight, None, "weight_scale"),
        integers=False,
    ),
    "compressed-tensors fp8": Stored(
        compressed("float-quantized", "float", 8, strategy="channel"),
        lambda _, weight: layers.float8_layer(weight, (1, weight.shape[1]), "weight_scale"),
        integers=False,
    ),
    "compressed-tensors int8": Stored(
        compressed("int-quantized", "int", 8, strategy="channel"),
        lambda _, weight: layers.int8_layer(weight),
    ),
    "compressed-tensors int4": Stored(
        compressed("pack-quantized", "int", 4, strategy="group", group_size=32),
        lambda _, weight: layers.packed_layer(weight, 4, 32),
    ),
    "compressed-tensors int4 with act-order": Stored(
        compressed("pack-quantized", "int", 4, strategy="group", group_size=32, symmetric=False),
        lambda _, weight: layers.packed_layer(weight, 4, 32, symmetric=False, act_order=True),
        ordered=True,
    ),
    "compressed-tensors packed int8": Stored(
        compressed("pack-quantized", "int", 8, strategy="group", group_size=32),
        lambda _, weight: layers.packed_layer(weight, 8, 32, symmetric=False),
    ),
}
KEPT = [name for name, stored in STORED.items() if stored.integers]


def tiny() -> Case:
    return cases("llama")["grouped"]


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write_model(
    folder: Path, settings: dict[str, Any], quantise: Quantise, **changes: Any
) -> dict[str, Float32]:
    """Write a tiny Llama with quantised layers; the weights it stands for."""
    folder.mkdir(exist_ok=True)
    stored: dict[str, Any] = {}
    weights: dict[str, Float32] = {}
    for name, array in tiny().arrays.items():
        weights[name] = array
        if not is_linear(name):
            stored[name] = array
            continue
        prefix = name.removesuffix(".weight")
        layer, weights[name] = quantise(name, array)
        stored |= {f"{prefix}.{suffix}": part for suffix, part in layer.items()}
    stored |= changes
    config = dict(tiny().config) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = {name: np.ascontiguousarray(part) for name, part in stored.items() if part is not None}
    save_file(stored, folder / "model.safetensors")
    return weights


@pytest.fixture
def opened() -> Iterator[Opener]:
    with ExitStack() as stack:

        def get(folder: Path) -> Source:
            source = open_source({path.name: path for path in folder.iterdir()})
            stack.callback(source.close)
            return source

        yield get


@pytest.mark.parametrize("name", STORED)
def test_layers_are_the_weights_their_codes_stand_for(
    name: str, tmp_path: Path, opened: Opener
) -> None:
    weights = write_model(tmp_path, STORED[name].settings, STORED[name].quantise)
    source = opened(tmp_path)
    assert set(source.tensors) == set(weights)
    for tensor, wanted in weights.items():
        assert source.tensors[tensor].shape == wanted.shape
        np.testing.assert_array_equal(source.read(tensor), wanted)
        np.testing.assert_array_equal(source.read_rows(tensor, 3, 21), wanted[3:21])


@pytest.mark.parametrize("name", KEPT)
def test_integers_are_kept_bit_for_bit(name: str, tmp_path: Path, opened: Opener) -> None:
    weights = write_model(tmp_path, STORED[name].settings, STORED[name].quantise)
    source = opened(tmp_path)
    for tensor in filter(is_linear, weights):
        layout = source.block_layout(tensor)
        assert layout is not None
        assert bool(layout.input_order) == STORED[name].ordered
        order = list(layout.input_order) or list(range(weights[tensor].shape[1]))
        for start, stop in ((0, None), (5, 22)):
            blocks = source.blocks(tensor, start, stop)
            assert blocks is not None
            assert (blocks.bits, blocks.block_size) == (layout.bits, layout.block_size)
            assert (blocks.correction is not None) == layout.has_correction
            wanted = weights[tensor][start:stop][:, order]
            np.testing.assert_array_equal(blocks.dequantize(), wanted)
    assert source.block_layout("model.embed_tokens.weight") is None
    assert source.blocks("model.norm.weight") is None


@pytest.mark.parametrize("name", KEPT)
def test_a_graph_of_the_kept_integers_computes_what_the_weights_would(
    name: str, tmp_path: Path, opened: Opener
) -> None:
    weights = write_model(tmp_path / "model", STORED[name].settings, STORED[name].quantise)
    exact, plain = tmp_path / "exact", tmp_path / "plain"
    compile_graph(opened(tmp_path / "model"), "exact", exact)
    compile_graph(MemorySource(tiny().config, weights), "f32", plain)
    assert_close(logits(exact), logits(plain))
    nodes = onnx.load(exact / GRAPH_FILE, load_external_data=False).graph.node
    assert sum(node.op_type == "MatMulNBits" for node in nodes) >= 2 * 5
    assert any("input_order" in node.name for node in nodes) == STORED[name].ordered


@pytest.mark.parametrize("name", ["gptq with act-order by layer", "fp8"])
def test_other_recipes_round_the_dequantised_weights(
    name: str, tmp_path: Path, opened: Opener
) -> None:
    weights = write_model(tmp_path / "model", STORED[name].settings, STORED[name].quantise)
    for folder, source in (
        ("stored", opened(tmp_path / "model")),
        ("plain", MemorySource(tiny().config, weights)),
    ):
        compile_graph(source, "q8", tmp_path / folder)
    stored, plain = (tmp_path / folder for folder in ("stored", "plain"))
    assert (stored / DATA_FILE).read_bytes() == (plain / DATA_FILE).read_bytes()


def test_groups_of_different_sizes_are_dequantised(tmp_path: Path, opened: Opener) -> None:
    weights = write_model(tmp_path, GPTQ, gptq(4, 40))  # 64 columns: 40 and 24
    source = opened(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert source.block_layout(name) is None
    np.testing.assert_array_equal(source.read(name), weights[name])


def test_modules_left_out_by_the_quantiser_stay_as_they_are(tmp_path: Path, opened: Opener) -> None:
    kept = "model.layers.1.mlp.down_proj"
    whole = tiny().arrays[f"{kept}.weight"]
    gone = {f"{kept}.{suffix}": None for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    write_model(tmp_path, GPTQ, gptq(4, 32), **gone, **{f"{kept}.weight": whole})
    source = opened(tmp_path)
    assert source.block_layout(f"{kept}.weight") is None
    np.testing.assert_array_equal(source.read(f"{kept}.weight"), whole)
    compile_graph(source, "exact", tmp_path / "exact")


def test_biases_of_zeros_that_a_quantiser_added_are_left_out(
    tmp_path: Path, opened: Opener
) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    write_model(tmp_path / "zeros", GPTQ, gptq(4, 32), **{name: np.zeros(64, np.float16)})
    compile_graph(opened(tmp_path / "zeros"), "exact", tmp_path / "exact")
    write_model(tmp_path / "ones", GPTQ, gptq(4, 32), **{name: np.ones(64, np.float16)})
    with pytest.raises(UnsupportedModel, match=rf"the weights hold {name}"):
        compile_graph(opened(tmp_path / "ones"), "exact", tmp_path / "refused")


def test_scales_of_activations_and_of_the_cache_are_left_out(
    tmp_path: Path, opened: Opener
) -> None:
    one = np.ones((), np.float32)
    scales = {
        "model.layers.0.mlp.up_proj.input_scale": one,
        "model.layers.0.self_attn.k_scale": one,
    }
    stored = STORED["fp8 per tensor"]
    weights = write_model(tmp_path, stored.settings, stored.quantise, **scales)
    assert set(opened(tmp_path).tensors) == set(weights)


def test_scales_that_are_powers_of_two_may_be_stored_as_such(
    tmp_path: Path, opened: Opener
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    codes = tiny().arrays[name].astype(ml_dtypes.float8_e4m3fn)
    scale = name.replace("weight", "weight_scale_inv")
    stored = {name: codes, scale: np.array([[121]], np.uint8)}
    write_model(tmp_path, FP8 | {"weight_block_size": [128, 128]}, unquantised, **stored)
    found = opened(tmp_path).read(name)
    np.testing.assert_array_equal(found, codes.astype(np.float32) / 64)


Q = "model.layers.0.self_attn.q_proj"
DAMAGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no scales": ("gptq", {f"{Q}.scales": None}, "q_proj has no scales"),
    "scales of another size": (
        "gptq",
        {f"{Q}.scales": np.ones((2, 63), np.float16)},
        "scales and zero points have other sizes",
    ),
    "zero points of another size": (
        "awq",
        {f"{Q}.qzeros": np.zeros((3, 8), np.int32)},
        "scales and zero points have other sizes",
    ),
    "codes as floats": ("gptq", {f"{Q}.qweight": np.ones((8, 64), np.float32)}, "qweight is F32"),
    "groups that do not exist": (
        "gptq",
        {f"{Q}.g_idx": np.full(64, 2**30, np.int32)},
        "do not fit each other",
    ),
    "other bits": ("gptq", {f"{Q}.g_idx": np.zeros(100, np.int32)}, "4 and 8 can be read"),
    "no inputs": ("gptq", {f"{Q}.g_idx": np.zeros(0, np.int32)}, "4 and 8 can be read"),
    "a weight there twice": (
        "gptq",
        {f"{Q}.weight": np.ones((64, 64), np.float32)},
        "twice, quantised and not",
    ),
    "a grid of other blocks": (
        "fp8",
        {f"{Q}.weight_scale_inv": np.ones((5, 3), np.float32)},
        r"shape \[5, 3\], which does not fit",
    ),
    "an absurd shape": (
        "compressed-tensors int4",
        {f"{Q}.weight_shape": np.array([2**40, 2**40], np.int64)},
        "other than 4 or 8 bits",
    ),
    "a negative shape": (
        "compressed-tensors int4",
        {f"{Q}.weight_shape": np.array([-64, 64], np.int64)},
        "do not fit each other",
    ),
    "packed scales of another size": (
        "compressed-tensors int4",
        {f"{Q}.weight_scale": np.ones((7, 5), np.float32)},
        "do not fit each other",
    ),
    "int8 scales of another size": (
        "compressed-tensors int8",
        {f"{Q}.weight_scale": np.ones((7, 1), np.float32)},
        "do not fit each other",
    ),
    "scales that are no numbers": (
        "gptq",
        {f"{Q}.scales": np.full((2, 64), np.nan, np.float16)},
        "q_proj.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_layers_whose_parts_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    stored, changes, message = DAMAGED[name]
    write_model(tmp_path, STORED[stored].settings, STORED[stored].quantise, **changes)
    with pytest.raises((CorruptFile, UnsupportedModel), match=message):
        compile_folder(tmp_path)


def test_codes_without_a_config_that_explains_them_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, {}, gptq(4, 32))
    with pytest.raises(UnsupportedModel, match="does not say how"):
        open_source({path.name: path for path in tmp_path.iterdir()})


def test_a_config_that_promises_codes_which_are_not_there_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, GPTQ, unquantised)
    with pytest.raises(CorruptFile, match="no tensor of them is"):
        open_source({path.name: path for path in tmp_path.iterdir()})


def unquantised(_: str, weight: Float32) -> Layer:
    return {"weight": weight}, weight


def compile_folder(folder: Path) -> None:
    source = open_source({path.name: path for path in folder.iterdir()})
    try:
        compile_graph(source, "exact", folder / "exact")
    finally:
        source.close()


def compile_graph(source: Source, recipe: str, folder: Path) -> None:
    folder.mkdir()
    write_graph(source, folder, recipes.recipe(recipe), EXACT_CPU, lambda done, total: None)


def logits(folder: Path) -> Float32:
    run, ids = OnnxRun(folder, length=48), tiny().token_ids
    return np.concatenate([run.prefill(ids[:20]), run.decode([ids[20]], [21])])
