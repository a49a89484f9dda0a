"""The graph with its KV cache, on a tiny random model: every way to compute a token agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, RuntimeFailure
from ohmygpu.core.records import COMPILE_FILE, GRAPH_FILE, CompiledModel
from ohmygpu.runtime_onnx import model as model_module
from ohmygpu.runtime_onnx.kv_cache import HostKVCache
from ohmygpu.runtime_onnx.model import OnnxModel, check_files
from ohmygpu.runtime_onnx.session import open_session

from .tiny_graph import VOCAB, write_tiny_model

CONTEXT = 128
PROMPTS = [
    [(7 * step + 3 * number) % 26 + 97 for step in range(10 + 9 * number)] for number in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, context=CONTEXT)
    return path


def open_model(folder: Path, slots: int = 4) -> OnnxModel:
    compiled = check_files(folder)
    opened = open_session(folder, compiled, "auto", 1)
    assert (opened.execution_provider, opened.note) == ("CPU", "")
    cache = HostKVCache(compiled, slots, CONTEXT)
    return OnnxModel(opened.session, compiled, cache, CONTEXT)


def prefill(model: OnnxModel, slot: int, tokens: list[int], chunk: int = CONTEXT) -> None:
    for start in range(0, len(tokens), chunk):
        stop = min(start + chunk, len(tokens))
        last = stop == len(tokens)
        model.prefill(slot, tokens[start:stop], start, 0 if last else None)


def row(model: OnnxModel, index: int = 0) -> NDArray[np.float32]:
    return np.array(model.logits(index + 1)[index])


def test_a_chunked_prefill_gives_the_logits_of_a_whole_one(folder: Path) -> None:
    model = open_model(folder)
    prefill(model, 0, PROMPTS[3])
    whole = row(model)
    for chunk in (5, 7, 16, 35):
        prefill(model, 1, PROMPTS[3], chunk)
        np.testing.assert_array_equal(row(model), whole)


def test_a_prompt_is_cut_so_that_written_out_scores_fit_their_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = replace(check_files(folder), score_heads=4)
    session = open_session(folder, compiled, "auto", 1).session
    whole = open_model(folder)
    prefill(whole, 0, PROMPTS[3])
    monkeypatch.setattr(model_module, "SCORES_BYTES", 4 * 4 * len(PROMPTS[3]) * 6)  # six rows
    runs: list[int] = []

    class Session:
        def io_binding(self) -> Any:
            return session.io_binding()

        def run_with_iobinding(self, binding: Any) -> None:
            runs.append(int(cut._total) - sum(runs))
            session.run_with_iobinding(binding)

    cut = OnnxModel(Session(), compiled, HostKVCache(compiled, 4, CONTEXT), CONTEXT)
    prefill(cut, 0, PROMPTS[3])
    assert runs == [6] * 6 + [1]  # 37 tokens
    np.testing.assert_allclose(row(cut), row(whole), rtol=1e-4, atol=1e-4)


def test_decoding_agrees_with_prefilling_one_token_more(folder: Path) -> None:
    model = open_model(folder)
    prefill(model, 0, PROMPTS[2][:-1])
    model.decode([0], PROMPTS[2][-1:], [len(PROMPTS[2]) - 1])
    decoded = row(model)
    prefill(model, 1, PROMPTS[2])
    np.testing.assert_allclose(decoded, row(model), rtol=1e-4, atol=1e-3)


def test_a_ragged_batch_gives_each_row_what_it_gets_alone(folder: Path) -> None:
    model = open_model(folder)
    for slot, prompt in enumerate(PROMPTS):
        prefill(model, slot, prompt)
    pasts = [len(prompt) for prompt in PROMPTS]
    alone = []
    for slot in range(4):
        model.decode([slot], [100 + slot], [pasts[slot]])
        alone.append(row(model))
    model.decode([0, 1, 2, 3], [100, 101, 102, 103], pasts)
    for slot in range(4):
        np.testing.assert_array_equal(row(model, slot), alone[slot])
    model.decode([3, 0], [103, 100], [pasts[3], pasts[0]])  # scattered, and in another order
    np.testing.assert_array_equal(row(model, 0), alone[3])
    np.testing.assert_array_equal(row(model, 1), alone[0])
    model.decode([1, 2], [101, 102], [pasts[1], pasts[2]])  # whose rows have moved by now
    np.testing.assert_array_equal(row(model, 0), alone[1])
    np.testing.assert_array_equal(row(model, 1), alone[2])


def test_a_copied_prefix_continues_like_its_source(folder: Path) -> None:
    model = open_model(folder)
    prefill(model, 0, PROMPTS[3])
    whole = row(model)
    model.cache.copy(0, 2, 0, 20)
    model.prefill(2, PROMPTS[3][20:], 20, 1)
    np.testing.assert_array_equal(row(model, 1), whole)


def test_logits_of_a_chunk_go_to_the_row_asked_for_and_no_other(folder: Path) -> None:
    model = open_model(folder)
    model.logits(4)[:] = -7.0
    model.prefill(0, PROMPTS[0], 0, 2)
    assert (model.logits(4)[[0, 1, 3]] == -7.0).all()
    assert (row(model, 2) != -7.0).any()
    model.logits(4)[:] = -7.0
    model.prefill(1, PROMPTS[0], 0, None)
    assert (model.logits(4) == -7.0).all()


def test_the_whole_context_can_be_filled(folder: Path) -> None:
    model = open_model(folder)
    prefill(model, 0, [97] * (CONTEXT - 1))
    model.decode([0], [98], [CONTEXT - 1])
    assert np.isfinite(row(model)).all()
    assert row(model).shape == (VOCAB,)


def test_gaps_between_rows_are_computed_without_touching_what_they_hold(folder: Path) -> None:
    """What a GPU does: rows cannot move there, so a batch runs over the rows in between."""

    class Unmoving(HostKVCache):
        def arrange(self, slots: Sequence[int]) -> tuple[int, int]:
            return min(slots), max(slots) - min(slots) + 1

    compiled = check_files(folder)
    session = open_session(folder, compiled, "CPU", 1).session
    model = OnnxModel(session, compiled, Unmoving(compiled, 4, CONTEXT), CONTEXT)
    for slot, prompt in enumerate(PROMPTS):
        prefill(model, slot, prompt)
    pasts = [len(prompt) for prompt in PROMPTS]
    model.decode([2], [102], [pasts[2]])
    alone = row(model)
    model.decode([0, 3], [100, 103], [pasts[0], pasts[3]])
    model.decode([2], [102], [pasts[2]])
    np.testing.assert_array_equal(row(model), alone)


def test_a_half_precision_graph_runs_on_the_cpu_when_told_to(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, context=CONTEXT, dtype="float16", target="cuda")
    compiled = check_files(tmp_path)
    session = open_session(tmp_path, compiled, "CPU", 1).session
    model = OnnxModel(session, compiled, HostKVCache(compiled, 2, CONTEXT), CONTEXT)
    prefill(model, 0, PROMPTS[1])
    whole = row(model)
    prefill(model, 1, PROMPTS[1], 7)
    np.testing.assert_allclose(row(model), whole, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    write_tiny_model(tmp_path)
    path = tmp_path / GRAPH_FILE
    if damage == "shorter":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(CorruptFile, match=r"model\.onnx.*pull the model again"):
        check_files(tmp_path)


def test_damage_that_keeps_the_size_is_found_by_loading(tmp_path: Path) -> None:
    compiled = write_tiny_model(tmp_path)
    path = tmp_path / GRAPH_FILE
    path.write_bytes(bytes(path.stat().st_size))
    check_files(tmp_path)
    with pytest.raises((CorruptFile, RuntimeFailure), match=r"damaged|cannot load"):
        open_session(tmp_path, compiled, "CPU", 1)


def test_a_broken_compile_file_is_corrupt(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / COMPILE_FILE).write_text("{")
    with pytest.raises(CorruptFile):
        check_files(tmp_path)


@pytest.fixture
def onnxruntime_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes onnxruntime claim CUDA, as a build with it does on a machine whose driver fails."""
    import onnxruntime

    def install(providers: list[str]) -> None:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
        real = onnxruntime.InferenceSession

        def open_on_cpu(path: str, options: Any, providers: list[Any]) -> Any:
            return real(path, options, providers=["CPUExecutionProvider"])

        monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_cpu)

    return install


