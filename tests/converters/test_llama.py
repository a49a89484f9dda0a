"""The Llama family against transformers (golden vectors), on tiny models with random weights.

`python tests/golden/llama.py` writes the golden vectors anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.family import family
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.golden.llama import (
    CASES,
    PROMPT,
    STEPS,
    STRETCHED,
    Float32,
    arrays,
    compute,
    config,
    golden,
    token_ids,
)
from tests.memory_source import MemorySource
from tests.onnx_run import OnnxRun

TOLERANCE = 1e-3  # relative
LLAMA = family("llama")
FIXED = [case for case in CASES if case not in STRETCHED]

Compiled = Callable[[str], Path]


def source(case: str, **changes: Any) -> MemorySource:
    read = config(case) | changes
    return MemorySource(read, arrays(case, LLAMA.weights(LLAMA.Config.read(read))))


def compile_f32(origin: MemorySource, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    target = recipes.target("cpu")
    write_graph(origin, folder, recipes.recipe("f32"), target, lambda done, total: None)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Folder of a case's f32 graph, compiled once."""
    folders: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in folders:
            folders[case] = compile_f32(source(case), tmp_path_factory.mktemp(case))
        return folders[case]

    return get


def assert_close(found: Float32, wanted: Float32) -> None:
    assert found.shape == wanted.shape
    assert np.abs(wanted).max() > 0.5  # the comparison means something
    assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max()
    assert np.linalg.norm(found - wanted) <= TOLERANCE * np.linalg.norm(wanted)


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_decode_gives_the_logits_of_transformers(
    case: str, compiled: Compiled
) -> None:
    run, ids = OnnxRun(compiled(case), length=48), token_ids(case)
    logits = [run.prefill(ids[:PROMPT])]
    logits += [run.decode([ids[at]], [at + 1]) for at in range(PROMPT, PROMPT + STEPS)]
    assert_close(np.concatenate(logits), golden()[case])


@pytest.mark.parametrize("chunks", [(8, 8), (1, 1, 17), (21,)])
@pytest.mark.parametrize("case", FIXED)
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(
    case: str, chunks: tuple[int, ...], compiled: Compiled
) -> None:
    run = OnnxRun(compiled(case), length=48)
    assert_close(run.prefill(token_ids(case), chunks=chunks), golden()[case])


@pytest.mark.parametrize("case", FIXED)
def test_rows_of_different_lengths_decode_together(case: str, compiled: Compiled) -> None:
    run, ids, wanted = OnnxRun(compiled(case), rows=4, length=48), token_ids(case), golden()[case]
    lengths = [3, PROMPT, 1, 11]
    for row, length in enumerate(lengths):
        run.prefill(ids[:length], row)
    for step in range(STEPS):
        totals = [length + step + 1 for length in lengths]
        logits = run.decode([ids[total - 1] for total in totals], totals)
        assert_close(logits, wanted[[total - 1 for total in totals]])


@pytest.mark.parametrize("case", FIXED)
def test_prompts_of_different_lengths_start_together(case: str, compiled: Compiled) -> None:
    run, ids, wanted = OnnxRun(compiled(case), rows=2, length=48), token_ids(case), golden()[case]
    short, long = ids[:5] + [0] * 7, ids[:12]
    logits = run.run(np.array([short, long]), [5, 12], total=12).reshape(2, 12, -1)
    assert_close(logits[0, :5], wanted[:5])
    assert_close(logits[1], wanted[:12])


@pytest.mark.parametrize("case", STRETCHED)
def test_length_dependent_rope_gives_each_row_of_a_batch_its_own_frequencies(
    case: str, compiled: Compiled
) -> None:
    ids, lengths = token_ids(case), [3, PROMPT, 12, PROMPT + 4]
    alone, together = (OnnxRun(compiled(case), rows=4, length=48) for _ in range(2))
    wanted = []
    for row, length in enumerate(lengths):
        alone.prefill(ids[:length])
        wanted.append(alone.decode([ids[length]], [length + 1]))
        together.prefill(ids[:length], row)
    logits = together.decode([ids[length] for length in lengths], [n + 1 for n in lengths])
    assert_close(logits, np.concatenate(wanted))


