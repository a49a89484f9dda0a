"""What configs of the families derived from Llama may not say, and what they say in old words."""

from __future__ import annotations

from typing import Any

import pytest

from ohmygpu.convert.family import check_supported, family
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.ladder.models import cases


def read(name: str, **changes: Any) -> Any:
    base = dict(next(iter(cases(name).values())).config)
    return family(check_supported(base)).Config.read(base | changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers = -1"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0},
            "sliding_window = 0",
        ),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window = 'yes'"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "for 2 layers"),
        ("mistral", {"sliding_window": "wide"}, "sliding_window = 'wide'"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 1, 2]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0"),
        ("granite", {"logits_scaling": 0}, "logits_scaling = 0"),
        ("granite", {"embedding_multiplier": "12"}, "embedding_multiplier = '12'"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping = -1.0"),
        ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar = None"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ("gemma3_text", {"rope_parameters": [1e6]}, "rope_parameters = "),
        ("gemma3_text", {"rope_parameters": {"full_attention": 1e6}}, "full_attention = "),
        ("gemma3_text", {"sliding_window": None}, "sliding_window = None"),
    ],
)
def test_a_bad_field_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        read(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"hidden_act": "snake"}, "activation 'snake'"),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["linear_attention"] * 2},
            "layers of the type 'linear_attention'",
        ),
        ("gemma2", {"hidden_activation": "snake"}, "activation 'snake'"),
        ("gemma", {"use_bidirectional_attention": True}, "does not generate text"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "does not generate text"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(name, **changes)


def test_a_window_that_is_switched_off_is_not_read() -> None:
    assert read("qwen2", sliding_window="unused").windows == (None, None)
    assert read("smollm3", sliding_window="unused").base.windows == (None,) * 3


def test_mistral_has_one_window_for_all_layers() -> None:
    assert read("mistral", layer_types=["full_attention", "sliding_attention"]).windows == (8, 8)
    base = cases("mistral")["window"].config
    silent: Any = family("mistral").Config.read(
        {key: value for key, value in base.items() if key != "sliding_window"}
    )
    assert silent.windows == (4096, 4096)


def test_gemma_3_reads_two_ropes_from_old_and_new_configs_alike() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = read("gemma3_text", rope_theta=3e5, rope_local_base_freq=2e3, rope_scaling=scaling)
    new = read(
        "gemma3_text",
        rope_theta=None,
        rope_local_base_freq=None,
        rope_scaling=None,
        rope_parameters={
            "full_attention": {**scaling, "rope_theta": 3e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
        },
    )
    for found in (old, new):
        assert found.decoder.rope_theta == 3e5
        assert found.base.rope.frequencies[0] == 0.125
        assert found.local_rope.theta == 2e3
        assert found.local_rope.frequencies[0] == 1.0
