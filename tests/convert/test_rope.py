from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ohmygpu.convert.rope import read_rope
from ohmygpu.core.errors import CorruptFile

BASE = {"max_position_embeddings": 256, "rope_theta": 500000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
HEAD_DIM = 32

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_with_everything": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "yarn_with_attention_factor": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.9},
    "llama3": LLAMA3,
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1 + 0.1 * i for i in range(16)],
        "long_factor": [2 + 0.3 * i for i in range(16)],
        "original_max_position_embeddings": 64,
    },
}


def test_plain_rope_turns_by_powers_of_theta() -> None:
    rope = read_rope(BASE, HEAD_DIM)
    wanted = 500000.0 ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(rope.frequencies, wanted, rtol=1e-6)
    assert (rope.rotary_dim, rope.context_tokens, rope.attention_factor) == (32, 256, 1.0)
    assert rope.theta == 500000.0


def test_tables_hold_cos_and_sin_of_every_position_times_the_attention_factor() -> None:
    rope = read_rope(BASE | {"rope_scaling": SCALINGS["yarn_with_attention_factor"]}, HEAD_DIM)
    angles = np.arange(512)[:, None] * rope.frequencies.astype(np.float64)
    for name, function in (("cos", np.cos), ("sin", np.sin)):
        table = np.concatenate(list(rope.tables(name)))
        assert table.shape == (512, 16)
        np.testing.assert_allclose(table, 0.9 * function(angles), atol=2e-5)


def test_new_and_old_spellings_mean_the_same() -> None:
    old = read_rope(BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}}, HEAD_DIM)
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}
    new = read_rope({"max_position_embeddings": 256, "rope_parameters": parameters}, HEAD_DIM)
    np.testing.assert_array_equal(old.frequencies, new.frequencies)
    assert old.theta == new.theta


def test_frequency_factors_of_a_gguf_file_are_llama3_scaling() -> None:
    scaled = read_rope(BASE | {"rope_scaling": LLAMA3}, HEAD_DIM)
    factors = (read_rope(BASE, HEAD_DIM).frequencies / scaled.frequencies).tolist()
    found = read_rope(BASE | {"rope_freq_factors": factors}, HEAD_DIM)
    np.testing.assert_allclose(found.frequencies, scaled.frequencies, rtol=1e-6)


def test_a_part_of_each_head_may_turn() -> None:
    rope = read_rope(BASE | {"partial_rotary_factor": 0.25}, 80)
    assert rope.rotary_dim == 20
    assert rope.frequencies.shape == (10,)


@pytest.mark.parametrize(
    ("name", "context"), [("linear", 256), ("dynamic", 512), ("yarn", 256), ("longrope", 256)]
)
def test_scaling_says_how_far_a_model_reaches(name: str, context: int) -> None:
    assert read_rope(BASE | {"rope_scaling": SCALINGS[name]}, HEAD_DIM).context_tokens == context


def test_lengths_matter_to_dynamic_and_longrope_alone() -> None:
    stretched = {
        name: read_rope(BASE | {"rope_scaling": scaling}, HEAD_DIM).stretched
        for name, scaling in SCALINGS.items()
    }
    assert {name for name, value in stretched.items() if value} == {"dynamic", "longrope"}


@pytest.mark.parametrize("share", [0.0, 1.5, 0.05])
def test_an_impossible_share_of_a_head_is_refused(share: float) -> None:
    with pytest.raises(CorruptFile):
        read_rope(BASE | {"partial_rotary_factor": share}, HEAD_DIM)


@pytest.mark.reference
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, rope_scaling=dict(scaling), **BASE)
    wanted, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    rope = read_rope(BASE | {"rope_scaling": scaling}, HEAD_DIM)
    np.testing.assert_allclose(rope.frequencies, wanted.numpy(), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(factor)
    if rope.stretched and rope.stretched.frequencies is not None:
        wanted, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=65)
        np.testing.assert_allclose(rope.stretched.frequencies, wanted.numpy(), rtol=1e-6)
