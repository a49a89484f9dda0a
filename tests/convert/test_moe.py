"""Mixtures of experts in every recipe, on tiny models."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.recipes import Recipe, Target
from ohmygpu.convert.source import QuantizedBlocks, Source, open_source
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.ladder.checks import distance
from tests.ladder.models import PROMPT, Case, cases
from tests.memory_source import MemorySource, random_blocks
from tests.onnx_run import OnnxRun

Float32 = np.ndarray[Any, np.dtype[np.float32]]

WITHOUT_INT8 = Target("cpu", "float32", 0)
CASE = cases("qwen3_moe")["sums_to_one"]
GPT_OSS = cases("gpt_oss")["clamped"]


@pytest.fixture(autouse=True)
def without_int8_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let QMoE multiply 8-bit experts in float32, so that only the weights are compared."""
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "fp32")


def logits(source: Source, folder: Path, recipe: str, target: Target = WITHOUT_INT8) -> Float32:
    folder.mkdir()
    write_graph(source, folder, recipes.recipe(recipe), target, lambda done, total: None)
    return OnnxRun(folder, 1, PROMPT).prefill(CASE.token_ids[:PROMPT])


def operators(folder: Path) -> set[str]:
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    return {node.op_type for node in nodes if node.op_type.endswith("MoE")}


def blocked(case: Case, bits: int, size: int, *, minimums: bool = False) -> MemorySource:
    rng = np.random.default_rng(5)
    blocks: dict[str, QuantizedBlocks] = {}
    for name, array in case.arrays.items():
        if ".experts." in name:
            rows, columns = array.shape
            blocks[name] = random_blocks(rng, (rows, columns), bits, size, minimums)
    rest = {name: array for name, array in case.arrays.items() if name not in blocks}
    return MemorySource(case.config, rest, blocks)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (4, 16), (8, 32), (8, 16)])
def test_blocks_of_experts_compute_what_their_weights_do(
    bits: int, size: int, tmp_path: Path
) -> None:
    source = blocked(CASE, bits, size)
    exact = logits(source, tmp_path / "exact", "exact")
    assert distance(exact, logits(source, tmp_path / "f32", "f32")) < 1e-5
    assert operators(tmp_path / "exact") == {"QMoE"}


def test_experts_with_minimums_are_refused_by_exact_and_taken_by_others(tmp_path: Path) -> None:
    source = blocked(CASE, 4, 32, minimums=True)
    with pytest.raises(UnsupportedModel, match="choose the recipe q8"):
        logits(source, tmp_path / "exact", "exact")
    wanted = logits(source, tmp_path / "f32", "f32")
    assert distance(logits(source, tmp_path / "q8", "q8"), wanted) < 0.15


class _ExpertsAlone(Recipe):
    """4 bits for experts, floats for everything else."""

    def bits(self, name: str, layers: int) -> int:
        return 4 if ".experts." in name else 0


def constant(folder: Path, name: str) -> Any:
    model = onnx.load(folder / "model.onnx")
    found = next(item for item in model.graph.initializer if item.name == name)
    return onnx.numpy_helper.to_array(found, str(folder))


def test_q4_experts_compute_what_their_codes_scales_and_zero_points_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("mixtral")["two_of_four"]
    monkeypatch.setattr(
        recipes, "RECIPES", {**recipes.RECIPES, "experts": _ExpertsAlone("experts", 4, 0, 0)}
    )
    found = logits(case.source(), tmp_path / "q4", "experts")
    stated = case.source()
    kinds = {"gate_up": ("w1", "w3"), "down": ("w2",)}
    for layer in range(2):
        for kind, parts in kinds.items():
            name = f"model.layers.{layer}.moe.experts.{kind}_proj"
            codes = constant(tmp_path / "q4", f"{name}.weight_q4")  # (experts, rows, columns / 2)
            scales = constant(tmp_path / "q4", f"{name}.scales")
            zeros = constant(tmp_path / "q4", f"{name}.zero_points")
            zeros = np.stack((zeros & 15, zeros >> 4), -1).reshape(*zeros.shape[:2], -1)
            zeros = zeros[..., : scales.shape[-1], None].astype(np.float32)
            codes = np.stack((codes & 15, codes >> 4), -1).reshape(*scales.shape, -1)
            weights = ((codes - zeros) * scales[..., None]).reshape(*codes.shape[:2], -1)
            for expert, number in np.ndindex(len(weights), len(parts)):
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                rows = weights[expert, number :: len(parts)]
                assert np.abs(rows - stated.arrays[f"{prefix}.{parts[number]}.weight"]).max() < 0.1
                stated.arrays[f"{prefix}.{parts[number]}.weight"] = rows.astype(np.float32)
    assert distance(found, logits(stated, tmp_path / "f32", "f32")) < 1e-5


