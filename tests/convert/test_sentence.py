"""What a repository says of how its model embeds, and which of its files that takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.convert.embedding import embedder_of
from ohmygpu.convert.sentence import Dense, Embedder, Normalize, gguf_embedder, read_embedder
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from ohmygpu.core.model_files import select_files
from ohmygpu.core.sentence_files import sentence_files
from tests.memory_source import MemorySource
from tests.tiny_embedder import (
    LENGTH,
    MAX_TOKENS,
    MODULES,
    PREFIX,
    compile_tiny,
    repository_files,
    write_repository,
)


def describe(folder: Path, **contents: Any) -> MemorySource:
    """A source with files, `/` written as `__` and without `.json`."""
    source = MemorySource({"model_type": "bert"}, {})
    for name, content in contents.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        source.files[f"{name.replace('__', '/')}.json"] = path
    return source


def modules(*kinds: str) -> list[dict[str, Any]]:
    """modules.json with these classes after the transformer."""
    steps = [{"type": f"{PREFIX}.{kind}", "path": f"{n}_{kind}"} for n, kind in enumerate(kinds, 1)]
    return [MODULES[0], *steps]


def test_a_compiled_repository_knows_how_it_embeds(tmp_path: Path) -> None:
    compiled = compile_tiny(write_repository(tmp_path / "repo"), tmp_path / "out")
    assert (compiled.kind, compiled.pooling, compiled.normalize) == ("encoder", "mean", True)
    assert (compiled.embedding_length, compiled.context_length) == (LENGTH, MAX_TOKENS)
    assert compiled.prompts == {"query": "q "}
    assert compiled.kv_bytes_per_token == 0


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_every_pooling_is_read(settings: dict[str, Any], pooling: str, tmp_path: Path) -> None:
    found = read_embedder(
        describe(tmp_path, modules=modules("Pooling"), **{"1_Pooling__config": settings})
    )
    assert found == Embedder(pooling=pooling)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls_token, mean"),
        ({}, "nothing"),
        ({"pooling_mode": "attention"}, "attention"),
    ],
)
def test_a_pooling_we_do_not_have_is_named(
    settings: dict[str, Any], shown: str, tmp_path: Path
) -> None:
    source = describe(tmp_path, modules=modules("Pooling"), **{"1_Pooling__config": settings})
    with pytest.raises(UnsupportedModel, match=f"pools by {shown}"):
        read_embedder(source)


def test_dense_layers_and_normalisation_follow_in_order(tmp_path: Path) -> None:
    dense = {"in_features": 48, "out_features": 7, "bias": False}
    found = read_embedder(
        describe(
            tmp_path,
            modules=modules("Pooling", "Dense", "Dense", "Normalize"),
            **{
                "1_Pooling__config": {"pooling_mode": "mean"},
                "2_Dense__config": dense | {"activation_function": "torch.nn.modules.Identity"},
                "3_Dense__config": dense | {"activation_function": "torch.nn.modules.Tanh"},
            },
        )
    )
    assert found is not None
    assert found.steps == (
        Dense("2_Dense", 48, 7, bias=False, activation=""),
        Dense("3_Dense", 48, 7, bias=False, activation="tanh"),
        Normalize(),
    )
    assert (found.length(48), found.normalize) == (7, True)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("Pooling", "LSTM"), "the step 'LSTM'"),
        (("Normalize",), "the step 'Normalize'"),
        ((), "no pooling: this model gives a vector for each token"),
    ],
)
def test_a_step_we_do_not_have_is_named(
    kinds: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    source = describe(
        tmp_path, modules=modules(*kinds), **{"1_Pooling__config": {"pooling_mode": "mean"}}
    )
    with pytest.raises(UnsupportedModel, match=message):
        read_embedder(source)


@pytest.mark.parametrize("content", [{"a": 1}, [1], [{"path": ""}], "text"])
def test_a_damaged_list_of_steps_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"modules\.json"):
        read_embedder(describe(tmp_path, modules=content))


def test_the_tokenizer_says_how_long_a_text_may_be_where_nothing_else_does(tmp_path: Path) -> None:
    pooling = {"1_Pooling__config": {"pooling_mode": "mean"}}
    for limit, tokens in ((512, 512), (1e30, None)):
        found = read_embedder(
            describe(
                tmp_path,
                modules=modules("Pooling"),
                tokenizer_config={"model_max_length": limit},
                **pooling,
            )
        )
        assert found is not None
        assert found.max_tokens == tokens


def test_an_encoder_without_such_files_gives_the_mean_of_its_tokens() -> None:
    source = MemorySource({"model_type": "bert"}, {})
    assert embedder_of(source, "bert") == Embedder(pooling="mean")
    assert embedder_of(source, "llama") is None


def test_a_gguf_file_says_how_it_pools() -> None:
    metadata = {"general.architecture": "qwen3", "qwen3.pooling_type": 3}
    assert gguf_embedder(metadata) == Embedder(pooling="last", steps=(Normalize(),))
    assert gguf_embedder({"general.architecture": "qwen3"}) is None
    assert gguf_embedder(metadata | {"qwen3.pooling_type": 0}) is None
    with pytest.raises(UnsupportedModel, match="pooling_type is 4"):
        gguf_embedder(metadata | {"qwen3.pooling_type": 4})


def test_a_pull_takes_the_files_that_say_how_to_embed(tmp_path: Path) -> None:
    folder = write_repository(tmp_path)
    files = {**repository_files(folder), "2_Normalize/README.md": folder / "modules.json"}
    names = [*files, "onnx/model.onnx", "train_script.py"]
    chosen = select_files(names, None, lambda name, most: files[name].read_bytes(), "a folder")
    assert set(chosen.filenames) == set(repository_files(folder))


def test_dense_weights_that_could_run_code_are_refused_before_the_download() -> None:
    listed = json.dumps(modules("Pooling", "Dense")).encode()
    names = ["modules.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin"]
    with pytest.raises(UnsupportedModel, match=r"no 2_Dense/model\.safetensors.*run code"):
        sentence_files(names, lambda name, most: listed, "a folder")
    names.append("2_Dense/model.safetensors")
    found = sentence_files(names, lambda name, most: listed, "a folder")
    assert found == ["modules.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