def cuda_model(folder: Path) -> CompiledModel:
    return write_tiny_model(folder, context=CONTEXT, dtype="float16", target="cuda")


def test_a_cuda_that_does_not_start_falls_back_to_the_cpu_with_a_reason(
    tmp_path: Path, onnxruntime_with: Any
) -> None:
    compiled = cuda_model(tmp_path)
    onnxruntime_with(["CUDAExecutionProvider", "CPUExecutionProvider"])
    opened = open_session(tmp_path, compiled, "auto", 1)
    assert opened.execution_provider == "CPU"
    assert "driver is version 580" in opened.note


def test_a_provider_asked_for_by_name_is_never_replaced(
    tmp_path: Path, onnxruntime_with: Any
) -> None:
    compiled = cuda_model(tmp_path)
    with pytest.raises(RuntimeFailure, match=r"install ohmygpu\[cuda\]"):
        open_session(tmp_path, compiled, "CUDA", 1)
    onnxruntime_with(["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(RuntimeFailure, match="driver"):
        open_session(tmp_path, compiled, "CUDA", 1)


def test_a_model_compiled_for_the_cpu_is_refused_on_cuda(folder: Path) -> None:
    with pytest.raises(RuntimeFailure, match="compiled for the CPU"):
        open_session(folder, check_files(folder), "CUDA", 1)
    with pytest.raises(RuntimeFailure, match="no execution provider METAL"):
        open_session(folder, check_files(folder), "METAL", 1)


def test_without_onnxruntime_one_sentence_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeFailure, match=r"not installed; install ohmygpu\[cpu\]"):
        open_session(folder, check_files(folder), "auto", 1)
