"""A model with a graph of its own for prompts: which graph computes what."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.core.records import GRAPH_FILE, PROMPT_GRAPH, CompiledModel, RunSpec
from ohmygpu.runtime_onnx.kv_cache import HostKVCache
from ohmygpu.runtime_onnx.loading import wants_prompts
from ohmygpu.runtime_onnx.model import OnnxModel
from ohmygpu.runtime_onnx.session import open_session
from tests.ladder.models import PROMPT, Float32, cases
from tests.onnx_run import OnnxRun

CASE = cases("llama")["biases"]
SPEC = RunSpec(model="tiny", folder="")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompiledModel]:
    """A tiny Llama in both graphs, and a description of it."""
    folder = tmp_path_factory.mktemp("both")
    target = recipes.target("cpu-uint8")
    decoder, weights_bytes = write_graph(
        CASE.source(), folder, recipes.recipe("q8"), target, lambda done, total: None
    )
    described = CompiledModel(
        family="llama",
        converter_version=1,
        recipe="q8",
        target=target.name,
        context_length=48,
        vocab_size=decoder.vocab_size,
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.cache_dim,
        kv_dtype="float32",
        parameters=0,
        weights_bytes=weights_bytes,
        source_format="safetensors",
        quantization="q8",
        hidden_size=decoder.hidden_size,
        heads=decoder.heads,
        feed_forward_length=decoder.feed_forward_length,
        rope_theta=decoder.rope_theta,
        norm_epsilon=decoder.norm_epsilon,
        bos_token_id=None,
        eos_token_ids=(),
        prompt_graph=PROMPT_GRAPH,
        prompt_bytes=decoder.prompt_bytes,
    )
    return folder, described


def by_hand(folder: Path, prompts: str, tokens: list[int]) -> tuple[Float32, Float32]:
    """Logits of a prompt's last token by the graph `prompts`, and of one token after it."""
    first, then = OnnxRun(folder, length=48, graph=prompts, threads=1), OnnxRun(folder, length=48)
    last = first.prefill(tokens[:PROMPT])[-1]
    then.past = first.past
    return last, then.decode([tokens[PROMPT]], [PROMPT + 1])[0]


@pytest.mark.parametrize("prompts", [GRAPH_FILE, PROMPT_GRAPH])
def test_prompts_go_through_their_graph_and_single_tokens_through_the_other(
    prompts: str, compiled: tuple[Path, CompiledModel]
) -> None:
    folder, described = compiled
    decodes, computes = (
        open_session(folder, described, "CPU", 1, graph).session for graph in (GRAPH_FILE, prompts)
    )
    cache = HostKVCache(described, 2, 48)
    model = OnnxModel(decodes, described, cache, 16, computes if prompts != GRAPH_FILE else None)
    tokens = CASE.token_ids
    wanted = by_hand(folder, prompts, tokens)
    model.prefill(1, tokens[:PROMPT], 0, 0)
    np.testing.assert_array_equal(model.logits(1)[0], wanted[0])
    model.decode([1], [tokens[PROMPT]], [PROMPT])
    np.testing.assert_allclose(model.logits(1)[0], wanted[1], atol=1e-5)
    other = by_hand(folder, GRAPH_FILE if prompts != GRAPH_FILE else PROMPT_GRAPH, tokens)
    assert not np.array_equal(wanted[0], other[0])  # the two can be told apart


def test_the_graph_for_prompts_is_opened_where_there_is_one_and_memory_for_it(
    compiled: tuple[Path, CompiledModel], caplog: pytest.LogCaptureFixture
) -> None:
    _, described = compiled
    plenty = 1 << 40
    assert wants_prompts(SPEC, described, plenty)
    assert wants_prompts(SPEC, described, 0)  # the system does not say
    assert not wants_prompts(RunSpec(model="m", folder="", prompt_graph="off"), described, plenty)
    assert not wants_prompts(SPEC, replace(described, prompt_graph=""), plenty)
    with caplog.at_level(logging.WARNING):
        assert not wants_prompts(SPEC, described, 1 << 20)
    assert "both take about" in caplog.text
