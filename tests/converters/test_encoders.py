"""Every embedding family against transformers (golden hidden states), on tiny random models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime import InferenceSession, SessionOptions

from ohmygpu.convert.embedding import aligned
from ohmygpu.convert.family import check_supported
from ohmygpu.convert.sentence import Dense, Embedder, Normalize, Pooling, Step
from ohmygpu.convert.weights import check_names
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.ladder.encoders import CASES, ROWS, EncoderCase, Float32, golden
from tests.memory_source import MemorySource

TOLERANCE = 1e-3  # relative
POOLINGS: tuple[Pooling, ...] = ("cls", "last", "max", "mean", "mean_sqrt_len", "weighted_mean")

Run = Callable[..., Float32]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a case's graph, compiled once for each pooling, on rows of token ids."""
    sessions: dict[tuple[Any, ...], InferenceSession] = {}

    def get(
        case: str,
        rows: list[list[int]],
        pooling: Pooling = "mean",
        steps: tuple[Step, ...] = (),
        recipe: str = "f32",
    ) -> Float32:
        key = (case, pooling, steps, recipe)
        if key not in sessions:
            folder = tmp_path_factory.mktemp(case)
            EncoderCase(case).compile(folder, Embedder(pooling=pooling, steps=steps), recipe)
            options = SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            sessions[key] = InferenceSession(folder / "model.onnx", options)
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        found: Float32 = sessions[key].run(None, {"input_ids": ids, "lengths": lengths})[0]
        return found

    return get


def pooled(hidden: Float32, pooling: Pooling) -> Float32:
    """What a pooling makes of one row's hidden states, (S, hidden)."""
    count = np.arange(1, len(hidden) + 1, dtype=np.float32)[:, None]
    found: dict[str, Float32] = {
        "cls": hidden[0],
        "last": hidden[-1],
        "max": hidden.max(0),
        "mean": hidden.mean(0),
        "mean_sqrt_len": hidden.sum(0) / np.sqrt(len(hidden)),
        "weighted_mean": (hidden * count).sum(0) / count.sum(),
    }
    return found[pooling]


def wanted(case: str, pooling: Pooling = "mean") -> Float32:
    return np.stack([pooled(golden()[f"{case}.{row}"], pooling) for row in range(len(ROWS))])


def assert_close(found: Float32, expected: Float32) -> None:
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0.1  # the comparison means something
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_different_lengths_gives_the_vectors_of_transformers(
    case: str, run: Run
) -> None:
    assert_close(run(case, EncoderCase(case).rows), wanted(case))


@pytest.mark.parametrize("case", CASES)
def test_each_row_alone_gives_the_same_vectors(case: str, run: Run) -> None:
    rows = EncoderCase(case).rows
    assert_close(np.concatenate([run(case, [row]) for row in rows]), wanted(case))


@pytest.mark.parametrize("case", ["bert", "modernbert", "qwen3"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_takes_the_tokens_of_its_row_alone(
    case: str, pooling: Pooling, run: Run
) -> None:
    assert_close(run(case, EncoderCase(case).rows, pooling), wanted(case, pooling))


@pytest.mark.parametrize("case", ["bert", "qwen3"])
def test_normalised_vectors_have_length_one(case: str, run: Run) -> None:
    found = run(case, EncoderCase(case).rows, "mean", (Normalize(),))
    expected = wanted(case)
    assert_close(found, expected / np.linalg.norm(expected, axis=1, keepdims=True))


@pytest.mark.parametrize("case", ["bert", "modernbert", "qwen3", "distilbert"])
def test_eight_bits_point_the_same_way(case: str, run: Run) -> None:
    found, expected = run(case, EncoderCase(case).rows, recipe="q8"), wanted(case)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(1) / lengths).min() > 0.995


def test_what_is_behind_a_row_changes_nothing_of_it(run: Run) -> None:
    rows = EncoderCase("modernbert").rows
    alone, beside = run("modernbert", [rows[2]]), run("modernbert", [rows[2], rows[0]])
    assert np.abs(alone[0] - beside[0]).max() < 1e-5


def test_a_dense_layer_follows_the_pooling(tmp_path: Path, run: Run) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(3)
    weight = rng.standard_normal((10, 48)).astype(np.float32)
    bias = rng.standard_normal(10).astype(np.float32)
    save_file({"linear.weight": weight, "linear.bias": bias}, tmp_path / "dense.safetensors")
    case = EncoderCase("bert")
    source = MemorySource(case.config, dict(case.arrays))
    source.files["2_Dense/model.safetensors"] = tmp_path / "dense.safetensors"
    step = Dense("2_Dense", 48, 10, bias=True, activation="tanh")
    folder = tmp_path / "graph"
    case.compile(folder, Embedder("mean", (step, Normalize())), source=source)
    session = InferenceSession(folder / "model.onnx")
    ids = np.array([case.rows[0]])
    found = session.run(None, {"input_ids": ids, "lengths": np.array([ids.size], np.int32)})[0]
    expected = np.tanh(wanted("bert")[0] @ weight.T + bias)
    assert_close(found[0], expected / np.linalg.norm(expected))


def test_a_dense_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"linear.weight": np.ones((10, 40), np.float32)}, tmp_path / "dense.safetensors")
    case = EncoderCase("bert")
    source = MemorySource(case.config, dict(case.arrays))
    source.files["2_Dense/model.safetensors"] = tmp_path / "dense.safetensors"
    step = Dense("2_Dense", 48, 10, bias=False, activation="")
    with pytest.raises(CorruptFile, match=r"2_Dense/model\.safetensors holds"):
        case.compile(tmp_path / "graph", Embedder("mean", (step,)), source=source)


