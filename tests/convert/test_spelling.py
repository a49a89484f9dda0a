"""What repositories say in several spellings reaches a family in one."""

from __future__ import annotations

from typing import Any

import numpy as np

from ohmygpu.convert.spelling import spelled
from tests.memory_source import MemorySource

EMBEDDING = np.arange(12, dtype=np.float32).reshape(4, 3)
TEXT: dict[str, Any] = {"model_type": "mistral3", "text_config": {"tie_word_embeddings": True}}


def test_newer_names_of_a_multimodal_model_become_the_older_ones() -> None:
    newer = {
        "model.language_model.embed_tokens.weight": EMBEDDING,
        "model.language_model.layers.0.mlp.up_proj.weight": EMBEDDING + 1,
        "model.vision_tower.patch_conv.weight": EMBEDDING,
        "model.multi_modal_projector.linear_1.weight": EMBEDDING,
        "lm_head.weight": EMBEDDING,
    }
    found = spelled(MemorySource(TEXT, newer))
    assert sorted(found.tensors) == [
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.patch_conv.weight",
    ]
    rows = found.read_rows("language_model.model.layers.0.mlp.up_proj.weight", 1, 3)
    assert np.array_equal(rows, EMBEDDING[1:3] + 1)


def test_a_source_in_the_usual_spelling_is_returned_as_it_is() -> None:
    older = {
        "language_model.model.embed_tokens.weight": EMBEDDING,
        "language_model.lm_head.weight": EMBEDDING.copy(),
    }
    for config in (TEXT, {"model_type": "llama"}):
        source = MemorySource(config, older)
        assert spelled(source) is source


def test_an_lm_head_that_differs_from_the_embedding_is_not_tied_to_it() -> None:
    tensors = {
        "language_model.model.embed_tokens.weight": EMBEDDING,
        "language_model.lm_head.weight": EMBEDDING + np.eye(4, 3, dtype=np.float32),
    }
    found = spelled(MemorySource(TEXT, tensors)).config
    assert found["tie_word_embeddings"] is False
    assert found["text_config"] == {"tie_word_embeddings": False}
    assert "tie_word_embeddings" not in TEXT  # the source's own config stays


def test_an_lm_head_of_another_shape_says_nothing_about_ties() -> None:
    tensors = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": EMBEDDING[:2]}
    source = MemorySource({"model_type": "llama", "tie_word_embeddings": True}, tensors)
    assert spelled(source) is source
