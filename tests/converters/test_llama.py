"""What the ladder does not show of Llama: the graph's shape, optional inputs, bad files."""

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
from tests.ladder.models import PROMPT, Case, Float32, cases
from tests.ladder.models import golden as golden_of
from tests.memory_source import MemorySource
from tests.onnx_run import OnnxRun

TOLERANCE = 1e-3  # relative
LLAMA = family("llama")
FIXED = [case for case in cases("llama") if case not in ("dynamic", "longrope")]

Compiled = Callable[[str], Path]


def golden() -> dict[str, Float32]:
    return golden_of("llama")


def config(case: str) -> dict[str, Any]:
    return dict(cases("llama")[case].config)


def token_ids(case: str) -> list[int]:
    return cases("llama")[case].token_ids


def source(case: str, **changes: Any) -> MemorySource:
    origin = Case("llama", case, config(case) | changes).source()
    origin.arrays = {name: array.copy() for name, array in origin.arrays.items()}
    return origin


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


@pytest.mark.parametrize("case", FIXED)
def test_prompts_of_different_lengths_start_together(case: str, compiled: Compiled) -> None:
    run, ids, wanted = OnnxRun(compiled(case), rows=2, length=48), token_ids(case), golden()[case]
    short, long = ids[:5] + [0] * 7, ids[:12]
    logits = run.run(np.array([short, long]), [5, 12], total=12).reshape(2, 12, -1)
    assert_close(logits[0, :5], wanted[:5])
    assert_close(logits[1], wanted[:12])


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