@pytest.mark.parametrize(
    ("rename", "extra"),
    [
        (
            lambda name: f"bert.{name}",
            {"cls.predictions.bias": (64,), "bert.pooler.dense.bias": (4,)},
        ),
        (
            lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"),
            {"pooler.dense.bias": (4,)},
        ),
    ],
)
def test_names_with_a_prefix_or_of_old_files_mean_the_same(
    rename: Callable[[str], str], extra: tuple[str, ...]
) -> None:
    case = EncoderCase("bert")
    config = case.module.Config.read(case.config)
    arrays = {rename(name): array for name, array in case.arrays.items()}
    arrays |= {name: np.ones(4, np.float32) for name in extra}
    expected = case.module.weights(config)
    source = aligned(MemorySource(case.config, arrays), expected)
    check_names(source, expected, lambda name: case.module.ignored(config, name))
    for name, array in case.arrays.items():
        assert (source.read(name) == array).all()


def test_two_tensors_of_one_name_are_refused() -> None:
    case = EncoderCase("bert")
    arrays = dict(case.arrays) | {"bert.embeddings.LayerNorm.bias": np.ones(48, np.float32)}
    expected = case.module.weights(case.module.Config.read(case.config))
    with pytest.raises(CorruptFile, match=r"embeddings\.LayerNorm\.bias twice"):
        aligned(MemorySource(case.config, arrays), expected)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"hidden_act": "swoosh"}, "'swoosh'"),
        ("qwen2", {"is_causal": False}, "both directions"),
        ("qwen3", {"use_bidirectional_attention": True}, "both directions"),
        ("modernbert", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "length"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny = EncoderCase(case)
    source = MemorySource(tiny.config | changes, dict(tiny.arrays))
    with pytest.raises(UnsupportedModel, match=message):
        tiny.compile(tmp_path, Embedder("mean"), source=source)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("bert", {"num_attention_heads": 5}, "5 attention heads"),
        ("bert", {"hidden_size": None}, "hidden_size = None"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
        ("mpnet", {"pad_token_id": "one"}, "pad_token_id"),
        ("distilbert", {"n_layers": 0}, "num_hidden_layers = 0"),
    ],
)
def test_a_bad_field_of_the_config_is_named(
    case: str, changes: dict[str, Any], message: str
) -> None:
    tiny = EncoderCase(case)
    with pytest.raises(CorruptFile, match=message):
        tiny.module.Config.read(tiny.config | changes)


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}, [], "neither"),
        ({"model_type": "qwen3", "architectures": ["Qwen3Model"]}, [], "neither generates"),
        (
            {"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]},
            ["modules.json"],
            "neither generates",
        ),
    ],
)
def test_classes_that_neither_generate_nor_embed_are_refused(
    config: dict[str, Any], files: list[str], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        check_supported(config, files)


def test_an_encoder_has_no_cache(tmp_path: Path) -> None:
    import onnx

    EncoderCase("qwen3").compile(tmp_path, Embedder("last"))
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input] == ["input_ids", "lengths"]
    assert [value.name for value in graph.output] == ["embeddings"]


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_the_golden_hidden_states_are_those_of_transformers(case: str) -> None:
    for name, hidden in EncoderCase(case).reference().items():
        assert np.abs(hidden - golden()[name]).max() < 1e-4
