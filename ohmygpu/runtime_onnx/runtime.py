"""Load a compiled model into an engine, and OnnxRuntime: the Runtime protocol in this process."""

from __future__ import annotations

import asyncio
import itertools
import logging
import mmap
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from ohmygpu.core import hardware
from ohmygpu.core.errors import OhMyGPUError, OutOfMemory, RuntimeFailure
from ohmygpu.core.records import CompiledModel, RunSpec
from ohmygpu.core.sizes import human_bytes
from ohmygpu.runtime_api import (
    Delta,
    GenerateRequest,
    RuntimeCaps,
    RuntimeState,
    RuntimeStatus,
)

from .engine import Engine, StepOutput
from .kv_cache import DeviceKVCache, HostKVCache, KVCache, fit_device
from .loop import EngineLoop
from .model import OnnxModel, check_files
from .scheduler import Scheduler
from .session import open_session
from .text import TextStream
from .tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

_PACKED_WEIGHTS = 1.25  # ONNX Runtime repacks weights for the CPU; measured 1.2 times the file
_WORKING_BYTES = 128 << 20  # interpreter, libraries, activations of one prompt chunk
_MIN_KV_TOKENS = 512  # one short conversation must fit
_SHORT_MEMORY_BYTES = 512 << 20
_USABLE_GPU_MEMORY = 0.85  # the rest is for the driver, cuBLAS and activations


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An engine ready to step, with what serving it needs to know."""

    engine: Engine
    tokenizer: Tokenizer
    caps: RuntimeCaps
    note: str  # why it does not run where it was meant to, or ""


def load_model(spec: RunSpec) -> LoadedModel:
    """Load what `spec` names. Raises RuntimeFailure, OutOfMemory or CorruptFile."""
    folder = Path(spec.folder)
    compiled = check_files(folder)
    context_tokens = choose_context(spec, compiled)
    check_memory(compiled, context_tokens, hardware.memory_available_bytes())
    tokenizer = Tokenizer(folder, compiled)
    threads = choose_threads(spec, compiled, hardware.physical_cores())
    opened = open_session(folder, compiled, spec.execution_provider, threads)
    slots = spec.slots
    cache: KVCache
    if opened.execution_provider == "CUDA":
        gpu_bytes = max((gpu.memory_bytes for gpu in hardware.nvidia_gpus()), default=0)
        budget_bytes = int(gpu_bytes * _USABLE_GPU_MEMORY) - compiled.weights_bytes
        slots, context_tokens = fit_device(compiled, slots, context_tokens, budget_bytes)
        cache = DeviceKVCache(compiled, slots, context_tokens)
    else:
        cache = HostKVCache(compiled, slots, context_tokens)
    scheduler = Scheduler(
        slots=slots,
        max_queue=spec.max_queue,
        prefill_tokens=spec.prefill_tokens,
        can_copy=cache.can_copy,
    )
    engine = Engine(
        OnnxModel(opened.session, compiled, cache, spec.prefill_tokens),
        scheduler,
        lambda prompt_ids, stop: TextStream(tokenizer, prompt_ids, stop),
        context_tokens=context_tokens,
        eos_token_ids=tokenizer.eos_token_ids,
        memory_is_short=_memory_is_short,
    )
    caps = RuntimeCaps(
        context_tokens=context_tokens,
        vocab_size=compiled.vocab_size,
        slots=slots,
        max_queue=spec.max_queue,
        chat=tokenizer.has_template,
        execution_provider=opened.execution_provider,
        weights_bytes=compiled.weights_bytes,
        kv_bytes_per_token=compiled.kv_bytes_per_token,
    )
    return LoadedModel(engine, tokenizer, caps, opened.note)


def choose_context(spec: RunSpec, compiled: CompiledModel) -> int:
    """Context in tokens: what `spec` asks for, else the model's own up to 32768; never more."""
    if spec.context_tokens > compiled.context_length:
        _logger.warning(
            "%s holds at most %d tokens of context, not %d",
            spec.model,
            compiled.context_length,
            spec.context_tokens,
        )
    return compiled.served_context_tokens(spec.context_tokens)


def choose_threads(spec: RunSpec, compiled: CompiledModel, cores: int) -> int:
    """Threads of a run: what `spec` asks for, else one per core but no more than heads.

    With more threads than heads times rows, attention splits a long sequence and rounds
    differently: what a sequence says would depend on how many others run beside it.
    """
    return spec.threads or max(1, min(cores, compiled.heads))


def check_memory(compiled: CompiledModel, context_tokens: int, free_bytes: int) -> None:
    """Raise OutOfMemory unless the weights and one short conversation fit `free_bytes`.

    Zero free bytes means that the system does not say.
    """
    kv_bytes = compiled.kv_bytes_per_token * min(context_tokens, _MIN_KV_TOKENS)
    needed = int(compiled.weights_bytes * _PACKED_WEIGHTS) + kv_bytes + _WORKING_BYTES
    if 0 < free_bytes < needed:
        raise OutOfMemory(
            f"the model needs about {human_bytes(needed)} of memory and {human_bytes(free_bytes)} "
            "are free; unload other models, close programs or pull a smaller model",
            needed_bytes=needed,
            free_bytes=free_bytes,
        )


def _memory_is_short() -> bool:
    return 0 < hardware.memory_available_bytes() < _SHORT_MEMORY_BYTES


class OnnxRuntime:
    """One model served in this process; see the Runtime protocol for each method."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._state: RuntimeState = "unloaded"
        self._detail = ""
        self._loaded: LoadedModel | None = None
        self._loop: EngineLoop | None = None
        self._events: asyncio.AbstractEventLoop | None = None
        self._loading = asyncio.Lock()
        self._ids = itertools.count(1)
        self._streams: dict[int, asyncio.Queue[Delta | OhMyGPUError]] = {}

    async def load(self) -> RuntimeCaps:
        """Load the model; idempotent. Raises RuntimeFailure, OutOfMemory or CorruptFile."""
        async with self._loading:
            if self._loaded is None or (self._loop is not None and self._loop.error):
                self._state = "loading"
                try:
                    loaded = await asyncio.to_thread(load_model, self._spec)
                except OhMyGPUError as error:
                    self._state, self._detail = "error", error.message
                    raise
                self._events = asyncio.get_running_loop()
                self._loop = EngineLoop(loaded.engine, loaded.tokenizer, self._publish)
                self._loop.start()
                self._loaded, self._state, self._detail = loaded, "ready", loaded.note
            return self._loaded.caps

    async def unload(self) -> None:
        """End running requests with FinishReason.ABORT and free everything; idempotent."""
        async with self._loading:
            loop, self._loop, self._loaded = self._loop, None, None
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
            loop.submit(request_id, request)
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


def status_of(loop: EngineLoop, state: RuntimeState, detail: str) -> RuntimeStatus:
    """The status of a running engine, or of one that broke."""
    return RuntimeStatus(
        state="error" if loop.error else state,
        detail=loop.error.message if loop.error else detail,
        running=loop.running,
        waiting=loop.waiting,
        free_slots=loop.engine.scheduler.free_slots,
        steps=loop.engine.steps,
        memory_bytes=resident_bytes(),
    )


def resident_bytes() -> int:
    """Resident memory of this process; elsewhere than on Linux, the most it ever was."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * mmap.PAGESIZE
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
