"""OnnxRuntime: the Runtime protocol in this process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator

from ohmygpu.core.errors import OhMyGPUError, RuntimeFailure
from ohmygpu.core.records import RunSpec
from ohmygpu.runtime_api import (
    Delta,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    RuntimeCaps,
    RuntimeState,
    RuntimeStatus,
)

from .engine import StepOutput
from .serving import Loop, load_loop, status_of, submit_to


class OnnxRuntime:
    """One model served in this process; see the Runtime protocol for each method."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._state: RuntimeState = "unloaded"
        self._detail = ""
        self._caps: RuntimeCaps | None = None
        self._loop: Loop | None = None
        self._events: asyncio.AbstractEventLoop | None = None
        self._loading = asyncio.Lock()
        self._ids = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[Delta | OhMyGPUError]] = {}
        self._vectors: dict[int, asyncio.Future[EmbedResult]] = {}

    async def load(self) -> RuntimeCaps:
        """Load the model; idempotent. Raises RuntimeFailure, OutOfMemory or CorruptFile."""
        async with self._loading:
            if self._caps is None or (self._loop is not None and self._loop.error):
                self._state = "loading"
                try:
                    loop, caps, note = await asyncio.to_thread(
                        load_loop, self._spec, self._publish, self._publish_vectors
                    )
                except OhMyGPUError as error:
                    self._state, self._detail = "error", error.message
                    raise
                self._events = asyncio.get_running_loop()
                loop.start()
                self._loop, self._caps, self._state, self._detail = loop, caps, "ready", note
            return self._caps

    async def unload(self) -> None:
        """End running requests with FinishReason.ABORT and free everything; idempotent."""
        async with self._loading:
            loop, self._loop, self._caps = self._loop, None, None
            if loop is not None:
                await asyncio.to_thread(loop.close)
            self._state = "unloaded"

    async def health(self) -> RuntimeStatus:
        """A snapshot; never blocks on the engine and never raises."""
        if self._loop is None:
            return RuntimeStatus(state=self._state, detail=self._detail)
        return status_of(self._loop, self._state, self._detail)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Stream the answer; closing the generator aborts."""
        if self._loop is None:
            raise RuntimeFailure(f"{self._spec.model} is not loaded")
        loop, request_id = self._loop, next(self._ids)
        stream: asyncio.Queue[Delta | OhMyGPUError] = asyncio.Queue()
        self._streams[request_id] = stream
        try:
            submit_to(loop, self._spec.model, request_id, request)
            while True:
                item = await stream.get()
                if isinstance(item, OhMyGPUError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            del self._streams[request_id]
            loop.abort(request_id)  # nothing happens when it has ended

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """A vector for each input; cancelling it drops what is not computed yet."""
        if self._loop is None:
            raise RuntimeFailure(f"{self._spec.model} is not loaded")
        loop, request_id = self._loop, next(self._ids)
        future: asyncio.Future[EmbedResult] = asyncio.get_running_loop().create_future()
        self._vectors[request_id] = future
        try:
            submit_to(loop, self._spec.model, request_id, request)
            return await future
        finally:
            del self._vectors[request_id]
            loop.abort(request_id)  # nothing happens when it has ended

    def _publish_vectors(self, request_id: int, outcome: EmbedResult | OhMyGPUError) -> None:
        """Loop's thread → event loop."""
        if self._events is not None:
            self._events.call_soon_threadsafe(self._deliver_vectors, request_id, outcome)

    def _deliver_vectors(self, request_id: int, outcome: EmbedResult | OhMyGPUError) -> None:
        future = self._vectors.get(request_id)
        if future is None or future.done():
            return
        if isinstance(outcome, OhMyGPUError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _publish(self, output: StepOutput) -> None:
        """Engine's thread → event loop, once a step."""
        if self._events is not None:
            self._events.call_soon_threadsafe(self._deliver, output)

    def _deliver(self, output: StepOutput) -> None:
        items: list[tuple[int, Delta | OhMyGPUError]] = [*output.deltas, *output.errors]
        for request_id, item in items:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put_nowait(item)
