from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from ohmygpu.core.fidelity import (
    FIDELITY_FILE,
    Fidelity,
    graph_files,
    load_fidelity,
    save_fidelity,
)
from tests.daemon.fakes import compiled_model

FIDELITY = Fidelity(
    kl_mean=0.005,
    kl_median=0.003,
    kl_p99=0.03,
    top1_agreement=0.96,
    perplexity=12.8,
    reference_perplexity=12.7,
    tokens=5112,
    text_version=1,
    execution_provider="CPU",
    measured_at="2026-11-22T18:59:37Z",
)


def test_what_was_measured_is_read_back(tmp_path: Path) -> None:
    found = {"model.onnx": FIDELITY, "prompts.onnx": replace(FIDELITY, kl_mean=0.009)}
    save_fidelity(tmp_path, found)
    assert load_fidelity(tmp_path) == found
    save_fidelity(tmp_path, {"model.onnx": FIDELITY})
    assert load_fidelity(tmp_path) == {"model.onnx": FIDELITY}
    assert [path.name for path in tmp_path.iterdir()] == [FIDELITY_FILE]


def test_nothing_was_measured_where_there_is_no_file(tmp_path: Path) -> None:
    assert load_fidelity(tmp_path) == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"graphs": []}', '{"graphs": {"model.onnx": {"kl_mean": 1}}}']
)
def test_a_damaged_file_counts_as_nothing_and_is_logged(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FIDELITY_FILE).write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert load_fidelity(tmp_path) == {}
    assert "damaged" in caplog.text


def test_what_a_later_version_adds_is_left_out(tmp_path: Path) -> None:
    save_fidelity(tmp_path, {"model.onnx": FIDELITY})
    path = tmp_path / FIDELITY_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    data["graphs"]["model.onnx"]["kl_p50"] = 1
    data["later"] = True
    path.write_text(json.dumps(data), encoding="utf-8")
    assert load_fidelity(tmp_path) == {"model.onnx": FIDELITY}


def test_the_graph_that_decodes_comes_first() -> None:
    files = dict.fromkeys(["a.onnx", "a.onnx.data", "model.onnx", "model.onnx.data"], 1)
    assert graph_files(compiled_model(files=files)) == ["model.onnx", "a.onnx"]
    assert graph_files(compiled_model()) == ["model.onnx"]
