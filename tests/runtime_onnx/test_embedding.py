"""Embedding models in OnnxRuntime and in a worker process, on a tiny BERT."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ohmygpu.core import hardware
from ohmygpu.core.errors import (
    Busy,
    ContextLengthExceeded,
    InvalidRequest,
    OhMyGPUError,
    OutOfMemory,
    RuntimeFailure,
)
from ohmygpu.core.records import CompiledModel, RunSpec
from ohmygpu.daemon.worker import WorkerRuntime
from ohmygpu.runtime_api import (
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    Runtime,
    SamplingParams,
)
from ohmygpu.runtime_onnx import worker
from ohmygpu.runtime_onnx.embed_loop import EmbedLoop
from ohmygpu.runtime_onnx.embedder import fit_context
from ohmygpu.runtime_onnx.runtime import OnnxRuntime
from tests.ladder.encoders import golden
from tests.tiny_embedder import LENGTH, MAX_TOKENS, compile_tiny, write_repository

from .tiny_graph import write_tiny_model

Vectors = NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = write_repository(tmp_path_factory.mktemp("repository"))
    output = tmp_path_factory.mktemp("compiled") / "model"
    compile_tiny(repository, output)
    return output


def spec(folder: Path, **fields: Any) -> RunSpec:
    return RunSpec(model="tiny", folder=str(folder), threads=1, **fields)


@pytest.fixture
async def runtime(folder: Path) -> AsyncIterator[OnnxRuntime]:
    runtime = OnnxRuntime(spec(folder, slots=2, max_queue=1))
    await runtime.load()
    yield runtime
    await runtime.unload()


def request(*inputs: str | tuple[int, ...], **fields: Any) -> EmbedRequest:
    return EmbedRequest(inputs=inputs, **fields)


def vectors_of(result: EmbedResult) -> Vectors:
    return np.stack([np.frombuffer(vector, "<f4") for vector in result.vectors])


def loop_of(runtime: OnnxRuntime) -> EmbedLoop:
    assert isinstance(runtime._loop, EmbedLoop)
    return runtime._loop


async def waiting(runtime: OnnxRuntime, texts: int) -> None:
    """Return when at least so many texts wait for the model."""
    loop = loop_of(runtime)

    def wait() -> None:
        with loop._wake:
            assert loop._wake.wait_for(lambda: len(loop._pending) >= texts, 10)

    await asyncio.to_thread(wait)


async def test_token_ids_give_the_vectors_of_transformers(runtime: OnnxRuntime) -> None:
    from tests.ladder.encoders import ROWS, EncoderCase

    rows = [index for index, count in enumerate(ROWS) if count <= MAX_TOKENS]
    inputs = [tuple(EncoderCase("bert").rows[index]) for index in rows]
    found = vectors_of(await runtime.embed(request(*inputs)))
    expected = np.stack([golden()[f"bert.{index}"].mean(0) for index in rows])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(found - expected).max() < 1e-4


async def test_vectors_come_in_the_order_of_the_texts_whatever_their_lengths(
    runtime: OnnxRuntime,
) -> None:
    texts = ["a" * (1 + 7 * index % 20) + chr(97 + index % 26) for index in range(300)]
    together = await runtime.embed(request(*texts))
    alone = [await runtime.embed(request(text)) for text in texts[:9]]
    assert vectors_of(together).shape == (300, LENGTH)
    for index, one in enumerate(alone):
        assert np.abs(vectors_of(together)[index] - vectors_of(one)[0]).max() < 1e-5
        assert one.prompt_tokens == (together.prompt_tokens[index],) == (len(texts[index]) + 2,)
    assert loop_of(runtime).steps < 100  # in batches


async def test_requests_of_several_callers_run_in_common_batches(runtime: OnnxRuntime) -> None:
    model = loop_of(runtime).loaded.model
    gate, started = threading.Event(), threading.Event()
    original, sizes = model.run, []

    def slow(rows: Any) -> Vectors:
        started.set()
        gate.wait(10)
        sizes.append(len(rows))
        return original(rows)

    model.run = slow  # type: ignore[method-assign]
    first = asyncio.create_task(runtime.embed(request("abc")))
    await asyncio.to_thread(started.wait, 10)
    others = [asyncio.create_task(runtime.embed(request("abcd"))) for _ in range(2)]
    await waiting(runtime, 2)
    with pytest.raises(Busy):
        await runtime.embed(request("abc"))
    gate.set()
    await asyncio.gather(first, *others)
    assert sizes == [1, 2]


async def test_a_cancelled_request_is_dropped_and_others_go_on(runtime: OnnxRuntime) -> None:
    model = loop_of(runtime).loaded.model
    gate, original = threading.Event(), model.run

    def slow(rows: Any) -> Vectors:
        gate.wait(10)
        return original(rows)

    model.run = slow  # type: ignore[method-assign]
    given_up = asyncio.create_task(runtime.embed(request(*["abc"] * 2000)))
    kept = asyncio.create_task(runtime.embed(request("abc")))
    await waiting(runtime, 1000)
    given_up.cancel()
    gate.set()
    assert vectors_of(await kept).shape == (1, LENGTH)
    assert loop_of(runtime).steps < 30
    assert (await runtime.health()).running == 0


async def test_too_long_a_text_is_an_error_with_both_numbers(runtime: OnnxRuntime) -> None:
    with pytest.raises(ContextLengthExceeded, match=f"has 42 tokens.* takes {MAX_TOKENS}"):
        await runtime.embed(request("a" * 40))
    cut = await runtime.embed(request("a" * 40, truncate=True))
    same = await runtime.embed(request("a" * (MAX_TOKENS - 2)))
    assert cut == same


async def test_dimensions_and_kinds_of_request_are_checked(runtime: OnnxRuntime) -> None:
    found = vectors_of(await runtime.embed(request("ab", dimensions=5)))
    whole = vectors_of(await runtime.embed(request("ab")))
    assert found.shape == (1, 5)
    assert np.abs(found - whole[:, :5] / np.linalg.norm(whole[:, :5])).max() < 1e-6
    with pytest.raises(InvalidRequest, match=f"between 1 and {LENGTH}"):
        await runtime.embed(request("ab", dimensions=LENGTH + 1))
    with pytest.raises(InvalidRequest, match='"tiny" does not support generate'):
        async for _ in runtime.generate(GenerateRequest(prompt="a", sampling=SamplingParams())):
            pass


async def test_a_model_that_generates_does_not_embed(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, context=64)
    runtime = OnnxRuntime(spec(tmp_path))
    assert (await runtime.load()).embedding_length == 0
    with pytest.raises(InvalidRequest, match='"tiny" does not support embeddings'):
        await runtime.embed(request("a"))
    await runtime.unload()


async def test_a_broken_model_fails_its_requests(runtime: OnnxRuntime) -> None:
    def broken(rows: Any) -> Vectors:
        raise RuntimeFailure("embedding contains NaN or Inf values")

    loop_of(runtime).loaded.model.run = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeFailure, match="NaN"):
        await runtime.embed(request("a", "b"))
    assert (await runtime.health()).running == 0


async def test_unloading_ends_requests_with_an_error(folder: Path) -> None:
    runtime = OnnxRuntime(spec(folder))
    await runtime.load()
    model = loop_of(runtime).loaded.model
    gate, original = threading.Event(), model.run

    def slow(rows: Any) -> Vectors:
        gate.wait(10)
        return original(rows)

    model.run = slow  # type: ignore[method-assign]
    task = asyncio.create_task(runtime.embed(request(*["abc"] * 2000)))
    await waiting(runtime, 1)
    unloading = asyncio.create_task(runtime.unload())
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(OhMyGPUError, match="unloaded"):
        await task
    await unloading
    assert (await runtime.health()).state == "unloaded"


def test_the_context_is_what_memory_has_room_for(folder: Path) -> None:
    compiled = CompiledModel.load(folder)
    assert fit_context(compiled, 20, 0) == 20
    assert fit_context(compiled, 20, 1 << 40) == 20
    short = fit_context(compiled, 1 << 20, 200 << 20)
    assert 1024 < short < 1 << 20
    with pytest.raises(OutOfMemory, match="free"):
        fit_context(compiled, 20, 50 << 20)


async def test_a_worker_process_embeds_in_several_frames(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "physical_cores", lambda: 1)
    runtime: Runtime = WorkerRuntime(spec(folder))
    try:
        assert (await runtime.load()).embedding_length == LENGTH
        texts = [chr(97 + index % 26) * (1 + index % 9) for index in range(2048)]
        result = await runtime.embed(request(*texts))
        assert len(result.vectors) == len(result.prompt_tokens) == 2048
        assert np.allclose(np.linalg.norm(vectors_of(result), axis=1), 1, atol=1e-5)
        again = await runtime.embed(request(texts[1], (2, 4, 3)))
        assert np.abs(vectors_of(again)[0] - vectors_of(result)[1]).max() < 1e-5
        with pytest.raises(ContextLengthExceeded, match="takes 24"):
            await runtime.embed(request("a" * 40))
        with pytest.raises(InvalidRequest, match="does not support generate"):
            async for _ in runtime.generate(GenerateRequest(prompt="a", sampling=SamplingParams())):
                pass
    finally:
        await runtime.unload()
    with pytest.raises(RuntimeFailure, match="not loaded"):
        await runtime.embed(request("a"))


def test_vectors_larger_than_a_frame_are_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(worker, "_VECTORS_FRAME_BYTES", 10)
    serving = worker.Worker.__new__(worker.Worker)
    monkeypatch.setattr(serving, "_send_or_exit", sent.append)
    result = EmbedResult(vectors=tuple(bytes([n]) * 4 for n in range(5)), prompt_tokens=(1,) * 5)
    serving._send_embeddings(7, result)
    assert [(frame["id"], len(frame["prompt_tokens"]), frame["last"]) for frame in sent] == [
        (7, 2, False),
        (7, 2, False),
        (7, 1, True),
    ]
