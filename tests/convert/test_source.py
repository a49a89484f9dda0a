"""A real model, SmolLM2-135M-Instruct, through open_source and prepare_tokenizer."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from ohmygpu.convert.gguf import GgufFile
from ohmygpu.convert.source import Source, open_source
from ohmygpu.convert.tokenizer import TokenizerFacts, prepare_tokenizer
from ohmygpu.core.records import TEMPLATE_FILE, TOKENIZER_FILE

EMBEDDING = "model.embed_tokens.weight"

# What llama.cpp's own tokenizer makes of a text with a little of everything.
HARD_TEXT = "<|im_start|>user\n  It's 1234,\tÀ 日本😀\n\n\n def f(x):  # ½\n<|im_end|>\n"
HARD_TOKENS = [1, 4093, 3805, 657, 506, 216, 33, 34, 35, 36, 28, 197, 142, 218, 17097, 241, 115]
HARD_TOKENS += [40993, 10813, 242, 218, 16506, 753, 275, 24, 104, 727, 216, 907, 216, 16738, 198]
HARD_TOKENS += [2, 198]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[Source]:
    """The opened model."""
    source = open_source({smollm2_gguf.name: smollm2_gguf})
    yield source
    source.close()


def test_a_real_models_weights_survive_repacking_bit_for_bit(
    smollm2: Source, smollm2_gguf: Path
) -> None:
    file = GgufFile("smollm2", smollm2_gguf)
    layer = "model.layers.17."
    for name, gguf_name in (
        (EMBEDDING, "token_embd"),
        (layer + "self_attn.v_proj.weight", "blk.17.attn_v"),
        (layer + "self_attn.o_proj.weight", "blk.17.attn_output"),
        (layer + "mlp.down_proj.weight", "blk.17.ffn_down"),
        (layer + "input_layernorm.weight", "blk.17.attn_norm"),
    ):
        stored = file.tensors[gguf_name + ".weight"]
        rows = min(stored.rows, 2000)
        kind = gguf.GGMLQuantizationType[stored.type_name]
        expected = gguf.quants.dequantize(file.read_rows(stored, 0, rows), kind)
        found = smollm2.read_rows(name, 0, rows)
        np.testing.assert_array_equal(found, expected.reshape(found.shape))
    file.close()
    for name in (name for name in smollm2.tensors if name.startswith((EMBEDDING, layer))):
        blocks = smollm2.blocks(name)
        if blocks is not None:
            np.testing.assert_array_equal(blocks.dequantize(), smollm2.read(name))


def test_a_real_models_config_is_the_published_one(smollm2: Source) -> None:
    published = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "attention_bias": False,
        "license": "apache-2.0",
    }
    assert {key: smollm2.config[key] for key in published} == published
    assert smollm2.quantization == "Q4_1"
    assert sum(info.elements for info in smollm2.tensors.values()) == 134_515_008


def test_a_real_tokenizer_gives_the_tokens_llama_cpp_gives(smollm2: Source, tmp_path: Path) -> None:
    facts = prepare_tokenizer(smollm2, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / TOKENIZER_FILE))
    assert tokenizer.encode(HARD_TEXT).ids == HARD_TOKENS
    assert tokenizer.decode(HARD_TOKENS, skip_special_tokens=False) == HARD_TEXT
    assert facts == TokenizerFacts(
        bos_token_id=1,
        eos_token_ids=(2, 0),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        has_template=True,
        generation={},
    )
    assert "<|im_start|>" in (tmp_path / TEMPLATE_FILE).read_text(encoding="utf-8")


def test_reading_needs_little_more_memory_than_its_result(smollm2: Source) -> None:
    tracemalloc.start()
    try:
        rows = smollm2.read_rows(EMBEDDING, 0, 1024)
        few = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        blocks = smollm2.blocks(EMBEDDING)
        whole = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert blocks is not None
    result = blocks.codes.nbytes + blocks.scales.nbytes
    assert few < rows.nbytes + (8 << 20)
    assert whole < result + (32 << 20)
