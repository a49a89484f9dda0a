"""The recipes of 16-bit floats, f16 and bf16: types, values, and weights used where they lie.

ONNX Runtime computes in float16 on a CPU, slowly, and not at all in bfloat16. A bfloat16 graph is
checked by turning it into the float32 graph of the same nodes and the same, rounded weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.graph import DATA_FILE
from ohmygpu.convert.safetensors import SafetensorsSource
from ohmygpu.convert.source import Source
from ohmygpu.core import files
from ohmygpu.core.errors import CorruptFile, InvalidRequest
from ohmygpu.core.records import GRAPH_FILE
from tests.ladder.checks import Bench, distance
from tests.ladder.models import Case, Float32, cases, families, golden
from tests.memory_source import MemorySource
from tests.onnx_run import OnnxRun

HALVES = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}
NotImplemented_ = onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented
CUDA = recipes.target("cuda")


def compile_half(source: Source, recipe: str, folder: Path, overflows: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    chosen = recipes.recipe(recipe)
    target = recipes.typed(CUDA, chosen, overflows)
    write_graph(source, folder, chosen, target, lambda done, total: None)
    return folder


def as_float32(folder: Path, like: Path) -> Path:
    """The graph of `folder` with float32 in place of bfloat16, and the constants of `like`.

    `like` is the float32 graph of the same model: its constants, rounded, have to be those of the
    bfloat16 graph. What remains to be compared is what the nodes compute.
    """
    model = onnx.load(folder / GRAPH_FILE)  # with external data
    unrounded = {t.name: t for t in onnx.load(like / GRAPH_FILE).graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            wanted = numpy_helper.to_array(unrounded[tensor.name]).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), wanted)
            tensor.CopyFrom(unrounded[tensor.name])
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    widened = folder / "widened"
    widened.mkdir()
    onnx.save(model, widened / GRAPH_FILE)
    return widened


def compile_f32(source: Source, folder: Path) -> Path:
    folder.mkdir()
    recipe, cpu = recipes.recipe("f32"), recipes.target("cpu")
    write_graph(source, folder, recipe, cpu, lambda done, total: None)
    return folder


def logits(case: Case, folder: Path) -> Float32:
    """Of a prompt in chunks, then of single tokens."""
    return Bench(case, folder).all_logits(OnnxRun(folder, length=48), (8, 5))


ONE_OF_EACH = [next(iter(cases(family).values())) for family in families()]
OTHER_ROPES = [case for name, case in cases("llama").items() if name != "grouped"]


@pytest.mark.parametrize("case", [*ONE_OF_EACH, *OTHER_ROPES], ids=str)
def test_a_bfloat16_graph_is_the_float32_graph_with_rounded_constants(
    case: Case, tmp_path: Path
) -> None:
    half = compile_half(case.source(), "bf16", tmp_path / "bf16")
    wanted = compile_f32(case.source(), tmp_path / "f32")
    found = as_float32(half, wanted)
    assert distance(logits(case, found), logits(case, wanted)) <= 1e-5


@pytest.mark.parametrize("case", [cases("phi")["phi_2"], cases("mixtral")["window"]], ids=str)
def test_a_float16_graph_computes_almost_what_float32_does(case: Case, tmp_path: Path) -> None:
    half = compile_half(case.source(), "f16", tmp_path / "f16")
    assert distance(logits(case, half), golden(case.family)[case.name]) <= 0.02


EVERY_CAST = [
    cases("llama")["grouped"],
    cases("llama")["longrope"],  # cos and sin are computed
    cases("ministral3")["past"],  # queries get a temperature
    cases("gemma2")["capped"],  # logits too
    cases("qwen3_moe")["sums_to_one"],
]


@pytest.mark.parametrize("recipe", HALVES)
@pytest.mark.parametrize("case", EVERY_CAST, ids=str)
def test_all_floats_are_of_the_recipe_but_logits_and_what_rope_computes(
    case: Case, recipe: str, tmp_path: Path
) -> None:
    folder = compile_half(case.source(), recipe, tmp_path)
    check_types(folder, recipe)
    graph = onnx.load(folder / GRAPH_FILE, load_external_data=False).graph
    weights = {name for name in constants(graph) if name.endswith((".weight", ".bias"))}
    assert weights
    assert {constants(graph)[name].data_type for name in weights} == {HALVES[recipe]}
    other = HALVES["bf16" if recipe == "f16" else "f16"]
    assert other not in set(kinds(graph))
    types = {
        value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]
    }
    assert types.pop("logits") == TensorProto.FLOAT
    caches = [name for name in types if name.startswith(("past_key", "present"))]
    assert len(caches) == 4 * int(case.text_config["num_hidden_layers"])
    assert {types[name] for name in caches} == {HALVES[recipe]}


def check_types(folder: Path, recipe: str) -> None:
    """Let ONNX Runtime infer every value's type, and hold it against the operators' schemas.

    It does that before it looks for kernels, of which the CPU lacks those for bfloat16.
    """
    providers = ["CPUExecutionProvider"]
    if recipe == "f16":
        onnxruntime.InferenceSession(folder / GRAPH_FILE, providers=providers)
        return
    with pytest.raises(NotImplemented_, match="Could not find an implementation"):
        onnxruntime.InferenceSession(folder / GRAPH_FILE, providers=providers)


def constants(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def kinds(graph: onnx.GraphProto) -> Iterator[int]:
    """Types of the graph's constants, inputs and outputs, and of what is cast."""
    yield from (tensor.data_type for tensor in graph.initializer)
    for value in [*graph.input, *graph.output]:
        yield value.type.tensor_type.elem_type
    for node in graph.node:
        if node.op_type == "Cast":
            yield helper.get_node_attr_value(node, "to")


