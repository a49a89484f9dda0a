"""What a model's layers are given, measured on its own text, and what 4-bit weights gain by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.core.errors import InvalidRequest
from ohmygpu.core.records import CALIBRATION_INDEX, CALIBRATION_PARTS
from ohmygpu.runtime_onnx import calibrate as module
from ohmygpu.runtime_onnx.calibrate import CalibrateJob, calibrate
from ohmygpu.runtime_onnx.model import check_files
from tests.daemon.fakes import compiled_model
from tests.ladder.models import Case, cases
from tests.onnx_run import OnnxRun

CASE = cases("llama")["grouped"]
TOKENS = 24


def compile_tiny(case: Case, folder: Path, recipe: str, **options: Any) -> Path:
    folder.mkdir()
    target = recipes.target("cpu")
    decoder, _ = write_graph(
        case.source(), folder, recipes.recipe(recipe), target, lambda done, total: None, **options
    )
    compiled_model(
        context_length=decoder.context_tokens,
        vocab_size=decoder.vocab_size,
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.cache_dim,
        kv_dtype="float32",
        files={},
    ).save(folder)
    return folder


@pytest.fixture
def looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the float32 compile, the folder of its moments)."""
    monkeypatch.setattr(module, "TOKENS", TOKENS)
    model = compile_tiny(CASE, tmp_path / "model", "f32", show_inputs=True)
    moments = tmp_path / "moments"
    moments.mkdir()
    calibrate(CalibrateJob(folder=str(model), output=str(moments), threads=1))
    return model, moments


def test_every_linear_layer_but_the_head_is_known_and_those_with_one_input_share_it(
    looked_into: tuple[Path, Path],
) -> None:
    index = json.loads((looked_into[1] / CALIBRATION_INDEX).read_text())
    linears = {name for name in CASE.arrays if name.endswith("proj.weight")}
    assert set(index) == linears
    prefix = "model.layers.1"
    assert len({index[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"}) == 1
    assert len({index[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")}) == 1
    assert len(set(index.values())) == 4 * 2  # in each of two layers: qkv, o, gate and up, down


def test_the_first_layers_moments_are_those_of_the_text(
    looked_into: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, moments = looked_into
    compiled = check_files(model)
    text = module.generate(model, compiled, 1, lambda done: None)
    assert text.shape == (module.SEQUENCES, TOKENS)
    embedded = CASE.arrays["model.embed_tokens.weight"][text].reshape(-1, 64)
    scale = np.sqrt((embedded**2).mean(axis=1, keepdims=True) + 1e-5)
    x = embedded / scale * CASE.arrays["model.layers.0.input_layernorm.weight"]
    index = json.loads((moments / CALIBRATION_INDEX).read_text())
    found = np.load(moments / index["model.layers.0.self_attn.q_proj.weight"])
    np.testing.assert_allclose(found["squares"], (x * x).sum(axis=0), rtol=1e-3)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(found["moments"], x.T @ x, rtol=1e-3, atol=1e-3)


def test_the_text_is_what_the_model_finds_likely(looked_into: tuple[Path, Path]) -> None:
    model, _ = looked_into
    text = module.generate(model, check_files(model), 1, lambda done: None)
    run = OnnxRun(model, length=TOKENS)
    chosen, uniform = [], []
    for row in text:
        logits = run.prefill(list(map(int, row)))
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        chosen.append(logits[np.arange(TOKENS - 1), row[1:]].mean())
        uniform.append(logits[:-1].mean())
    assert np.mean(chosen) > np.mean(uniform) + 0.5


def test_layers_are_looked_into_a_few_at_a_time_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_into: tuple[Path, Path]
) -> None:
    monkeypatch.setattr("ohmygpu.convert.calibration._BUDGET_BYTES", 40_000)
    model = compile_tiny(CASE, tmp_path / "small", "f32", show_inputs=True)
    parts = json.loads((model / CALIBRATION_PARTS).read_text())
    assert len(parts) > 2
    moments = tmp_path / "again"
    moments.mkdir()
    calibrate(CalibrateJob(folder=str(model), output=str(moments), threads=1))
    name = "model.layers.1.mlp.down_proj.weight"
    files = [
        folder / json.loads((folder / CALIBRATION_INDEX).read_text())[name]
        for folder in (looked_into[1], moments)
    ]
    for kind in ("moments", "squares"):
        whole, small = (np.load(file)[kind] for file in files)
        np.testing.assert_allclose(whole, small, rtol=1e-4, atol=1e-4)


def test_weights_rounded_by_their_inputs_stay_closer_on_such_text(
    tmp_path: Path, looked_into: tuple[Path, Path]
) -> None:
    model, moments = looked_into
    plain = compile_tiny(CASE, tmp_path / "plain", "q4")
    knowing = compile_tiny(CASE, tmp_path / "knowing", "q4-high", calibration=moments)
    text = module.generate(model, check_files(model), 1, lambda done: None)
    errors = []
    for folder in (plain, knowing):
        run, reference = OnnxRun(folder, length=TOKENS), OnnxRun(model, length=TOKENS)
        rows = [list(map(int, row)) for row in text[:8]]
        errors.append(sum(np.linalg.norm(run.prefill(r) - reference.prefill(r)) for r in rows))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("data", [{}, {"folder": "a"}, {"folder": "a", "output": "b", "c": 1}])
def test_a_job_that_is_none_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not a calibration job"):
        CalibrateJob.from_dict(data)