def test_rope_length_makes_chunks_of_a_long_prompt_agree_with_the_whole(
    compiled: Compiled,
) -> None:
    run, ids, wanted = OnnxRun(compiled("dynamic"), length=48), token_ids("dynamic"), golden()
    run.extra["rope_length"] = np.array([PROMPT], np.int32)
    logits = run.prefill(ids[:PROMPT], chunks=[8, 8])
    assert_close(logits, wanted["dynamic"][:PROMPT])
    del run.extra["rope_length"]
    apart = run.prefill(ids[:PROMPT], chunks=[8, 8])
    assert np.abs(apart - logits).max() > 0.01  # without it, chunks see their own lengths


def test_logits_are_made_only_for_the_rows_asked_for(compiled: Compiled) -> None:
    run, ids = OnnxRun(compiled("grouped"), length=48), token_ids("grouped")[:PROMPT]
    wanted = golden()["grouped"]
    assert_close(run.run(np.array([ids]), [PROMPT], logit_rows=[PROMPT - 1, 2]), wanted[[21, 2]])
    assert run.run(np.array([ids]), [PROMPT], logit_rows=[]).shape == (0, 64)


def test_every_projection_is_one_product_and_attention_one_node(compiled: Compiled) -> None:
    import onnx

    graph = onnx.load(compiled("grouped") / "model.onnx", load_external_data=False).graph
    names = [node.name for node in graph.node if node.name.startswith("/model/layers.1/")]
    assert names == [
        f"/model/layers.1/{name}"
        for name in (
            "input_layernorm/SkipSimplifiedLayerNormalization",
            "attn/qkv_proj/FusedMatMul",
            "attn/GroupQueryAttention",
            "attn/o_proj/FusedMatMul",
            "post_attention_layernorm/SkipSimplifiedLayerNormalization",
            "mlp/gate_proj/FusedMatMul",
            "mlp/up_proj/FusedMatMul",
            "mlp/act/QuickGelu",
            "mlp/Mul",
            "mlp/down_proj/FusedMatMul",
        )
    ]


def test_tensors_that_carry_nothing_are_ignored(tmp_path: Path) -> None:
    origin = source("multi_head_tied")
    spare = dict(origin.arrays) | {
        "lm_head.weight": origin.arrays["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    folder = compile_f32(MemorySource(origin.config, spare), tmp_path)
    case = "multi_head_tied"
    logits = OnnxRun(folder, length=48).prefill(token_ids(case)[:PROMPT])
    assert_close(logits, golden()[case][:PROMPT])


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    origin = source("grouped")
    arrays = {name: array for name, array in origin.arrays.items() if "k_proj" not in name}
    with pytest.raises(CorruptFile, match=r"lack model\.layers\.0\.self_attn\.k_proj\.weight"):
        compile_f32(MemorySource(origin.config, arrays), tmp_path)


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    origin = source("grouped")
    arrays = dict(origin.arrays) | {"model.layers.0.self_attn.q_norm.weight": np.ones(16, "f4")}
    with pytest.raises(UnsupportedModel, match=r"self_attn\.q_norm\.weight"):
        compile_f32(MemorySource(origin.config, arrays), tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    origin = source("grouped")
    arrays = dict(origin.arrays) | {"model.norm.weight": np.ones(63, np.float32)}
    with pytest.raises(CorruptFile, match=r"model\.norm\.weight has shape \[63\].*\[64\]"):
        compile_f32(MemorySource(origin.config, arrays), tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", ["f32", "q8", "q4"])
def test_a_weight_that_is_no_number_is_refused_and_named(
    bad: float, recipe: str, tmp_path: Path
) -> None:
    origin = source("grouped")
    origin.arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    with pytest.raises(CorruptFile, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        write_graph(
            origin,
            tmp_path,
            recipes.recipe(recipe),
            recipes.target("cpu"),
            lambda done, total: None,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "snake"}, "activation 'snake'.*silu"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "'spiral'.*known: .*yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
    ],
)
def test_what_is_not_built_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        LLAMA.Config.read(config("grouped") | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size = None"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"attention_bias": 1}, "attention_bias = 1"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"rope_scaling": [2.0]}, r"rope_scaling = \[2.0\]"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor = None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
        ({"rope_freq_factors": [1.0, 2.0]}, "rope_freq_factors = 2 values; 8 numbers"),
    ],
)
def test_a_bad_field_of_the_config_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptFile, match=message):
        LLAMA.Config.read(config("grouped") | changes)


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_the_golden_logits_are_those_of_transformers(case: str) -> None:
    assert_close(golden()[case], compute(case, source(case).arrays))
