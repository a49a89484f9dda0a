from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ohmygpu.convert.compile import compile_model
from ohmygpu.convert.source import open_source
from ohmygpu.convert.tokenizer import prepare_tokenizer
from ohmygpu.core import hardware
from ohmygpu.core.errors import (
    CorruptFile,
    InvalidRequest,
    OhMyGPUError,
    OutOfMemory,
    RuntimeFailure,
)
from ohmygpu.core.fidelity import TEXT_VERSION, Fidelity
from ohmygpu.core.records import GRAPH_FILE, TOKENIZER_FILE, CompiledModel
from ohmygpu.runtime_onnx import verify
from ohmygpu.runtime_onnx.divergence import Comparison
from ohmygpu.runtime_onnx.tokenizer import Tokenizer
from ohmygpu.runtime_onnx.verify import SKIPPED_TOKENS, VerifyJob, documents, measure
from tests.onnx_run import OnnxRun

from .tiny_graph import write_tiny_model

CONTEXT = 96
COMMAND = [sys.executable, "-m", "ohmygpu.runtime_onnx.worker", "verify"]
TEXT_SHA256 = (
    "6f08c9d06be75e5c320d37c9657858a58f01b7c1e0f18074ba28086af49c1150"  # of TEXT_VERSION 1
)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    write_tiny_model(folder, context=CONTEXT)
    return folder


