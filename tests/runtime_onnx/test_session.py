"""Which execution provider a session gets, where the graph leaves no choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ohmygpu.core.errors import RuntimeFailure
from ohmygpu.runtime_onnx import session
from ohmygpu.runtime_onnx.session import open_session

from .tiny_graph import write_tiny_model


def test_a_bfloat16_graph_never_falls_back_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu(folder: Path, graph: str) -> None:
        raise RuntimeFailure("CUDA cannot be started")

    monkeypatch.setattr(session, "_open_cuda", no_gpu)
    compiled = replace(write_tiny_model(tmp_path), target="cuda", kv_dtype="float16")
    assert open_session(tmp_path, compiled, "auto", 1).note.endswith("CUDA cannot be started")
    compiled = replace(compiled, kv_dtype="bfloat16")
    with pytest.raises(RuntimeFailure, match="CUDA cannot be started"):
        open_session(tmp_path, compiled, "auto", 1)
    with pytest.raises(RuntimeFailure, match=r"bfloat16, which runs on a GPU only.*pull it again"):
        open_session(tmp_path, compiled, "CPU", 1)
