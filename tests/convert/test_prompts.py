"""prompts.onnx: the same model in products of 8-bit integers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.decoder import Decoder
from ohmygpu.core.records import GRAPH_FILE, PROMPT_GRAPH
from tests.ladder.checks import distance
from tests.ladder.models import PROMPT, STEPS, Case, Float32, cases, golden
from tests.onnx_run import OnnxRun

TOLERANCE = 0.12  # of networks so small that every rounding shows; q8's model.onnx has up to 0.1

FAMILIES = {
    "arcee": "usual",
    "ernie4_5": "usual",
    "gemma": "multi_query",
    "glm": "half",
    "granite": "scaled",
    "llama": "biases",
    "mistral": "window",
    "ministral3": "within",
    "phi3": "phi_4",
    "qwen2": "tied",
    "qwen3": "tied",
    "seed_oss": "biases",
    "smollm3": "interval",
    "cohere": "biases",
    "exaone4": "hybrid",
    "falcon": "7b",
    "gemma2": "capped",
    "gemma3_text": "new_spelling",
    "glm4": "half",
    "gpt2": "gpt2",
    "gpt_neox": "in_sequence",
    "nemotron": "biases",
    "olmo2": "grouped",
    "olmo3": "scaled",
    "phi": "phi_2",
    "stablelm": "3b",
    "starcoder2": "3b",
}
EXPERTS = {"gpt_oss": "clamped", "mixtral": "two_of_four", "qwen2_moe": "shared"}


def compiled(case: Case, folder: Path, recipe: str = "q8") -> Decoder:
    target = recipes.target("cpu-uint8")
    decoder, _ = write_graph(
        case.source(), folder, recipes.recipe(recipe), target, lambda done, total: None
    )
    return decoder


def prompts_run(folder: Path, rows: int = 1, threads: int = 2) -> OnnxRun:
    return OnnxRun(folder, rows, length=48, threads=threads, graph=PROMPT_GRAPH)


def logits(case: Case, run: OnnxRun) -> Float32:
    """Of the prompt in chunks, then of single tokens."""
    ids = case.token_ids
    found = [run.prefill(ids[:PROMPT], chunks=[8, 5])]
    found += [run.decode([ids[at]], [at + 1]) for at in range(PROMPT, PROMPT + STEPS)]
    return np.concatenate(found)


@pytest.mark.parametrize(("family", "name"), FAMILIES.items())
def test_every_family_is_close_to_float32(family: str, name: str, tmp_path: Path) -> None:
    case = cases(family)[name]
    assert compiled(case, tmp_path).prompt_bytes > 0
    assert distance(logits(case, prompts_run(tmp_path)), golden(family)[name]) < TOLERANCE


@pytest.mark.parametrize(("family", "name"), EXPERTS.items())
def test_mixtures_of_experts_have_one_graph(family: str, name: str, tmp_path: Path) -> None:
    case, seen = cases(family)[name], [(0, 0)]
    built, _ = write_graph(
        case.source(),
        tmp_path,
        recipes.recipe("q8"),
        recipes.target("cpu-uint8"),
        lambda *counts: seen.append(counts),
    )
    assert built.prompt_bytes == 0
    assert seen[-1][0] == seen[-1][1] > 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("prompts")]


def test_unquantised_weights_have_one_graph(tmp_path: Path) -> None:
    assert compiled(cases("llama")["grouped"], tmp_path, "f32").prompt_bytes == 0
    assert not (tmp_path / PROMPT_GRAPH).exists()


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "biases"), ("llama", "multi_head_tied"), ("gpt2", "gpt2")]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_prompt_gets_the_same_bits_alone_in_any_batch_and_in_any_chunks(
    family: str, name: str, threads: int, tmp_path: Path
) -> None:
    """Chunks of two tokens at least: the scheduler makes no others."""
    case = cases(family)[name]
    compiled(case, tmp_path)
    run, ids = prompts_run(tmp_path, rows=3, threads=threads), case.token_ids[:PROMPT]
    whole = run.prefill(ids)
    for chunks in ([2] * 10, [2, 3, 7], [4] * 5, [PROMPT - 2]):
        np.testing.assert_array_equal(run.prefill(ids, row=1, chunks=chunks), whole)
    beside = run.run(np.array([ids, ids[::-1], ids]), [PROMPT] * 3, total=PROMPT)
    parts = beside.reshape(3, PROMPT, -1)
    np.testing.assert_array_equal(parts[0], whole)
    np.testing.assert_array_equal(parts[2], whole)


def test_a_single_token_gets_the_same_bits_alone_and_in_a_batch(tmp_path: Path) -> None:
    case = cases("llama")["biases"]
    compiled(case, tmp_path)
    run, ids, lengths = prompts_run(tmp_path, rows=3), case.token_ids, (14, 9, 4)
    for row, length in enumerate(lengths):
        run.fill(ids[:length], row)
    together = run.decode([ids[length] for length in lengths], [length + 1 for length in lengths])
    for row, length in enumerate(lengths):
        alone = run.decode([ids[length]], [length + 1], first_row=row)
        np.testing.assert_array_equal(together[row], alone[0])


def test_model_onnx_goes_on_from_the_cache_that_prompts_onnx_wrote(tmp_path: Path) -> None:
    case = cases("llama")["biases"]
    compiled(case, tmp_path)
    ids, wanted = case.token_ids, golden("llama")["biases"]
    first, then = prompts_run(tmp_path), OnnxRun(tmp_path, length=48)
    first.fill(ids[:PROMPT])
    then.past = first.past
    found = [then.decode([ids[at]], [at + 1]) for at in range(PROMPT, PROMPT + STEPS)]
    assert distance(np.concatenate(found), wanted[PROMPT:]) < TOLERANCE


def test_both_graphs_take_and_give_the_same(tmp_path: Path) -> None:
    compiled(cases("llama")["dynamic"], tmp_path)
    signatures = []
    for name in (GRAPH_FILE, PROMPT_GRAPH):
        graph = onnx.load(str(tmp_path / name), load_external_data=False).graph
        signatures.append(([*graph.input], [*graph.output]))
        assert "rope_length" in {tensor.name for tensor in graph.initializer}
    assert signatures[0] == signatures[1]


def test_embedding_and_head_are_stored_once(tmp_path: Path) -> None:
    built = compiled(cases("llama")["grouped"], tmp_path)
    graph = onnx.load(str(tmp_path / PROMPT_GRAPH), load_external_data=False).graph
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
    }
    files = {name: place.get("location") for name, place in places.items()}
    assert files["model.embed_tokens.rows_q8"] == f"{GRAPH_FILE}.data"
    assert files["lm_head.weight_q8"] == f"{GRAPH_FILE}.data"
    assert files["model.layers.0.mlp.down_proj.weight_integers"] == f"{PROMPT_GRAPH}.data"
    assert not [name for name in files if "proj.weight_q8" in name]
    stored = (tmp_path / f"{PROMPT_GRAPH}.data").stat().st_size
    assert built.prompt_bytes > stored > 0


def test_the_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        compiled(cases("qwen2")["tied"], tmp_path / name)
        files = (PROMPT_GRAPH, f"{PROMPT_GRAPH}.data")
        found.append([(tmp_path / name / file).read_bytes() for file in files])
    assert found[0] == found[1]


def test_both_ways_to_store_integers_are_the_same_integers(tmp_path: Path) -> None:
    graphs = {}
    for kind in ("int8", "uint8"):
        folder = tmp_path / kind
        folder.mkdir()
        target = replace(recipes.target(f"cpu-{kind}"))
        case = cases("llama")["biases"]
        write_graph(case.source(), folder, recipes.recipe("q8"), target, lambda done, total: None)
        graphs[kind] = onnx.load(str(folder / PROMPT_GRAPH)).graph.initializer
    for signed, unsigned in zip(graphs["int8"], graphs["uint8"], strict=True):
        values = onnx.numpy_helper.to_array(signed).astype(np.int64)
        others = onnx.numpy_helper.to_array(unsigned).astype(np.int64)
        if signed.name.endswith("weight_integers"):
            assert np.abs(values).max() == 127
            others = others - 128
        elif signed.name == "integers.weight_zero":
            assert (values, others) == (0, 128)
            continue
        np.testing.assert_array_equal(values, others)


def test_products_of_unsigned_integers_are_exact_at_the_extremes() -> None:
    """On AVX2 without VNNI products of uint8 and int8 saturate; these must not, anywhere."""
    rows, depth, columns = 3, 8960, 40
    a = np.tile(np.array([0, 255], np.uint8), (rows, depth // 2))
    b = np.tile(np.array([[255], [0], [0], [255]], np.uint8), (depth // 4, columns))
    a[1], b[:, 1] = 255, 255
    nodes = [
        helper.make_node(
            "MatMulIntegerToFloat",
            ["a", "b", "one", "ones", "zero", "zero"],
            ["y"],
            domain="com.microsoft",
        )
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "products",
        [value("a", onnx.TensorProto.UINT8, [rows, depth])],
        [value("y", onnx.TensorProto.FLOAT, [rows, columns])],
        [
            onnx.numpy_helper.from_array(array, name)
            for name, array in (
                ("b", b),
                ("one", np.array(1, np.float32)),
                ("ones", np.ones(columns, np.float32)),
                ("zero", np.array(128, np.uint8)),
            )
        ],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = (a.astype(np.int64) - 128) @ (b.astype(np.int64) - 128)
    np.testing.assert_array_equal(session.run(None, {"a": a})[0], wanted.astype(np.float32))
