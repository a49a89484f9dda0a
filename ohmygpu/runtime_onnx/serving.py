"""The loop that serves a model: an engine for one that generates text, else an embedding loop."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from pathlib import Path

from ohmygpu.core.errors import InvalidRequest, OhMyGPUError
from ohmygpu.core.records import CompiledModel, RunSpec
from ohmygpu.runtime_api import (
    EmbedRequest,
    GenerateRequest,
    RuntimeCaps,
    RuntimeState,
    RuntimeStatus,
)

from .embed_loop import EmbedLoop, Outcome
from .embedder import load_embedder
from .engine import StepOutput
from .loading import load_model
from .loop import EngineLoop

Loop = EngineLoop | EmbedLoop


def load_loop(
    spec: RunSpec,
    publish: Callable[[StepOutput], None],
    publish_vectors: Callable[[int, Outcome], None],
    fail: Callable[[OhMyGPUError], None] = lambda error: None,
) -> tuple[Loop, RuntimeCaps, str]:
    """(the loop that serves what `spec` names, what it can do, why it runs not where it was meant).

    Raises RuntimeFailure, OutOfMemory or CorruptFile.
    """
    if CompiledModel.load(Path(spec.folder)).kind == "encoder":
        embedder = load_embedder(spec)
        return EmbedLoop(embedder, publish_vectors, fail), embedder.caps, embedder.note
    loaded = load_model(spec)
    loop = EngineLoop(loaded.engine, loaded.tokenizer, publish, fail)
    return loop, loaded.caps, loaded.note


def submit_to(
    loop: Loop,
    model: str,
    request_id: int,
    request: GenerateRequest | EmbedRequest,
) -> None:
    """Give a request to the loop of its kind. Raises InvalidRequest when the model is of another,
    and what the loop's `submit` raises.
    """
    if isinstance(loop, EmbedLoop):
        if not isinstance(request, EmbedRequest):
            raise InvalidRequest(f'"{model}" does not support generate: it is an embedding model')
        loop.submit(request_id, request)
    else:
        if not isinstance(request, GenerateRequest):
            raise InvalidRequest(f'"{model}" does not support embeddings: it generates text')
        loop.submit(request_id, request)


def status_of(loop: Loop, state: RuntimeState, detail: str) -> RuntimeStatus:
    """The status of a running loop, or of one that broke."""
    return RuntimeStatus(
        state="error" if loop.error else state,
        detail=loop.error.message if loop.error else detail,
        running=loop.running,
        waiting=loop.waiting,
        free_slots=loop.free_slots,
        steps=loop.steps,
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
