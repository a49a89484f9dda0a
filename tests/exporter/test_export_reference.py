"""Real exports, served by the engine's model, beside transformers' own greedy answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ohmygpu.convert.exported import compile_exported
from ohmygpu.exporter.environment import command
from ohmygpu.runtime_onnx.exported import ExportedModel
from ohmygpu.runtime_onnx.kv_cache import HostKVCache
from ohmygpu.runtime_onnx.session import open_session
from tests.exporter.models import CONFIGS, write_model, write_tokenizer

PYTHON = Path(os.environ.get("OHMYGPU_EXPORTER_PYTHON") or sys.executable)
PROMPTS = ([11, 500, 7], [9], [40, 41, 42, 43, 44, 45, 46, 47, 48], [300, 200])
TOKENS = 10


@pytest.mark.reference
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_four_ragged_greedy_answers_are_those_of_transformers(
    model_type: str, tmp_path: Path, smollm2_gguf: Path
) -> None:
    import torch

    vocab_size = write_tokenizer(tmp_path / "tokenizer", smollm2_gguf)
    repo = tmp_path / "repo"
    repo.mkdir()
    reference = write_model(repo, model_type, tmp_path / "tokenizer", vocab_size)
    files = {path.name: path for path in repo.iterdir()}
    compiled = compile_exported(files, tmp_path / "out", command(PYTHON), lambda *_: None)
    session = open_session(tmp_path / "out", compiled, "CPU", 1).session
    model = ExportedModel(session, compiled, HostKVCache(compiled, len(PROMPTS), 64), 64)

    found = [list(prompt) for prompt in PROMPTS]
    for slot, prompt in enumerate(PROMPTS):
        model.prefill(slot, prompt, 0, slot)
    slots = range(len(PROMPTS))
    for _ in range(TOKENS):
        for slot in slots:
            found[slot].append(int(model.logits(len(PROMPTS))[slot].argmax()))
        model.decode(slots, [text[-1] for text in found], [len(text) - 1 for text in found])

    expected = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(TOKENS):
            with torch.no_grad():
                text.append(int(reference(torch.tensor([text])).logits[0, -1].argmax()))
        expected.append(text)
    assert found == expected
