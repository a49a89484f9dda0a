"""Stand-ins for what the daemon works with: a runtime that plays back, a model on disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

from ohmygpu.core.fidelity import Fidelity
from ohmygpu.core.records import CompiledModel, InstallRecord, RunSpec
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import ModelSettings, ServerSettings, Settings
from ohmygpu.daemon.app import create_app
from ohmygpu.daemon.listen import listen_tcp, url_of
from ohmygpu.daemon.manager import ModelManager
from ohmygpu.daemon.pulls import PullFunction, Pulls, Verifications, VerifyFunction
from ohmygpu.daemon.services import DaemonState, Services
from ohmygpu.runtime_api import (
    Delta,
    EmbedRequest,
    EmbedResult,
    FinishReason,
    GenerateRequest,
    RuntimeCaps,
    RuntimeStatus,
    Usage,
)

Step = str | float | Delta | Exception | asyncio.Event
GIB = 2**30
CAPS = RuntimeCaps(
    context_tokens=2048,
    vocab_size=64,
    slots=8,
    max_queue=64,
    chat=True,
    execution_provider="CPU",
    weights_bytes=1000,
    kv_bytes_per_token=10,
)
USAGE = Usage(prompt_tokens=5, completion_tokens=2, prefill_s=0.01, decode_s=0.02)
END = Delta(finish_reason=FinishReason.STOP, usage=USAGE)


class FakeRuntime:
    """A runtime that plays back what its Runtimes were given."""

    def __init__(self, spec: RunSpec, runtimes: Runtimes) -> None:
        self.spec = spec
        self.alive = False
        self.unloads = 0
        self._runtimes = runtimes

    async def load(self) -> RuntimeCaps:
        self._runtimes.loads.append(self.spec.model)
        await self._runtimes.may_load.wait()
        if self._runtimes.load_errors:
            raise self._runtimes.load_errors.popleft()
        self.alive = True
        return CAPS

    async def unload(self) -> None:
        self.unloads += 1
        if self.alive:
            self._runtimes.unloaded.append(self.spec.model)
        self.alive = False
        self._runtimes.stopping.set()

    async def health(self) -> RuntimeStatus:
        state = self._runtimes
        return RuntimeStatus(
            state="ready" if self.alive else "loading", running=state.running, memory_bytes=1234
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        state = self._runtimes
        state.requests.append(request)
        state.running += 1
        try:
            for step in state.answers.popleft():
                if isinstance(step, asyncio.Event):
                    if not await self._passes(step):
                        yield Delta(finish_reason=FinishReason.ABORT)
                        return
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    delta = Delta(text=step, completion_tokens=1) if isinstance(step, str) else step
                    yield delta
        finally:
            state.running -= 1
            state.finished.set()

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        outcome = self._runtimes.embeddings.popleft()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _passes(self, gate: asyncio.Event) -> bool:
        """Wait for the gate; False when the runtime is unloaded instead."""
        waits = [asyncio.ensure_future(e.wait()) for e in (gate, self._runtimes.stopping)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return gate.is_set()


class Runtimes:
    """Makes FakeRuntimes and remembers what happened to them."""

    def __init__(self) -> None:
        self.answers: deque[tuple[Step, ...]] = deque()
        self.requests: list[GenerateRequest] = []
        self.embeddings: deque[EmbedResult | Exception] = deque()
        self.loads: list[str] = []
        self.unloaded: list[str] = []
        self.load_errors: deque[Exception] = deque()
        self.made: list[FakeRuntime] = []
        self.running = 0
        self.finished = asyncio.Event()  # an answer ended, however it ended
        self.stopping = asyncio.Event()  # a runtime was unloaded
        self.may_load = asyncio.Event()
        self.may_load.set()

    def __call__(self, spec: RunSpec) -> FakeRuntime:
        self.made.append(FakeRuntime(spec, self))
        self.stopping.clear()
        return self.made[-1]

    def enqueue(self, *steps: Step) -> None:
        """The next request's answer: text, Deltas, errors to raise, events or seconds to wait."""
        self.answers.append(steps)


