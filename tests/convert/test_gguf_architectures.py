"""Every GGUF architecture, seen as the Hugging Face model its file was made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ohmygpu.convert.family import GGUF_ARCHITECTURES, check_supported, family
from ohmygpu.convert.source import Source, open_source
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.convert.gguf_models import MODELS, Float32
from tests.convert.gguf_writer import ARCHITECTURES, WHOLE_NORMS, rounded, write_model
from tests.ladder.gguf import TOLERANCE, error, error_of_blocks, weights_of

SAME_NAMES = [name for name in MODELS if name != "gpt-oss"]  # it has its experts apart

Stored = dict[str, Float32]
Opened = Callable[..., Source]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Writes a model of MODELS with `write_model`'s options and opens it."""
    with ExitStack() as stack:

        def write_and_open(name: str, **options: Any) -> Source:
            path = write_model(tmp_path / "m.gguf", MODELS[name], weights_of(name), **options)
            source = open_source({"m.gguf": path})
            stack.callback(source.close)
            return source

        yield write_and_open


def as_stored(config: dict[str, Any], name: str, source: Source) -> Float32:
    """A tensor of the source in the arrangement of SafeTensors files."""
    values = source.read(name)
    turned = not config.get("conv1d", True) and values.ndim > 1 and "c_" in name
    return values.T if turned else values


def differences(found: Any, wanted: Any, where: str = "config") -> list[str]:
    """What two readings of a config disagree about; numbers of tables within 1e-6."""
    if dataclasses.is_dataclass(found) and type(found) is type(wanted):
        names = [field.name for field in dataclasses.fields(found)]
        names = [name for name in names if name not in ("conv1d", "arrangement")]  # of the files
        parts = [(f"{where}.{name}", getattr(found, name), getattr(wanted, name)) for name in names]
        return [line for at, one, other in parts for line in differences(one, other, at)]
    if isinstance(found, np.ndarray) and isinstance(wanted, np.ndarray):
        same = found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-6, atol=0)
        return [] if same else [f"{where}: {found} is not {wanted}"]
    return [] if found == wanted else [f"{where}: {found} is not {wanted}"]


def test_every_architecture_has_a_model_here() -> None:
    written = {gguf.MODEL_ARCH_NAMES[ARCHITECTURES[c["model_type"]]] for c in MODELS.values()}
    assert written == set(GGUF_ARCHITECTURES)


@pytest.mark.parametrize("name", SAME_NAMES)
def test_the_weights_are_those_of_the_safetensors_files(name: str, opened: Opened) -> None:
    tensors, source = weights_of(name), opened(name)
    assert set(source.tensors) == set(tensors)
    for tensor, values in tensors.items():
        found = as_stored(source.config, tensor, source)
        # These norm weights lose a bit when 1 is added to them and taken away again.
        slack = 2.5e-7 if name.startswith(WHOLE_NORMS) and values.ndim == 1 else 0.0
        np.testing.assert_allclose(found, values, rtol=0, atol=slack, err_msg=tensor)


@pytest.mark.parametrize("body", ["F32", "MXFP4"])
def test_experts_of_gpt_oss_are_matrices_of_their_own(body: str, opened: Opened) -> None:
    plain = opened("gpt-oss", change=lambda stored: rounded(stored, body))
    kept = {name: plain.read(name) for name in plain.tensors if "experts.3.up_proj" in name}
    wanted = weights_of("gpt-oss")
    source = opened("gpt-oss", body=body)
    for name, values in kept.items():
        np.testing.assert_array_equal(source.read(name), values)
        blocks = source.blocks(name)
        assert (blocks is None) == (body == "F32")
        if blocks is not None:
            np.testing.assert_array_equal(blocks.dequantize(), values)
        else:
            stacked = wanted[name.replace("3.up_proj.weight", "gate_up_proj")]
            np.testing.assert_array_equal(values, stacked[3].T[1::2])
    assert len(kept) == 2


@pytest.mark.parametrize("name", MODELS)
def test_the_family_reads_the_same_from_it_as_from_config_json(name: str, opened: Opened) -> None:
    source, config = opened(name), MODELS[name]
    assert check_supported(source.config) == check_supported(config)
    reader = family(check_supported(config)).Config
    assert differences(reader.read(source.config), reader.read(config)) == []


@pytest.mark.parametrize("name", MODELS)
def test_its_logits_are_those_of_the_safetensors_path(name: str) -> None:
    assert error(name) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("gpt2", "Q4_1"),
        ("gptneox", "Q5_0"),
        ("llama-biases-tied", "Q4_0"),
        ("phi3", "MXFP4"),
        ("stablelm-parallel", "Q5_1"),
    ],
)
def test_the_graph_of_its_blocks_computes_what_their_weights_do(name: str, body: str) -> None:
    assert error_of_blocks(name, body) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_cut_and_ordered_like_the_weights_they_hold(name: str, opened: Opened) -> None:
    plain = opened(name, change=lambda stored: rounded(stored, "Q8_0"))
    wanted = {tensor: plain.read(tensor) for tensor in plain.tensors}
    source = opened(name, body="Q8_0")
    in_blocks = 0
    for tensor, values in wanted.items():
        np.testing.assert_array_equal(source.read(tensor), values, err_msg=tensor)
        blocks = source.blocks(tensor)
        if blocks is not None:
            np.testing.assert_array_equal(blocks.dequantize(), values, err_msg=tensor)
            part = source.blocks(tensor, 1, 3)
            assert part is not None
            np.testing.assert_array_equal(part.dequantize(), values[1:3], err_msg=tensor)
            in_blocks += 1
    assert in_blocks > 4


