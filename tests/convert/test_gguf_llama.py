"""A llama in GGUF, seen as the Hugging Face model it was converted from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from ohmygpu.convert import source as source_module
from ohmygpu.convert.source import Source, open_source
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.convert.gguf_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    TOKENS,
    llama_metadata,
    llama_tensors,
    write_gguf,
)

Tensors = dict[str, tuple[NDArray[Any], str]]
Tiny = Callable[..., Source]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Tiny]:
    """Opens a tiny llama with the tensors and metadata given; closed after the test."""
    with ExitStack() as stack:

        def open_tiny(tensors: Tensors | None = None, **changes: Any) -> Source:
            path = write_gguf(tmp_path / "m.gguf", llama_metadata(**changes), tensors)
            source = open_source({"m.gguf": path})
            stack.callback(source.close)
            return source

        yield open_tiny


def reference(tensors: Tensors, name: str) -> NDArray[np.float32]:
    data, type_name = tensors[name]
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name in ("F16", "BF16"):
        data = gguf.quants.quantize(data, kind)
    values: NDArray[np.float32] = gguf.quants.dequantize(data.view(np.uint8), kind)
    return values.reshape(data.shape[0], -1) if data.ndim > 1 else values


def rotate_neighbours(x: NDArray[np.float32], angles: NDArray[np.float32]) -> NDArray[np.float32]:
    """RoPE as llama.cpp applies it to llama: (heads, D) with pairs (2i, 2i + 1)."""
    even, odd = x[:, 0::2], x[:, 1::2]
    turned = np.empty_like(x)
    turned[:, 0::2] = even * np.cos(angles) - odd * np.sin(angles)
    turned[:, 1::2] = even * np.sin(angles) + odd * np.cos(angles)
    return turned


def rotate_halves(x: NDArray[np.float32], angles: NDArray[np.float32]) -> NDArray[np.float32]:
    """RoPE as transformers applies it: pairs (i, i + D/2)."""
    low, high = np.split(x, 2, axis=1)
    return np.concatenate(
        [
            low * np.cos(angles) - high * np.sin(angles),
            low * np.sin(angles) + high * np.cos(angles),
        ],
        axis=1,
    )


def test_the_config_is_what_config_json_would_say(tiny: Tiny) -> None:
    source = tiny()
    assert source.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": len(TOKENS),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "rope_theta": 10000.0,
    }


def test_every_tensor_has_its_hugging_face_name_and_shape(tiny: Tiny) -> None:
    source = tiny()
    shapes = {name: info.shape for name, info in source.tensors.items()}
    assert len(shapes) == 2 + 9 * LAYERS
    assert shapes["model.embed_tokens.weight"] == (len(TOKENS), HIDDEN)
    assert shapes["model.norm.weight"] == (HIDDEN,)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (KV_HEADS * HEAD_DIM, HIDDEN)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (HIDDEN, INNER)
    assert source.tensors["model.embed_tokens.weight"].dtype == "Q6_K"
    assert source.total_bytes == sum(
        data.nbytes for data, _ in llama_tensors(np.random.default_rng(0)).values()
    )


def test_values_of_unpermuted_tensors_are_the_reference_decoders(tiny: Tiny) -> None:
    tensors = llama_tensors(np.random.default_rng(3), body="Q5_K")
    source = tiny(tensors)
    for name, hf_name in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
    ):
        np.testing.assert_array_equal(source.read(hf_name), reference(tensors, name))


@pytest.mark.parametrize("body", ["Q4_K", "Q8_0", "F16", "BF16", "F32"])
def test_attention_scores_are_those_of_the_gguf_rotation(tiny: Tiny, body: str) -> None:
    tensors = llama_tensors(np.random.default_rng(4), body=body)
    source = tiny(tensors)
    x = np.random.default_rng(5).standard_normal((2, HIDDEN)).astype(np.float32)
    exponents = np.arange(0, HEAD_DIM, 2, dtype=np.float32) / np.float32(HEAD_DIM)
    frequencies = (10000.0**-exponents).astype(np.float32)
    query_angles, key_angles = np.float32(7) * frequencies, np.float32(3) * frequencies
    scores = []
    for rotate, weights in (
        (rotate_neighbours, [reference(tensors, f"blk.1.attn_{part}.weight") for part in "qk"]),
        (
            rotate_halves,
            [source.read(f"model.layers.1.self_attn.{part}_proj.weight") for part in "qk"],
        ),
    ):
        queries = rotate((x[0] @ weights[0].T).reshape(HEADS, HEAD_DIM), query_angles)
        keys = rotate((x[1] @ weights[1].T).reshape(KV_HEADS, HEAD_DIM), key_angles)
        grouped = np.repeat(keys, HEADS // KV_HEADS, axis=0)
        scores.append((queries * grouped).sum(axis=1))
    tolerance = 1e-5 * np.abs(scores[0]).max() * HEAD_DIM
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=tolerance)


def test_blocks_hold_the_same_weights_in_the_same_order(tiny: Tiny) -> None:
    source = tiny()
    for name, info in source.tensors.items():
        blocks, layout = source.blocks(name), source.block_layout(name)
        if info.dtype == "F32":
            assert blocks is None
            assert layout is None
            continue
        assert blocks is not None
        assert layout is not None
        assert (blocks.bits, blocks.block_size) == (layout.bits, layout.block_size)
        assert (blocks.correction is not None) == layout.has_correction
        np.testing.assert_array_equal(blocks.dequantize(), source.read(name))


def test_rows_and_blocks_can_be_read_in_any_pieces(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny()
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = source.read(name)
    np.testing.assert_array_equal(source.read_rows(name, 3, 131), whole[3:131])
    assert source.read_rows(name, 5, 5).shape == (0, HIDDEN)
    np.testing.assert_array_equal(source.read_rows("model.norm.weight", 2, 9).shape, (7,))
    monkeypatch.setattr(source_module, "ROWS_CHUNK_ELEMENTS", 3 * HIDDEN)
    np.testing.assert_array_equal(source.read(name), whole)
    part = source.blocks(name, 3, 131)
    assert part is not None
    np.testing.assert_array_equal(part.dequantize(), whole[3:131])


def test_an_own_output_matrix_unties_the_embedding(tiny: Tiny) -> None:
    tensors = llama_tensors(np.random.default_rng(6))
    tensors["output.weight"] = tensors["token_embd.weight"]
    source = tiny(tensors)
    assert source.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in source.tensors


def test_biases_follow_their_weights(tiny: Tiny) -> None:
    tensors = llama_tensors(np.random.default_rng(7))
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    for layer in range(LAYERS):
        tensors[f"blk.{layer}.attn_q.bias"] = (bias, "F32")
    source = tiny(tensors)
    assert source.config["attention_bias"] is True
    found = source.read("model.layers.0.self_attn.q_proj.bias").reshape(HEADS, 2, HEAD_DIM // 2)
    np.testing.assert_array_equal(found[0, 0], np.arange(0, HEAD_DIM, 2))
    np.testing.assert_array_equal(found[1, 1], HEAD_DIM + np.arange(1, HEAD_DIM, 2))


def test_rope_factors_of_llama_3_are_handed_on(tiny: Tiny) -> None:
    tensors = llama_tensors(np.random.default_rng(8))
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    tensors["rope_freqs.weight"] = (factors, "F32")
    source = tiny(tensors)
    found = np.array(source.config["rope_freq_factors"], np.float32)
    np.testing.assert_array_equal(found, factors)
    assert "rope_freqs.weight" not in source.tensors


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 16.0,
                "scaling.original_context_length": 4096,
            },
            {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 0.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": pytest.approx(0.5 * (1 + 0.1 * np.log(4))),
            },
        ),
    ],
)
def test_rope_scaling_becomes_the_configs(
    tiny: Tiny, keys: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    source = tiny(**{f"llama.rope.{key}": value for key, value in keys.items()})
    assert source.config.get("rope_scaling") == expected


def test_all_ends_of_turn_are_in_the_config(tiny: Tiny) -> None:
    source = tiny(**{"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 4})
    assert source.config["eos_token_id"] == [2, 4, 5]


def test_one_value_per_layer_is_one_value_when_all_are_equal(tiny: Tiny) -> None:
    source = tiny(**{"llama.attention.head_count_kv": [KV_HEADS] * LAYERS})
    assert source.config["num_key_value_heads"] == KV_HEADS


@pytest.mark.parametrize(
    ("file_type", "shown"), [(15, "Q4_K_M"), (3, "Q4_1"), (None, "Q4_K"), (9999, "Q4_K")]
)
def test_the_quantisation_shown_is_the_files_own(
    tiny: Tiny, file_type: int | None, shown: str
) -> None:
    source = tiny(**{"general.file_type": file_type})
    assert source.quantization == shown


BAD: dict[str, list[Any]] = {
    "llama.block_count": [0, 2**31, -1, "two", None, [2, 2, 3]],
    "llama.attention.head_count": [0, 3, None],
    "llama.attention.head_count_kv": [0, 3],
    "llama.attention.key_length": [0, 63],
    "llama.embedding_length": [0, 255, None],
    "llama.feed_forward_length": [0, 100, None],
    "llama.context_length": [0, None],
    "llama.attention.layer_norm_rms_epsilon": [0.0, -1.0, float("nan"), None],
    "llama.rope.freq_base": [0.0, float("inf"), "x"],
    "llama.rope.dimension_count": [32],
    "llama.rope.scaling.type": ["longrope", 4],
    "llama.rope.scaling.factor": [-1.0],
    "llama.expert_count": [8],
    "llama.attention.scale": [0.5],
    "llama.logit_scale": [2.0],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD.items() for value in values]
)
def test_impossible_settings_are_refused_with_their_name(tiny: Tiny, key: str, value: Any) -> None:
    with pytest.raises((CorruptFile, UnsupportedModel), match=r"m\.gguf"):
        tiny(**{key: value})


def test_a_missing_tensor_is_named(tiny: Tiny) -> None:
    tensors = llama_tensors(np.random.default_rng(9))
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(CorruptFile, match=r"lacks the tensor blk\.1\.ffn_up\.weight"):
        tiny(tensors)


def test_an_unknown_tensor_is_named(tiny: Tiny) -> None:
    tensors = llama_tensors(np.random.default_rng(9))
    tensors["blk.0.attn_q_norm.weight"] = (np.ones(HEAD_DIM, np.float32), "F32")
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_q_norm\.weight"):
        tiny(tensors)


def test_a_tensor_of_another_shape_is_named(tiny: Tiny) -> None:
    tensors = llama_tensors(np.random.default_rng(9))
    tensors["blk.0.attn_k.weight"] = tensors["blk.0.attn_q.weight"]
    with pytest.raises(
        CorruptFile, match=r"blk\.0\.attn_k\.weight.*\(256, 256\), not \(128, 256\)"
    ):
        tiny(tensors)


@pytest.mark.parametrize("architecture", ["mamba", "clip", "\x1b[31mred"])
def test_another_architecture_is_told_what_is_supported(tmp_path: Path, architecture: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", {}, {}, architecture=architecture)
    with pytest.raises(UnsupportedModel, match=r"can be compiled: .*llama") as caught:
        open_source({"m.gguf": path})
    assert caught.value.message.isprintable()
    assert "llama" in caught.value.details["supported"]
