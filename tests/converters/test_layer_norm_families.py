"""What the ladder does not show of Phi, Phi-3, GPT-2, GPT-NeoX, StableLM, StarCoder2, Falcon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.family import check_supported, family
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.ladder.checks import distance
from tests.ladder.models import PROMPT, Case, Float32, cases, golden
from tests.memory_source import MemorySource
from tests.onnx_run import OnnxRun

FIRST = {
    name: next(iter(cases(name).values()))
    for name in ("phi", "phi3", "gpt2", "gpt_neox", "stablelm", "starcoder2", "falcon")
}


def read(name: str, **changes: Any) -> Any:
    config = dict(FIRST[name].config) | changes
    return family(check_supported(config)).Config.read(config)


def error_of(case: Case, arrays: Mapping[str, Float32], config: dict[str, Any], to: Path) -> float:
    """Error of the prompt's logits, from these tensors and this config."""
    source = MemorySource(config, arrays)
    recipe, target = recipes.recipe("f32"), recipes.target("cpu")
    write_graph(source, to, recipe, target, lambda done, total: None)
    logits = OnnxRun(to, length=48).prefill(case.token_ids[:PROMPT])
    return distance(logits, golden(case.family)[case.name][:PROMPT])


def bare(name: str) -> str:
    """The name in a file of the network without its LM head."""
    return name.removeprefix("transformer.")


def turned_round(name: str, array: Float32) -> Float32:
    """As GGUF files have it: linear layers (out, in)."""
    is_linear = array.ndim == 2 and (".attn." in name or ".mlp." in name)
    return np.ascontiguousarray(array.T) if is_linear else array


@pytest.mark.parametrize(
    ("changes", "files"),
    [
        ({}, lambda arrays: {bare(name): array for name, array in arrays.items()}),
        (
            {"conv1d": False},
            lambda arrays: {name: turned_round(name, array) for name, array in arrays.items()},
        ),
        (
            {"conv1d": True},  # masks and a copy of the embedding, as the oldest files have them
            lambda arrays: (
                arrays
                | {"lm_head.weight": arrays["transformer.wte.weight"]}
                | {"transformer.h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32)}
                | {"transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32)}
            ),
        ),
    ],
    ids=["without the head's prefix", "as in GGUF", "with masks"],
)
def test_every_arrangement_of_gpt2_files_is_the_same_model(
    changes: dict[str, Any],
    files: Callable[[dict[str, Float32]], dict[str, Float32]],
    tmp_path: Path,
) -> None:
    case = FIRST["gpt2"]
    arrays = files(dict(case.arrays))
    assert error_of(case, arrays, dict(case.config) | changes, tmp_path) < 2e-4


def test_bare_names_keep_their_masks_apart(tmp_path: Path) -> None:
    case = FIRST["gpt2"]
    arrays = {bare(name): array for name, array in case.arrays.items()}
    arrays["h.1.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)
    assert error_of(case, arrays, dict(case.config), tmp_path) < 2e-4
    arrays["h.1.attn.q_norm.weight"] = np.ones(16, np.float32)
    with pytest.raises(UnsupportedModel, match=r"h\.1\.attn\.q_norm\.weight"):
        error_of(case, arrays, dict(case.config), tmp_path)


def test_gpt2_reads_todays_names_of_its_keys() -> None:
    decoder = (
        family("gpt2")
        .Config.read(
            {
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "max_position_embeddings": 77,
            }
        )
        .decoder
    )
    assert (decoder.hidden_size, decoder.layers, decoder.heads) == (32, 3, 2)
    assert (decoder.context_tokens, decoder.feed_forward_length) == (77, 128)


def test_buffers_of_old_gpt_neox_files_are_ignored(tmp_path: Path) -> None:
    case = FIRST["gpt_neox"]
    prefix = "gpt_neox.layers.0.attention"
    spare = {
        f"{prefix}.bias": np.ones((1, 1, 64, 64), np.float32),
        f"{prefix}.masked_bias": np.array(-1e9, np.float32),
        f"{prefix}.rotary_emb.inv_freq": np.ones(10, np.float32),
    }
    assert error_of(case, dict(case.arrays) | spare, dict(case.config), tmp_path) < 2e-4


@pytest.mark.parametrize("name", ["phi3", "starcoder2"])
def test_a_window_as_long_as_the_context_is_none(name: str) -> None:
    context = read(name).decoder.context_tokens
    assert set(read(name, sliding_window=context - 1).windows) == {context - 1}
    assert set(read(name, sliding_window=context).windows) == {None}
    assert set(read(name, sliding_window=None).windows) == {None}


@pytest.mark.parametrize(
    ("name", "turned"),
    [("phi", 40), ("stablelm", 20), ("gpt_neox", 20)],
)
def test_a_part_of_the_head_turns_where_the_config_does_not_say(name: str, turned: int) -> None:
    config = {
        key: value
        for key, value in FIRST[name].config.items()
        if key not in ("partial_rotary_factor", "rotary_pct")
    }
    found: Any = family(name).Config.read(config)
    assert getattr(found, "base", found).rope.rotary_dim == turned  # of 80


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi", {"hidden_act": "snake"}, "activation 'snake'"),
        ("gpt2", {"activation_function": "snake"}, "activation 'snake'"),
        ("gpt2", {"add_cross_attention": True}, "cross-attention"),
        ("phi3", {"rope_scaling": {"type": "spiral"}}, "'spiral'.*known: "),
        ("falcon", {"alibi": True}, "ALiBi"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("phi", {"partial_rotary_factor": 0.0126}, "turns 1 of 80"),
        ("phi", {"qk_layernorm": "yes"}, "qk_layernorm = 'yes'"),
        ("phi3", {"sliding_window": 0}, "sliding_window = 0"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0] * 8}},
            "short_factor = 1 values; 8 numbers",
        ),
        ("gpt2", {"n_head": 3}, "n_embd = 64 cannot be cut into 3 heads"),
        ("gpt2", {"n_positions": None}, "n_positions = None"),
        ("gpt_neox", {"rotary_pct": 2.0}, "turns 160 of 80"),
        ("gpt_neox", {"layer_norm_eps": 0}, "layer_norm_eps = 0"),
        ("stablelm", {"num_key_value_heads": 4}, "2 attention heads cannot share 4"),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, "4 attention heads"),
        ("falcon", {"num_ln_in_parallel_attn": 0}, "num_ln_in_parallel_attn = 0"),
        ("starcoder2", {"norm_epsilon": "small"}, "norm_epsilon = 'small'"),
    ],
)
def test_a_bad_field_is_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        read(name, **changes)


def test_what_rounding_hurts_most_is_known_by_every_familys_names() -> None:
    q4 = recipes.recipe("q4")
    sensitive = (
        "model.layers.0.self_attn.qkv_proj.weight",
        "gpt_neox.layers.9.attention.query_key_value.weight",
        "transformer.h.9.attn.c_attn.weight",
        "model.layers.0.mlp.fc2.weight",
        "model.layers.0.mlp.c_proj.weight",
        "transformer.h.0.mlp.c_proj.weight",
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight",
    )
    others = (
        "model.layers.0.self_attn.dense.weight",
        "model.layers.0.mlp.fc1.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "gpt_neox.layers.0.attention.dense.weight",
        "gpt_neox.layers.8.mlp.dense_4h_to_h.weight",  # not every down projection
    )
    assert [q4.bits(name, 32) for name in sensitive] == [8] * len(sensitive)
    assert [q4.bits(name, 32) for name in others] == [4] * len(others)