def test_experts_that_groups_do_not_divide_stay_floats(tmp_path: Path) -> None:
    case = cases("mixtral")["odd_inner"]
    found = logits(case.source(), tmp_path / "q8", "q8")
    assert operators(tmp_path / "q8") == {"MoE"}
    assert distance(found, logits(case.source(), tmp_path / "f32", "f32")) < 0.15


def test_another_activation_of_the_experts_is_refused(tmp_path: Path) -> None:
    source = CASE.source()
    source.config["hidden_act"] = "gelu"
    with pytest.raises(UnsupportedModel, match="'gelu'"):
        logits(source, tmp_path / "f32", "f32")


def test_more_experts_used_than_there_are_is_a_damaged_config(tmp_path: Path) -> None:
    source = CASE.source()
    source.config["num_experts_per_tok"] = 99
    with pytest.raises(CorruptFile, match="99 of 6 experts"):
        logits(source, tmp_path / "f32", "f32")


def mxfp4_values(blocks: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> Float32:
    """The format's own definition: E2M1 with a power of two per 32 values."""
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = np.array(half + [-value for value in half], np.float32)
    values = np.stack((table[blocks & 15], table[blocks >> 4]), axis=-1)
    values = values.reshape(*blocks.shape[:-1], 32) * np.exp2(scales[..., None].astype("f4") - 127)
    found: Float32 = values.reshape(*scales.shape[:-1], -1).astype(np.float32)
    return found


def write_mxfp4(folder: Path, **changes: Any) -> tuple[Source, dict[str, Float32]]:
    """(the checkpoint as files have it, the same weights as floats)."""
    rng = np.random.default_rng(6)
    stored: dict[str, np.ndarray[Any, Any]] = {}
    floats: dict[str, Float32] = {}
    for name, array in GPT_OSS.arrays.items():
        floats[name] = stored[name] = array
        if array.ndim == 3:  # experts, inputs, outputs
            count, columns, rows = array.shape
            shape = (count, rows, columns // 32)
            del stored[name]
            stored[f"{name}_blocks"] = rng.integers(0, 256, (*shape, 16), dtype=np.uint8)
            stored[f"{name}_scales"] = rng.integers(121, 125, shape, dtype=np.uint8)
            values = mxfp4_values(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            floats[name] = np.ascontiguousarray(values.swapaxes(1, 2))
    stored |= changes
    config = {**GPT_OSS.config, "quantization_config": {"quant_method": "mxfp4"}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(stored, folder / "model.safetensors")
    return open_source({path.name: path for path in folder.iterdir()}), floats


@pytest.mark.parametrize("recipe", ["exact", "f32"])
def test_mxfp4_experts_compute_what_their_floats_do(recipe: str, tmp_path: Path) -> None:
    source, floats = write_mxfp4(tmp_path / "repo")
    with closing(source):
        assert source.quantization == "mxfp4"
        found = logits(source, tmp_path / "mxfp4", recipe)
    plain = MemorySource(GPT_OSS.config, floats)
    assert distance(found, logits(plain, tmp_path / "plain", "f32")) < 1e-5


def test_mxfp4_scales_that_do_not_fit_or_are_no_numbers_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj_scales"
    shape = (4, 64, 2)
    with pytest.raises(CorruptFile, match="do not fit"):
        write_mxfp4(tmp_path / "shape", **{name: np.full((4, 64, 3), 120, np.uint8)})
    source, _ = write_mxfp4(tmp_path / "nan", **{name: np.full(shape, 255, np.uint8)})
    with closing(source), pytest.raises(CorruptFile, match="NaN"):
        logits(source, tmp_path / "graph", "exact")
