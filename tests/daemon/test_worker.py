from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from ohmygpu.core.errors import Busy, OutOfMemory, RuntimeFailure
from ohmygpu.core.records import RunSpec
from ohmygpu.daemon.worker import WorkerRuntime, obituary, worker_environment
from ohmygpu.runtime_api import Delta, FinishReason, GenerateRequest, SamplingParams

# A worker that obeys its prompts instead of a model.
WORKER = textwrap.dedent(
    """
    import json, os, signal, socket, sys, time
    from ohmygpu.runtime_wire import HEADER, decode_frame, encode_frame, frame_length

    stream = socket.socket(fileno=int(sys.argv[3]))
    reader = stream.makefile("rb")
    spec = json.loads(sys.argv[4])

    def send(**frame):
        stream.sendall(encode_frame(frame))

    def step(request_id, **delta):
        send(op="step", deltas=[[request_id, delta]])

    mode = spec["folder"]
    if mode == "broken":
        print("ImportError: no such library", file=sys.stderr, flush=True)
        sys.exit(3)
    if mode == "too big":
        send(op="failed", error={"code": "out_of_memory", "message": "too big",
                                 "details": {"needed_bytes": 5}})
        sys.exit(70)
    if mode == "endless":
        print("loading", file=sys.stderr, flush=True)
        time.sleep(600)
    send(op="ready", caps=dict(context_tokens=9, vocab_size=9, slots=2, max_queue=1, chat=True,
         execution_provider="CPU", weights_bytes=1, kv_bytes_per_token=1))
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    aborted = []
    while header := reader.read(HEADER.size):
        frame = decode_frame(reader.read(frame_length(header)))
        if frame["op"] == "unload" and mode != "stubborn":
            break
        if frame["op"] == "abort":
            aborted.append(frame["id"])
        if frame["op"] == "health":
            send(op="health", id=frame["id"],
                 status={"state": "ready", "running": len(aborted), "steps": os.getpid()})
        if frame["op"] != "generate":
            continue
        request_id, prompt = frame["id"], frame["request"]["prompt"]
        if prompt == "hello":
            step(request_id, text="Hel", completion_tokens=1)
            step(request_id, text="lo", completion_tokens=1, finish_reason="stop",
                 usage={"prompt_tokens": 1, "completion_tokens": 2})
        elif prompt == "full":
            send(op="step", deltas=[], errors=[[request_id, {"code": "busy", "message": "full",
                 "details": {"retry_after_s": 2}}]])
        elif prompt == "die":
            step(request_id, text="last words")
            os.kill(os.getpid(), signal.SIGKILL)
        elif prompt == "crash":
            os._exit(7)
        elif prompt == "wait":
            step(request_id, text="so far")
        elif prompt == "flood":
            for number in range(20000):
                step(request_id, text=f"{number % 10}", completion_tokens=1)
            step(request_id, text="!", finish_reason="length",
                 usage={"prompt_tokens": 1, "completion_tokens": 20000})
        elif prompt == "garbage":
            stream.sendall(b"\\xff\\xff\\xff\\xff nonsense")
    """
)


def ask(prompt: str) -> GenerateRequest:
    return GenerateRequest(sampling=SamplingParams(), prompt=prompt)


@asynccontextmanager
async def worker(folder: Path, mode: str = "") -> AsyncIterator[WorkerRuntime]:
    script = folder / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    runtime = WorkerRuntime(RunSpec(model="org/m", folder=mode), [sys.executable, str(script)])
    try:
        yield runtime
    finally:
        await runtime.unload()


async def logged(message: str) -> None:
    """Wait until the daemon has logged exactly that."""
    seen = asyncio.Event()

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() == message:
                seen.set()

    logger, watch = logging.getLogger("ohmygpu.worker"), Watch()
    logger.addHandler(watch)
    logger.setLevel(logging.INFO)
    try:
        await seen.wait()
    finally:
        logger.removeHandler(watch)
        logger.setLevel(logging.NOTSET)


async def text_of(runtime: WorkerRuntime, prompt: str) -> tuple[str, Delta]:
    deltas = [delta async for delta in runtime.generate(ask(prompt))]
    return "".join(delta.text for delta in deltas), deltas[-1]


async def test_an_answer_comes_back_piece_by_piece(tmp_path: Path) -> None:
    async with worker(tmp_path) as runtime:
        caps = await runtime.load()
        assert caps.slots == 2
        assert await runtime.load() is caps
        text, last = await text_of(runtime, "hello")
        assert text == "Hello"
        assert last.finish_reason is FinishReason.STOP
        assert last.usage is not None
        assert last.usage.completion_tokens == 2


async def test_an_error_frame_becomes_the_error_it_names(tmp_path: Path) -> None:
    async with worker(tmp_path) as runtime:
        await runtime.load()
        with pytest.raises(Busy, match="full") as caught:
            await text_of(runtime, "full")
        assert caught.value.retry_after_s == 2
        assert (await text_of(runtime, "hello"))[0] == "Hello"


async def test_a_load_failure_is_the_workers_own_error_and_a_new_load_tries_again(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path, "too big") as runtime:
        with pytest.raises(OutOfMemory, match="too big"):
            await runtime.load()
        assert not runtime.alive
        assert runtime.pid is None
        with pytest.raises(OutOfMemory):
            await runtime.load()