@pytest.fixture(scope="module")
def rounded(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with every matrix rounded to a few bits."""
    folder = tmp_path_factory.mktemp("rounded")
    shutil.copytree(exact, folder, dirs_exist_ok=True)
    model = onnx.load(folder / GRAPH_FILE)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2 and tensor.name not in ("cos", "sin"):
            step = np.abs(values).max() / 16
            tensor.CopyFrom(numpy_helper.from_array(np.round(values / step) * step, tensor.name))
    (folder / "second.onnx").write_bytes(model.SerializeToString())
    return folder


def job(folder: Path, reference: Path, **changes: Any) -> VerifyJob:
    data = {"model": "tiny", "folder": str(folder), "reference": str(reference), "threads": 1}
    return VerifyJob.from_dict(data | changes)


def by_hand(folder: Path, reference: Path, graph: str) -> dict[str, Any]:
    """Every document in one run of each graph, all logits held."""
    tokenizer = Tokenizer(folder, CompiledModel.load(folder))
    comparison = Comparison()
    for text in documents().values():
        ids = tokenizer.encode(text)[:CONTEXT]
        wanted = OnnxRun(reference, length=CONTEXT).prefill(ids)
        found = run_graph(folder, graph, ids)
        kept = slice(SKIPPED_TOKENS, -1)
        comparison.add(wanted[kept], found[kept], np.array(ids[SKIPPED_TOKENS + 1 :], np.int64))
    return comparison.summary()


def run_graph(folder: Path, graph: str, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    other = folder.with_name(f"{folder.name}-run")
    other.mkdir(exist_ok=True)
    shutil.copy(folder / graph, other / GRAPH_FILE)
    return OnnxRun(other, length=CONTEXT).prefill(ids)


def test_a_graph_measures_as_if_all_its_logits_were_held_at_once(
    exact: Path, rounded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_hand(rounded, exact, "second.onnx")
    assert expected["kl_mean"] > 0.01
    assert expected["tokens"] == len(documents()) * (CONTEXT - SKIPPED_TOKENS - 1)
    for logits_bytes, run_tokens in ((192 << 20, 128), (258 * 4 * 7, 3), (258 * 4 * 2, 1)):
        monkeypatch.setattr(verify, "_LOGITS_BYTES", logits_bytes)
        monkeypatch.setattr(verify, "_RUN_TOKENS", run_tokens)
        found = measure(job(rounded, exact, graph="second.onnx"))
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, rel=2e-3), name
    assert found.text_version == TEXT_VERSION
    assert found.execution_provider == "CPU"


def test_a_graph_is_its_own_equal_and_progress_counts_the_text(exact: Path) -> None:
    reports: list[tuple[int, int]] = []
    found = measure(job(exact, exact), lambda *report: reports.append(report))
    assert found.kl_mean < 1e-9
    assert found.top1_agreement == 1.0
    size = sum(len(text.encode()) for text in documents().values())
    assert reports[0] == (0, size)
    assert reports[-1] == (size, size)
    assert reports == sorted(reports)


def test_what_cannot_be_measured_says_why(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CorruptFile, match=r"other\.onnx"):
        measure(job(exact, exact, graph="other.onnx"))
    with pytest.raises(CorruptFile, match=r"compile\.json"):
        measure(job(exact, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "memory_available_bytes", lambda: 1)
        with pytest.raises(OutOfMemory, match="of memory"):
            measure(job(exact, exact))
    short = tmp_path / "short"
    write_tiny_model(short, context=SKIPPED_TOKENS)
    with pytest.raises(RuntimeFailure, match="too short"):
        measure(job(short, short))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"model": "m", "folder": "f"},
        {"model": "m", "folder": "f", "reference": "r", "grap": "x"},
        {"model": "m", "folder": "f", "reference": 5},
        {"model": "m", "folder": "f", "reference": "r", "threads": "2"},
        {"model": "m", "folder": "f", "reference": "r", "threads": True},
    ],
)
def test_a_job_that_is_none_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="not a measuring job"):
        VerifyJob.from_dict(data)


def test_the_shipped_text_is_that_of_its_version() -> None:
    texts = documents()
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name}\n{text}".encode())
    assert digest.hexdigest() == TEXT_SHA256, "raise TEXT_VERSION: older numbers do not compare"
    assert TEXT_VERSION == 1
    assert [name[:2] for name in texts] == [f"{number:02}" for number in range(1, len(texts) + 1)]


def test_the_shipped_text_has_a_few_thousand_tokens_in_windows_of_hundreds(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    source = open_source({smollm2_gguf.name: smollm2_gguf})
    prepare_tokenizer(source, tmp_path)
    source.close()
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / TOKENIZER_FILE))
    counts = [len(tokenizer.encode(text).ids) for text in documents().values()]
    assert sum(counts) == 5172
    assert all(250 <= count <= 800 for count in counts)


def run_worker(text: str, stdin: str | None = None) -> tuple[int, list[dict[str, Any]]]:
    result = subprocess.run(
        [*COMMAND, text], input=stdin, capture_output=True, text=True, check=False, timeout=120
    )
    return result.returncode, [json.loads(line) for line in result.stdout.splitlines()]


def test_the_worker_prints_progress_and_one_result(exact: Path) -> None:
    data = {"model": "tiny", "folder": str(exact), "reference": str(exact)}
    status, messages = run_worker(json.dumps(data))
    assert status == 0
    assert all(set(message) == {"done_bytes", "total_bytes"} for message in messages[:-1])
    assert Fidelity.from_dict(messages[-1]["fidelity"]).tokens > 1000


@pytest.mark.parametrize("text", ["{", "[]", '"text"', '{"model": "m"}'])
def test_the_worker_refuses_what_is_no_job(text: str) -> None:
    status, (message,) = run_worker(text)
    assert status == 1
    assert isinstance(OhMyGPUError.from_dict(message["error"]), InvalidRequest)


def test_the_worker_ends_with_the_input_that_brought_its_job(exact: Path) -> None:
    data = {"model": "tiny", "folder": str(exact), "reference": str(exact)}
    with subprocess.Popen([*COMMAND, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(data).encode() + b"\n")
        child.stdin.flush()
        assert b"done_bytes" in child.stdout.readline()  # it is at work, and stays so
        child.stdin.close()
        assert child.wait(60) in (0, 70)  # at once, or after the answer where it was quicker


@pytest.mark.reference
def test_a_real_model_measures_as_its_weights_do_in_transformers(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    files = {smollm2_gguf.name: smollm2_gguf}
    for recipe in ("f32", "q8"):
        compile_model(files, tmp_path / recipe, recipe, "cpu")
    some = dict(list(documents().items())[:2])
    monkeypatch.setattr(verify, "documents", lambda: some)
    found = measure(job(tmp_path / "q8", tmp_path / "f32"))
    assert 1e-4 < found.kl_mean < found.kl_p99 < 0.05
    assert found.top1_agreement > 0.9
    source = open_source(files)
    model = LlamaForCausalLM(LlamaConfig(**source.config)).eval()
    weights = {name: torch.from_numpy(np.array(source.read(name))) for name in source.tensors}
    model.load_state_dict(weights, strict=False)  # a tied head has no weights of its own
    source.close()
    tokenizer = Tokenizer(tmp_path / "f32", CompiledModel.load(tmp_path / "f32"))
    losses = []
    with torch.no_grad():
        for text in some.values():
            ids = torch.tensor(tokenizer.encode(text))
            logits = model(ids[None]).logits[0, SKIPPED_TOKENS:-1]
            following = ids[SKIPPED_TOKENS + 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
    perplexity = float(torch.cat(losses).mean().exp())
    assert found.reference_perplexity == pytest.approx(perplexity, rel=1e-4)
    assert found.perplexity == pytest.approx(perplexity, rel=0.02)
