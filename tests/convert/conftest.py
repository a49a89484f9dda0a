"""SmolLM2 compiled by each recipe, once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ohmygpu.convert.compile import compile_model
from ohmygpu.core.records import GRAPH_FILE
from tests.onnx_run import OnnxRun

TEXT = """The lighthouse keeper climbed the stairs every evening before sunset, carrying a small can
of oil and a cloth. He had done this for thirty years, and he knew each of the two hundred steps by
the sound it made. From the top he could see the harbour, the fishing boats coming home, and beyond
them the long grey line where the sea ended. When the lamp was lit he sat down to write in his book:
the weather, the ships that had passed, and what he had thought about while the light went round."""

Compiled = Callable[..., Path]


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Folder of SmolLM2 compiled by a recipe for a target, once per session."""
    folders: dict[tuple[str, int], Path] = {}

    def get(recipe: str, accuracy_level: int = 4) -> Path:
        key = (recipe, accuracy_level)
        if key not in folders:
            folder = tmp_path_factory.mktemp(f"smollm2-{recipe}-{accuracy_level}")
            if accuracy_level == 4:
                compile_model({smollm2_gguf.name: smollm2_gguf}, folder, recipe, "cpu")
            else:
                with_level(get(recipe), folder, accuracy_level)
            folders[key] = folder
        return folders[key]

    return get


def with_level(compiled: Path, folder: Path, accuracy_level: int) -> None:
    """The same graph over the same weights, MatMulNBits at another accuracy level."""
    model = onnx.load(compiled / GRAPH_FILE, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = accuracy_level
    (folder / GRAPH_FILE).write_bytes(model.SerializeToString())
    os.link(compiled / f"{GRAPH_FILE}.data", folder / f"{GRAPH_FILE}.data")


@pytest.fixture(scope="session")
def prose(smollm2: Compiled) -> list[int]:
    tokenizer = Tokenizer.from_file(str(smollm2("q8") / "tokenizer.json"))
    return list(tokenizer.encode(TEXT).ids)


@pytest.fixture(scope="session")
def float_logits(smollm2: Compiled, prose: list[int]) -> NDArray[np.float32]:
    """Logits of the dequantised weights in float32."""
    return OnnxRun(smollm2("f32")).prefill(prose)
