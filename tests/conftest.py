"""What every test gets: a home folder of its own, an environment without ours, the demo model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRUBBED = ("OHMYGPU_", "HF_", "HUGGING_FACE_", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
MODELS_VARIABLE = "OHMYGPU_TEST_MODELS"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary OHMYGPU_HOME; its path is short, because a Unix socket's must be."""
    for name in list(os.environ):
        if name.startswith(SCRUBBED) and name != MODELS_VARIABLE:
            monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="omg-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "home"
        monkeypatch.setenv("OHMYGPU_HOME", str(path))
        yield path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, which tests/run fetches from the package index."""
    folder = Path(os.environ.get(MODELS_VARIABLE) or ROOT / ".cache" / "models")
    found = sorted(folder.rglob("SmolLM2-135M-Instruct*.gguf")) if folder.is_dir() else []
    if not found:
        pytest.fail(
            f"no SmolLM2-135M-Instruct*.gguf in {folder}: start the tests with tests/run, which "
            f"fetches it, or set {MODELS_VARIABLE} to a folder that has it"
        )
    return found[0]
