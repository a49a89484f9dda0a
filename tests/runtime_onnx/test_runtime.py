"""OnnxRuntime: the Runtime protocol in one process, on a tiny model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core import hardware
from ohmygpu.core.errors import (
    Busy,
    ContextLengthExceeded,
    CorruptFile,
    InvalidRequest,
    OutOfMemory,
    RuntimeFailure,
)
from ohmygpu.core.records import GRAPH_FILE, CompiledModel, RunSpec
from ohmygpu.runtime_api import (
    Delta,
    FinishReason,
    GenerateRequest,
    Message,
    Runtime,
    SamplingParams,
)
from ohmygpu.runtime_onnx.loading import check_memory, choose_context, choose_threads
from ohmygpu.runtime_onnx.loop import EngineLoop
from ohmygpu.runtime_onnx.runtime import OnnxRuntime

from .tiny_graph import HEADS, write_tiny_model

CONTEXT = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, context=CONTEXT)
    return path


def spec(folder: Path, **fields: Any) -> RunSpec:
    return RunSpec(model="tiny", folder=str(folder), threads=1, **fields)


@pytest.fixture
async def runtime(folder: Path) -> AsyncIterator[OnnxRuntime]:
    runtime = OnnxRuntime(spec(folder, slots=2, max_queue=2))
    await runtime.load()
    yield runtime
    await runtime.unload()


def request(text: str = "hello", max_tokens: int | None = 6, **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        prompt=text, sampling=SamplingParams(temperature=0, max_tokens=max_tokens), **fields
    )


async def collect(runtime: Runtime, of: GenerateRequest) -> tuple[str, Delta]:
    text, last = "", Delta()
    async for last in runtime.generate(of):
        text += last.text
    return text, last


async def test_it_loads_answers_and_unloads(folder: Path) -> None:
    runtime: Runtime = OnnxRuntime(spec(folder))
    assert (await runtime.health()).state == "unloaded"
    with pytest.raises(RuntimeFailure, match="not loaded"):
        await collect(runtime, request())
    caps = await runtime.load()
    assert caps == await runtime.load()
    assert (caps.context_tokens, caps.slots, caps.execution_provider) == (CONTEXT, 8, "CPU")
    assert caps.chat
    text, last = await collect(runtime, request())
    assert len(text) == 6
    assert last.finish_reason is FinishReason.LENGTH
    status = await runtime.health()
    assert (status.state, status.running, status.free_slots) == ("ready", 0, 8)
    assert status.steps == 6
    assert status.memory_bytes > 1_000_000
    await runtime.unload()
    await runtime.unload()
    assert (await runtime.health()).state == "unloaded"
    await runtime.load()
    assert (await collect(runtime, request()))[0] == text
    await runtime.unload()


async def test_messages_go_through_the_template(runtime: OnnxRuntime) -> None:
    talk = GenerateRequest(
        messages=(Message("user", "hello"),), sampling=SamplingParams(temperature=0, max_tokens=6)
    )
    by_hand = request("<s>user: hello\nassistant:")
    assert (await collect(runtime, talk))[0] == (await collect(runtime, by_hand))[0]


async def test_requests_at_once_equal_each_alone(runtime: OnnxRuntime) -> None:
    texts = ["one", "two and two", "three", "four more words"]
    alone = [(await collect(runtime, request(text)))[0] for text in texts]
    together = await asyncio.gather(*(collect(runtime, request(text)) for text in texts))
    assert [text for text, _ in together] == alone


async def test_closing_the_stream_aborts_and_frees_the_slot(runtime: OnnxRuntime) -> None:
    stream = runtime.generate(request("x" * 100, max_tokens=None))
    await anext(stream)
    assert (await runtime.health()).running == 1
    await stream.aclose()
    text, _ = await collect(runtime, request())  # one round trip: the abort came before it
    assert len(text) == 6
    status = await runtime.health()
    assert (status.running, status.waiting, status.free_slots) == (0, 0, 2)
    assert runtime._streams == {}


async def test_a_prompt_too_long_fails_before_anything_streams(runtime: OnnxRuntime) -> None:
    stream = runtime.generate(request("x" * 500))
    with pytest.raises(ContextLengthExceeded) as caught:
        await anext(stream)
    assert caught.value.details["prompt_tokens"] >= 500
    assert caught.value.details["context_tokens"] == CONTEXT
    with pytest.raises(InvalidRequest, match="empty"):
        await collect(runtime, request(""))


async def test_a_full_queue_refuses_at_once(runtime: OnnxRuntime) -> None:
    streams = [runtime.generate(request("x" * 20, max_tokens=None)) for _ in range(4)]
    firsts = [asyncio.ensure_future(anext(stream)) for stream in streams]
    await firsts[0]
    with pytest.raises(Busy) as caught:
        await collect(runtime, request())
    assert caught.value.retry_after_s is not None
    await asyncio.gather(*firsts)
    for stream in streams:
        await stream.aclose()
    assert len((await collect(runtime, request()))[0]) == 6


async def test_unloading_ends_running_requests_with_abort(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = OnnxRuntime(spec(folder, slots=1))
    await runtime.load()
    decoding, go_on = asyncio.Event(), threading.Event()
    events = asyncio.get_running_loop()
    assert isinstance(runtime._loop, EngineLoop)
    model = runtime._loop.engine.model
    decode = model.decode

    def slow(*arguments: Any) -> None:
        events.call_soon_threadsafe(decoding.set)
        go_on.wait()
        decode(*arguments)

    monkeypatch.setattr(model, "decode", slow)
    streams = [asyncio.ensure_future(collect(runtime, request(max_tokens=None))) for _ in range(3)]
    await decoding.wait()
    unloading = asyncio.ensure_future(runtime.unload())
    await asyncio.sleep(0)
    assert not unloading.done()
    go_on.set()
    await unloading
    ends = [last.finish_reason for _, last in await asyncio.gather(*streams)]
    assert ends == [FinishReason.ABORT] * 3


async def test_a_broken_engine_fails_its_requests_and_can_be_loaded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = OnnxRuntime(spec(folder))
    await runtime.load()
    assert isinstance(runtime._loop, EngineLoop)

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runtime._loop.engine.scheduler, "schedule", broken)
    with pytest.raises(RuntimeFailure, match="the engine broke"):
        await collect(runtime, request())
    assert (await runtime.health()).state == "error"
    await runtime.load()
    assert len((await collect(runtime, request()))[0]) == 6
    await runtime.unload()


async def test_a_damaged_model_says_so_and_is_not_ready(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / GRAPH_FILE).write_bytes(b"")
    runtime = OnnxRuntime(spec(tmp_path))
    with pytest.raises(CorruptFile, match="pull the model again"):
        await runtime.load()
    status = await runtime.health()
    assert status.state == "error"
    assert "pull the model again" in status.detail


async def test_damage_that_a_pull_would_not_see_says_to_remove_the_model(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    graph = tmp_path / GRAPH_FILE
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    runtime = OnnxRuntime(spec(tmp_path))
    with pytest.raises(CorruptFile, match="omg model rm, then pull the model again") as caught:
        await runtime.load()
    assert str(tmp_path) not in caught.value.message


async def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_available_bytes", lambda: 20 << 20)
    with pytest.raises(OutOfMemory, match="21 MB are free") as caught:
        await OnnxRuntime(spec(folder)).load()
    assert caught.value.details["needed_bytes"] > 20 << 20
    assert caught.value.details["free_bytes"] == 20 << 20


def compiled_like(folder: Path, **fields: Any) -> CompiledModel:
    data = CompiledModel.load(folder)
    values = {name: getattr(data, name) for name in CompiledModel.__dataclass_fields__}
    return CompiledModel(**{**values, **fields})


def test_the_context_is_the_models_own_up_to_32768_and_never_more(folder: Path) -> None:
    long = compiled_like(folder, context_length=131_072)
    assert choose_context(spec(folder), long) == 32_768
    assert choose_context(spec(folder, context_tokens=65_536), long) == 65_536
    assert choose_context(spec(folder, context_tokens=200_000), long) == 131_072
    assert choose_context(spec(folder), compiled_like(folder, context_length=2048)) == 2048


def test_memory_is_weighed_before_loading(folder: Path) -> None:
    big = compiled_like(folder, weights_bytes=8 << 30)
    check_memory(big, 4096, 11 << 30)
    check_memory(big, 4096, 0)  # a system that does not say
    with pytest.raises(OutOfMemory, match="unload other models"):
        check_memory(big, 4096, 9 << 30)


def test_threads_are_the_cores_but_no_more_than_heads(folder: Path) -> None:
    compiled = CompiledModel.load(folder)
    plain = RunSpec(model="tiny", folder=str(folder))
    assert choose_threads(plain, compiled, 2) == 2
    assert choose_threads(plain, compiled, 64) == HEADS
    assert choose_threads(spec(folder), compiled, 64) == 1
