"""Multimodal models, of which the text model is built: names, ties and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.family import check_supported, family
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.ladder.checks import distance
from tests.ladder.models import PROMPT, cases, golden
from tests.memory_source import MemorySource
from tests.onnx_run import OnnxRun

CASE = cases("mistral3")["own_head"]
CONFIG = dict(CASE.config)


def compiled(config: dict[str, Any], arrays: dict[str, Any], folder: Path) -> OnnxRun:
    cpu = recipes.target("cpu")
    source = MemorySource(config, arrays)
    write_graph(source, folder, recipes.recipe("f32"), cpu, lambda done, total: None)
    return OnnxRun(folder, length=48)


def test_what_sees_is_left_out_in_either_spelling_of_names(tmp_path: Path) -> None:
    newer = {
        "model.vision_tower.patch_conv.weight": np.ones((2, 2), np.float32),
        "model.multi_modal_projector.linear_1.weight": np.ones((2, 2), np.float32),
    }
    for name, array in CASE.arrays.items():
        bare = name.removeprefix("language_model.")
        newer[bare.replace("model.", "model.language_model.", 1)] = array
    run = compiled(CONFIG, newer, tmp_path)
    wanted = golden("mistral3")["own_head"][:PROMPT]
    assert distance(run.prefill(CASE.token_ids[:PROMPT]), wanted) < 2e-4


def test_a_head_in_the_files_counts_where_the_config_does_not_say_that_it_is_untied(
    tmp_path: Path,
) -> None:
    silent = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
    run = compiled(silent, dict(CASE.arrays), tmp_path)
    wanted = golden("mistral3")["own_head"][:PROMPT]
    assert distance(run.prefill(CASE.token_ids[:PROMPT]), wanted) < 2e-4


def test_a_tensor_that_belongs_to_no_part_is_named(tmp_path: Path) -> None:
    arrays = CASE.arrays | {"memory.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(UnsupportedModel, match=r"the weights hold memory\.weight"):
        compiled(CONFIG, arrays, tmp_path)


def test_a_text_model_without_a_converter_is_refused_by_name() -> None:
    for other in ("mamba", "bert", "llava", 7):
        with pytest.raises(UnsupportedModel, match=f"text model of this mistral3 is a {other}"):
            check_supported(CONFIG | {"text_config": {"model_type": other}})


def test_a_config_without_a_text_model_is_refused() -> None:
    texts: list[object] = [None, [], "llama"]
    for text in texts:
        with pytest.raises(CorruptFile, match="text_config = "):
            family("mistral3").Config.read(CONFIG | {"text_config": text})


def test_classes_of_multimodal_models_are_accepted_only_where_their_text_model_is_built() -> None:
    assert check_supported(CONFIG) == "mistral3"
    with pytest.raises(UnsupportedModel, match="neither generates text"):
        check_supported({"model_type": "llama", "architectures": ["XForConditionalGeneration"]})
    with pytest.raises(UnsupportedModel, match="neither generates text"):
        check_supported(CONFIG | {"architectures": ["Mistral3ForSequenceClassification"]})
