"""Sizes in a config that no files could have are refused before anything is built of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.core.errors import CorruptFile
from tests.ladder.models import cases
from tests.memory_source import MemorySource

STRETCHED = {"rope_type": "yarn", "factor": 1e15, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 22},
        {"max_position_embeddings": 10**9},
        {"max_position_embeddings": 10**30},
        {"hidden_size": 10**15},
        {"head_dim": 10**15},
        {"vocab_size": 10**15},
        {"intermediate_size": 10**15},
        {"num_attention_heads": 10**15},
        {"rope_scaling": STRETCHED},
        {"rope_scaling": STRETCHED | {"factor": float("inf")}},
        {"rope_theta": float("inf")},
        {"rms_norm_eps": float("nan")},
        {"num_local_experts": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
    ids="-".join,
)
def test_sizes_beyond_the_files_are_refused_at_once(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    case = cases("llama")["grouped"]
    source = MemorySource(dict(case.config) | changes, case.arrays)
    recipe, target = recipes.recipe("f32"), recipes.target("cpu")
    with pytest.raises(CorruptFile):
        write_graph(source, tmp_path, recipe, target, lambda done, total: None)
    assert not list(tmp_path.iterdir())