def compiled_model(**changes: Any) -> CompiledModel:
    """A small compile.json."""
    model = CompiledModel(
        family="llama",
        converter_version=1,
        recipe="q8",
        target="cpu",
        context_length=2048,
        vocab_size=64,
        layers=2,
        kv_heads=1,
        head_dim=16,
        kv_dtype="float32",
        parameters=10_000,
        weights_bytes=1000,
        source_format="safetensors",
        quantization="q8",
        hidden_size=32,
        heads=2,
        feed_forward_length=64,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    return replace(model, **changes)


def install_model(home: Path, name: str, *, content: str = "", **changes: Any) -> InstallRecord:
    """Put a model that only looks like one into the store. Equal content, equal compiled key."""
    repository = Repository(home)
    key = hashlib.sha256((content or name).encode()).hexdigest()
    folder = repository.compiled_path(key)
    folder.mkdir(parents=True, exist_ok=True)
    compiled_model(**changes).save(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    record = InstallRecord(
        provider="hub",
        name=name,
        variant="q8",
        is_default=True,
        source_ref=name,
        revision=None,
        artifacts=(),
        compiled_key=key,
        recipe="q8",
        family="llama",
        compiled_bytes=1000,
        installed_at="2026-11-01T10:00:00+00:00",
    )
    return repository.write_record(record)


def settings_of(home: Path, *, models: dict[str, Any] | None = None, **server: Any) -> Settings:
    """Settings with any free port."""
    return Settings(
        home=home,
        server=ServerSettings(**({"port": 0} | server)),
        models=ModelSettings(**(models or {})),
    )


def no_pull(reference: str, **how: object) -> InstallRecord:
    """A pull that must not happen."""
    raise AssertionError(f"unexpected pull of {reference}")


def no_verify(name: str, **how: object) -> dict[str, Fidelity]:
    """A measurement that must not happen."""
    raise AssertionError(f"unexpected measurement of {name}")


def make_services(
    settings: Settings,
    runtimes: Runtimes,
    pull: PullFunction | None = None,
    verify: VerifyFunction | None = None,
) -> Services:
    """The daemon's parts around fake runtimes and a real store; memory is 100 GiB."""
    repository = Repository(settings.home)
    manager = ModelManager(settings, repository, runtimes, lambda: 100 * GIB)

    async def on_installed(_: object) -> None:
        await manager.refresh()

    return Services(
        settings=settings,
        state=DaemonState(url="http://127.0.0.1:1"),
        manager=manager,
        pulls=Pulls(pull or no_pull, on_installed),
        verifications=Verifications(verify or no_verify),
        remove=repository.remove,
        collect_garbage=repository.gc,
    )


@contextlib.asynccontextmanager
async def listening(services: Services) -> AsyncIterator[int]:
    """The application behind a real HTTP server on a real port, which is yielded."""
    sock = listen_tcp(services.settings.server)
    port = int(url_of(sock, services.settings.server).rpartition(":")[2])
    config = Config()
    config.bind = [f"fd://{sock.detach()}"]
    config.accesslog = config.errorlog = None
    config.graceful_timeout = 0.2
    close = asyncio.Event()
    app = create_app(services)
    server = asyncio.create_task(serve(app, config, shutdown_trigger=close.wait))
    try:
        yield port
    finally:
        close.set()
        await asyncio.wait({server}, timeout=5)
        await services.manager.shutdown()


class RawClient:
    """HTTP by hand, for what well-behaved clients do not do."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @staticmethod
    async def connect(port: int) -> RawClient:
        return RawClient(*await asyncio.open_connection("127.0.0.1", port))

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> None:
        """Send a request, without waiting for the answer."""
        data = json.dumps(body).encode()
        fields = {"Host": "localhost", "Content-Length": str(len(data))} | headers
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        await self.writer.drain()

    async def until(self, text: bytes) -> bytes:
        """Read until `text` has come."""
        async with asyncio.timeout(60):
            return await self.reader.readuntil(text)

    async def rest(self) -> bytes:
        """Read until the server closes."""
        async with asyncio.timeout(60):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def abort(self) -> None:
        """Vanish."""
        self.writer.transport.abort()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds; fails after ten seconds."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.001)
