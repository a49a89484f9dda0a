"""LoRA adapters: merged as PEFT merges them, refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ohmygpu.convert.adapter_config import read_adapter
from ohmygpu.convert.source import Source, open_source
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.ladder.models import Float32, cases

Opener = Callable[..., Source]

RANK, ALPHA = 4, 12
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/tiny",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["q_proj", "down_proj"],
    "lora_dropout": 0.1,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


def arrays() -> dict[str, Float32]:
    return dict(cases("llama")["grouped"].arrays)


def lora(module: str, rank: int = RANK, **extra: Any) -> dict[str, Float32]:
    """Random A and B for a module of the tiny model, under PEFT's names."""
    outputs, inputs = arrays()[f"{module}.weight"].shape
    rng = np.random.default_rng([*module.encode(), rank])
    found = {
        f"base_model.model.{module}.lora_A.weight": rng.standard_normal((rank, inputs)),
        f"base_model.model.{module}.lora_B.weight": rng.standard_normal((outputs, rank)),
    }
    found |= {f"base_model.model.{module}.{name}": value for name, value in extra.items()}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def change(tensors: dict[str, Float32], module: str) -> Float32:
    """B @ A."""
    a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    return b @ a


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """The tiny model with an adapter of these tensors and changes of its config."""
    with ExitStack() as stack:

        def get(tensors: dict[str, Float32], **changes: Any) -> Source:
            case = cases("llama")["grouped"]
            case.save(tmp_path)
            text = json.dumps(CONFIG | changes)
            (tmp_path / "adapter_config.json").write_text(text, encoding="utf-8")
            save_file(tensors, tmp_path / "adapter_model.safetensors")
            source = open_source({path.name: path for path in tmp_path.iterdir()})
            stack.callback(source.close)
            return source

        yield get