async def test_a_worker_that_dies_while_loading_is_reported_with_its_exit_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with worker(tmp_path, "broken") as runtime:
        with caplog.at_level("INFO"), pytest.raises(RuntimeFailure, match="exit code 3") as caught:
            await runtime.load()
        assert caught.value.retry_after_s is None
    assert "org/m: ImportError: no such library" in caplog.messages


async def test_a_killed_worker_ends_every_request_and_the_next_load_is_a_fresh_process(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path) as runtime:
        await runtime.load()
        first = runtime.pid
        waiting = asyncio.create_task(text_of(runtime, "wait"))
        with pytest.raises(RuntimeFailure, match="out of memory"):
            await text_of(runtime, "die")
        with pytest.raises(RuntimeFailure, match="SIGKILL"):
            await waiting
        assert not runtime.alive
        assert (await runtime.health()).state == "error"
        with pytest.raises(RuntimeFailure):
            await text_of(runtime, "hello")
        await runtime.load()
        assert runtime.pid not in (None, first)
        assert (await text_of(runtime, "hello"))[0] == "Hello"


async def test_what_was_said_before_the_death_still_arrives(tmp_path: Path) -> None:
    async with worker(tmp_path) as runtime:
        await runtime.load()
        answer = runtime.generate(ask("die"))
        assert (await anext(answer)).text == "last words"
        with pytest.raises(RuntimeFailure):
            await anext(answer)


async def test_a_broken_frame_ends_the_worker_and_not_the_daemon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with worker(tmp_path) as runtime:
        await runtime.load()
        with pytest.raises(RuntimeFailure):
            await text_of(runtime, "garbage")
        assert "broken frame" in caplog.text
        await runtime.load()


async def test_closing_the_generator_aborts_the_request(tmp_path: Path) -> None:
    async with worker(tmp_path) as runtime:
        await runtime.load()
        async with aclosing(runtime.generate(ask("wait"))) as answer:
            await anext(answer)
            assert (await runtime.health()).running == 0
        assert (await runtime.health()).running == 1  # the fake counts aborts


async def test_cancelling_the_reader_aborts_the_request(tmp_path: Path) -> None:
    async with worker(tmp_path) as runtime:
        await runtime.load()
        started = asyncio.Event()

        async def read() -> None:
            async with aclosing(runtime.generate(ask("wait"))) as answer:
                async for _ in answer:
                    started.set()

        task = asyncio.create_task(read())
        await started.wait()
        task.cancel()
        await asyncio.wait({task})
        assert (await runtime.health()).running == 1


async def test_a_reader_who_does_not_read_holds_up_nobody_and_loses_no_text(tmp_path: Path) -> None:
    async with worker(tmp_path) as runtime:
        await runtime.load()
        slow = runtime.generate(ask("flood"))
        first = await anext(slow)
        assert (await text_of(runtime, "hello"))[0] == "Hello"  # behind the flood on the socket
        rest = [delta async for delta in slow]
        assert len(rest) < 100  # merged, so that memory does not grow by the token
        text = "".join(delta.text for delta in [first, *rest])
        assert text == "0123456789" * 2000 + "!"
        assert sum(delta.completion_tokens for delta in [first, *rest]) == 20000
        assert rest[-1].finish_reason is FinishReason.LENGTH


async def test_unloading_ends_running_requests_with_abort_and_the_process_with_them(
    tmp_path: Path,
) -> None:
    async with worker(tmp_path) as runtime:
        await runtime.load()
        pid = runtime.pid
        answer = runtime.generate(ask("wait"))
        await anext(answer)
        await runtime.unload()
        assert (await anext(answer)).finish_reason is FinishReason.ABORT
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        await runtime.unload()


async def test_a_worker_deaf_to_unload_and_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ohmygpu.daemon.worker.EXIT_TIMEOUT_S", 0.05)
    monkeypatch.setattr("ohmygpu.daemon.worker.TERM_TIMEOUT_S", 0.05)
    async with worker(tmp_path, "stubborn") as runtime:
        await runtime.load()
        pid = runtime.pid
        await runtime.unload()
        assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_cancelled_load_ends_the_process(tmp_path: Path) -> None:
    async with worker(tmp_path, "endless") as runtime:
        load = asyncio.create_task(runtime.load())
        async with asyncio.timeout(60):
            await logged("org/m: loading")
        pid = runtime.pid
        assert pid is not None
        assert (await runtime.health()).state == "loading"
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_program_that_cannot_be_started_is_a_runtime_failure() -> None:
    runtime = WorkerRuntime(RunSpec(model="m", folder=""), ["/nonexistent/program"])
    with pytest.raises(RuntimeFailure, match="cannot be started"):
        await runtime.load()


def test_a_worker_gets_huge_pages_and_no_token() -> None:
    environment = worker_environment({"HF_TOKEN": "secret", "PATH": "/bin"})
    assert environment == {"PATH": "/bin", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    chosen = worker_environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    assert chosen["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"
    other = worker_environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"})
    assert other["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"


def test_an_exit_is_told_in_words() -> None:
    assert "out of memory" in obituary(-signal.SIGKILL)
    assert "SIGSEGV" in obituary(-signal.SIGSEGV)
    assert "exit code 70" in obituary(70)
    assert "signal 60" in obituary(-60)