@pytest.mark.parametrize(
    ("recipe", "overflows", "dtype"),
    [
        ("f16", False, "float16"),
        ("f16", True, "float16"),  # asked for by name
        ("bf16", False, "bfloat16"),
        ("q8", False, "float16"),
        ("q8", True, "bfloat16"),
        ("exact", True, "bfloat16"),
    ],
)
def test_a_gpu_computes_in_what_the_recipe_says_or_the_model_needs(
    recipe: str, overflows: bool, dtype: str
) -> None:
    assert recipes.typed(CUDA, recipes.recipe(recipe), overflows).dtype == dtype
    assert recipes.typed(recipes.target("cpu"), recipes.recipe("q8"), overflows).dtype == "float32"


@pytest.mark.parametrize("recipe", ["q8", "q4"])
def test_a_quantised_model_that_overflows_float16_has_bfloat16_between_its_products(
    recipe: str, tmp_path: Path
) -> None:
    case = cases("gemma2")["capped"]
    folder = compile_half(case.source(), recipe, tmp_path, overflows=True)
    graph = onnx.load(folder / GRAPH_FILE, load_external_data=False).graph
    scales = [t for name, t in constants(graph).items() if name.endswith(".scales")]
    assert scales
    assert {tensor.data_type for tensor in scales} == {TensorProto.BFLOAT16}
    assert TensorProto.FLOAT16 not in set(kinds(graph))


@pytest.mark.parametrize("recipe", HALVES)
def test_a_cpu_is_refused_with_what_to_choose(recipe: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{recipe} runs on a GPU only.*choose f32"):
        recipes.check(recipes.recipe(recipe), recipes.target("cpu"), has_blocks=False)
    recipes.check(recipes.recipe(recipe), CUDA, has_blocks=False)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_weight_too_large_for_float16_is_refused_and_bfloat16_offered(
    name: str, tmp_path: Path
) -> None:
    case = cases("llama")["grouped"]
    arrays = {key: array.copy() for key, array in case.arrays.items()}
    arrays[name].flat[3] = -70000
    source = MemorySource(case.config, arrays)
    with pytest.raises(InvalidRequest, match=f"{name} holds 70000.*choose the recipe bf16"):
        compile_half(source, "f16", tmp_path / "f16")
    compile_half(source, "bf16", tmp_path / "bf16")


@contextmanager
def repository(case: Case, folder: Path, recipe: str) -> Iterator[SafetensorsSource]:
    """The case in a SafeTensors file of the recipe's floats."""
    folder.mkdir()
    arrays = {name: array.astype(DTYPES[recipe]) for name, array in case.arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config), encoding="utf-8")
    with closing(SafetensorsSource({path.name: path for path in folder.iterdir()})) as source:
        yield source