def _fused_qkv(stored: Stored) -> Stored:
    for kind in ("weight", "bias"):
        for layer in range(2):
            names = [f"blk.{layer}.attn_{part}.{kind}" for part in "qkv"]
            if names[0] in stored:
                parts = [stored.pop(name) for name in names]
                stored[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)
    return stored


def _fused_gate_up(stored: Stored) -> Stored:
    for layer in range(2):
        parts = [stored.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
        stored[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
    return stored


def _one_tensor_per_expert(stored: Stored) -> Stored:
    for name in [name for name in stored if "_exps" in name]:
        for expert, values in enumerate(stored.pop(name)):
            stored[name.replace("_exps", f".{expert}")] = values
    return stored


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("phi2", _fused_qkv),  # as the first converters wrote it
        ("qwen2", _fused_qkv),
        ("starcoder2", _fused_qkv),
        ("stablelm", _fused_qkv),
        ("qwen3moe", _fused_gate_up),
        ("mixtral", _one_tensor_per_expert),  # as the first converters wrote it
    ],
)
def test_other_arrangements_of_the_same_tensors_are_read(
    name: str, change: Callable[[Stored], Stored], opened: Opened
) -> None:
    usual = opened(name)
    wanted = {tensor: usual.read(tensor) for tensor in usual.tensors}
    source = opened(name, change=change)
    assert set(source.tensors) == set(wanted)
    for tensor, values in wanted.items():
        np.testing.assert_array_equal(source.read(tensor), values, err_msg=tensor)
    assert source.config == usual.config


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", _fused_qkv),
        ("granite", _fused_qkv),
    ],
)
def test_fused_rows_that_rotate_in_pairs_are_put_in_order(
    name: str, change: Callable[[Stored], Stored], opened: Opened
) -> None:
    wanted, source = weights_of(name), opened(name, change=change)
    for part in "qkv":
        tensor = f"model.layers.1.self_attn.{part}_proj.weight"
        np.testing.assert_array_equal(source.read(tensor), wanted[tensor])


def without(name: str) -> Callable[[Stored], Stored]:
    return lambda stored: {key: values for key, values in stored.items() if key != name}


def cut(name: str) -> Callable[[Stored], Stored]:
    return lambda stored: {
        key: values[:-1].copy() if key == name else values for key, values in stored.items()
    }


_LAST = {"gpt2": "blk.1.ffn_norm.bias", "olmo2": "blk.1.attn_q_norm.weight"}
_LAST |= {"stablelm-parallel": "blk.1.attn_k_norm.weight", "qwen3moe": "blk.1.ffn_gate_inp.weight"}
_LAST |= {"gpt-oss": "blk.1.attn_sinks.weight"}
_LAST |= {"mixtral": "blk.1.ffn_down_exps.weight", "phi2": "output.bias"}
_LAST |= {"phi3-longrope": "rope_factors_long.weight", "qwen2": "blk.1.attn_k.bias"}


@pytest.mark.parametrize("name", MODELS)
def test_a_tensor_that_is_missing_or_too_small_is_named(name: str, opened: Opened) -> None:
    tensor = _LAST.get(name, "blk.1.attn_output.weight")
    for change in (without(tensor), cut(tensor)):
        with pytest.raises(CorruptFile, match=tensor.removesuffix("_long.weight")):
            opened(name, change=change)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("qwen3moe", "qwen3moe.expert_gating_func", 2),
        ("qwen3moe", "qwen3moe.expert_weights_scale", 2.5),
        ("qwen3", "qwen3.attention.causal", False),
        ("qwen2", "qwen2.attention.sliding_window", 64),
        ("qwen3", "qwen3.logit_scale", 2.0),
        ("granite", "granite.rope.scaling.finetuned", False),
        ("stablelm", "stablelm.logit_scale", 2.0),
    ],
)
def test_settings_that_would_change_the_answers_are_refused(
    name: str, key: str, value: Any, opened: Opened
) -> None:
    with pytest.raises(UnsupportedModel, match=r"m\.gguf"):
        opened(name, **{key: value})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("mixtral", "llama.expert_used_count", 9),
        ("gptneox", "gptneox.attention.head_count_kv", 2),
        ("phi2", "phi2.rope.dimension_count", 18),
        ("gemma2", "gemma2.attention.sliding_window_pattern", 0),
        ("gemma3", "gemma3.attention.sliding_window_pattern", [1.0, 0.5]),
        ("gpt2", "gpt2.attention.head_count", 3),
        ("phi3", "phi3.attention.sliding_window", -1),
    ],
)
def test_impossible_settings_are_refused_with_their_name(
    name: str, key: str, value: Any, opened: Opened
) -> None:
    with pytest.raises(CorruptFile, match=r"m\.gguf"):
        opened(name, **{key: value})