def check(source: Source, name: str, wanted: Float32) -> None:
    """The whole tensor and some of its rows are `wanted`; nothing is kept in blocks."""
    np.testing.assert_allclose(source.read(name), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(source.read_rows(name, 3, 21), source.read(name)[3:21])
    assert source.block_layout(name) is None
    assert source.blocks(name, 0, 4) is None


def test_matrices_are_added_and_everything_else_is_the_base_models(opened: Opener) -> None:
    tensors = lora(Q) | lora(DOWN)
    source, base = opened(tensors), arrays()
    assert set(source.tensors) == set(base)
    for name, array in base.items():
        module = name.removesuffix(".weight")
        if module in (Q, DOWN):
            check(source, name, array + ALPHA / RANK * change(tensors, module))
        else:
            np.testing.assert_array_equal(source.read(name), array)


def test_a_changed_weight_is_never_used_where_the_base_models_lies(opened: Opener) -> None:
    source = opened(lora(Q))
    assert [name for name, info in source.tensors.items() if info.place is None] == [f"{Q}.weight"]


def test_rank_stabilised_adapters_divide_by_the_root_of_the_rank(opened: Opener) -> None:
    tensors = lora(Q)
    source = opened(tensors, use_rslora=True)
    check(source, f"{Q}.weight", arrays()[f"{Q}.weight"] + ALPHA / 2 * change(tensors, Q))


def test_patterns_give_modules_ranks_and_alphas_of_their_own(opened: Opener) -> None:
    tensors = lora(Q, 2) | lora(DOWN)
    source = opened(tensors, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.*_proj": 3})
    check(source, f"{Q}.weight", arrays()[f"{Q}.weight"] + ALPHA / 2 * change(tensors, Q))
    check(source, f"{DOWN}.weight", arrays()[f"{DOWN}.weight"] + 3 / RANK * change(tensors, DOWN))


def test_dora_gives_rows_the_lengths_it_learned(opened: Opener) -> None:
    lengths = np.linspace(0.5, 2, 64, dtype=np.float32)
    tensors = lora(Q, lora_magnitude_vector=lengths)
    merged = arrays()[f"{Q}.weight"] + ALPHA / RANK * change(tensors, Q)
    wanted = lengths[:, None] * merged / np.linalg.norm(merged, axis=1, keepdims=True)
    check(opened(tensors, use_dora=True), f"{Q}.weight", wanted)


def test_matrices_of_an_embedding_are_the_other_way_round(opened: Opener) -> None:
    rng = np.random.default_rng(3)
    a = rng.standard_normal((RANK, 64)).astype(np.float32)
    b = rng.standard_normal((64, RANK)).astype(np.float32)
    names = (f"base_model.model.{EMBED}.lora_embedding_{part}" for part in "AB")
    source = opened(dict(zip(names, (a, b), strict=True)))
    check(source, f"{EMBED}.weight", arrays()[f"{EMBED}.weight"] + ALPHA / RANK * (b @ a).T)


def test_weights_stored_inputs_first_are_changed_that_way(opened: Opener) -> None:
    tensors = lora(Q)
    source = opened(tensors, fan_in_fan_out=True)
    check(source, f"{Q}.weight", arrays()[f"{Q}.weight"] + ALPHA / RANK * change(tensors, Q).T)


@pytest.mark.parametrize("name", [f"{HEAD}.weight", f"{HEAD}.modules_to_save.weight"])
def test_modules_saved_whole_replace_the_base_models(name: str, opened: Opener) -> None:
    head = np.random.default_rng(4).standard_normal((64, 64)).astype(np.float32)
    source = opened(lora(Q) | {f"base_model.model.{name}": head}, modules_to_save=["lm_head"])
    check(source, f"{HEAD}.weight", head)


def test_merged_weights_that_are_no_numbers_show(opened: Opener) -> None:
    tensors = lora(Q)
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = np.inf
    assert not np.isfinite(opened(tensors).read(f"{Q}.weight")).all()


MISFITS: dict[str, tuple[dict[str, Float32], dict[str, Any], str]] = {
    "a module the base lacks": (
        {name.replace("layers.0", "layers.9"): part for name, part in lora(Q).items()},
        {},
        r"changes model.layers.9.self_attn.q_proj.weight, which the base model does not have",
    ),
    "a tensor of another kind": (
        lora(Q, prompt_embeddings=np.ones((4, 64))),
        {},
        r"changes model.layers.0.self_attn.q_proj.prompt_embeddings",
    ),
    "another rank": (lora(Q, 8), {}, r"\[8, 64\] and \[64, 8\], where its config says rank 4"),
    "half a pair": (
        {name: part for name, part in lora(Q).items() if "lora_A" in name},
        {},
        r"has no lora_B for model.layers.0",
    ),
    "a matrix of another size": (
        lora(Q) | {f"base_model.model.{Q}.lora_A.weight": np.ones((RANK, 32), np.float32)},
        {},
        r"as a matrix of \[64, 32\] where the base model has \[64, 64\]",
    ),
    "a head with more tokens": (
        lora(Q) | {f"base_model.model.{HEAD}.weight": np.ones((70, 64), np.float32)},
        {},
        r"has shape \[70, 64\] where the base model has \[64, 64\]",
    ),
    "magnitudes without DoRA": (lora(Q, lora_magnitude_vector=np.ones(64)), {}, "disagree on DoRA"),
    "DoRA without magnitudes": (lora(Q), {"use_dora": True}, "disagree on DoRA"),
    "DoRA of another size": (
        lora(Q, lora_magnitude_vector=np.ones(32)),
        {"use_dora": True},
        "magnitude_vector does not fit",
    ),
    "a bias the base lacks": (
        lora(Q) | {f"base_model.model.{Q}.lora_B.bias": np.ones(64, np.float32)},
        {"lora_bias": True},
        r"changes model.layers.0.self_attn.q_proj.bias",
    ),
    "nothing": ({}, {}, "changes nothing"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_naming_what(name: str, opened: Opener) -> None:
    tensors, changes, message = MISFITS[name]
    with pytest.raises(CorruptFile, match=message):
        opened(tensors, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "of the type IA3; LoRA adapters can be merged"),
        ({"peft_type": None}, "of the type None"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"a_key_of_tomorrow": 1}, "a_key_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights \(pissa_niter_4\)"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"rank_pattern": {"(a+)+b": 4}}, "rank_pattern"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read_adapter(CONFIG | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": True},
        {"r": 4.5},
        {"r": None},
        {"lora_alpha": "many"},
        {"lora_alpha": float("nan")},
        {"use_dora": "yes"},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"q_proj": -1}},
        {"alpha_pattern": {"\\": 1}},
    ],
)
def test_values_that_make_no_sense_are_refused_by_their_key(changes: dict[str, Any]) -> None:
    with pytest.raises(
        CorruptFile, match=f"adapter_config.json has .*{next(iter(changes))}|q_proj"
    ):
        read_adapter(CONFIG | changes)