def with_hard_links(source: Path, target: Path) -> str:
    os.link(source, target)
    return "link"


@pytest.mark.parametrize("recipe", HALVES)
def test_weights_that_a_file_holds_just_so_are_used_where_they_lie(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "share", with_hard_links)
    case = cases("llama")["grouped"]
    origin = tmp_path / "repository"
    with repository(case, origin, recipe) as source:
        folder = compile_half(source, recipe, tmp_path / "half")
    graph = onnx.load(folder / GRAPH_FILE, load_external_data=False).graph
    placed = locations(graph)
    shared = {name for name, file in placed.items() if file == "source-1.safetensors"}
    assert len(shared) == 2 + 7 * case.config["num_hidden_layers"]  # all matrices
    assert (folder / "source-1.safetensors").samefile(origin / "model.safetensors")
    assert files.used_bytes(folder / "source-1.safetensors") == 0  # removing it gives nothing back
    matrices = sum(array.size for array in case.arrays.values() if array.ndim == 2) * 2
    assert (folder / DATA_FILE).stat().st_size < matrices / 2
    check_types(folder, recipe)
    used = {stored(folder, constants(graph)[name]) for name in shared}
    arrays = [array for array in case.arrays.values() if array.ndim == 2]
    assert used == {array.astype(DTYPES[recipe]).tobytes() for array in arrays}
    if recipe == "f16":
        assert distance(logits(case, folder), golden(case.family)[case.name]) <= 0.02


def test_weights_are_copied_where_the_file_system_cannot_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "share", lambda source, target: None)
    case = cases("llama")["grouped"]
    with repository(case, tmp_path / "repository", "f16") as source:
        folder = compile_half(source, "f16", tmp_path / "half")
    assert set(locations(onnx.load(folder / GRAPH_FILE).graph).values()) <= {DATA_FILE}
    assert {path.name for path in folder.iterdir()} == {GRAPH_FILE, DATA_FILE}
    assert distance(logits(case, folder), golden(case.family)[case.name]) <= 0.02


def test_rows_in_another_order_and_other_floats_are_written(tmp_path: Path) -> None:
    """GLM's files hold gate and up in one matrix, and another type is not what the graph needs."""
    case = cases("glm")["half"]
    for stored, recipe in (("f16", "f16"), ("bf16", "f16")):
        with repository(case, tmp_path / f"repository-{stored}", stored) as source:
            folder = compile_half(source, recipe, tmp_path / stored)
        placed = locations(onnx.load(folder / GRAPH_FILE, load_external_data=False).graph)
        shared = {name for name, file in placed.items() if file != DATA_FILE}
        assert bool(shared) == (stored == recipe)
        assert not any("gate" in name or "up_proj" in name for name in shared)
        assert distance(logits(case, folder), golden(case.family)[case.name]) <= 0.06


def test_weights_used_in_place_are_looked_at_all_the_same(tmp_path: Path) -> None:
    case = cases("llama")["grouped"]
    arrays = {name: array.copy() for name, array in case.arrays.items()}
    name = "model.layers.1.mlp.down_proj.weight"
    arrays[name].flat[-1] = np.nan
    broken = Case(case.family, case.name, case.config)
    broken.__dict__["arrays"] = arrays
    with (
        repository(broken, tmp_path / "repository", "bf16") as source,
        pytest.raises(CorruptFile, match=f"{name} holds NaN"),
    ):
        compile_half(source, "bf16", tmp_path / "half")


def stored(folder: Path, tensor: TensorProto) -> bytes:
    """A constant's bytes. (onnx itself refuses to read files that have more than one name.)"""
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place["offset"]))
        data: bytes = file.read(int(place["length"]))
        return data


def locations(graph: onnx.GraphProto) -> dict[str, str]:
    """The file of each constant that lies in one."""
    return {
        tensor.name: entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
