"""An embedding model: batches of token ids in, vectors out. No cache, no state between runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core import hardware
from ohmygpu.core.errors import OutOfMemory, RuntimeFailure
from ohmygpu.core.records import CompiledModel, RunSpec
from ohmygpu.core.sizes import human_bytes
from ohmygpu.runtime_api import RuntimeCaps

from .loading import choose_context, choose_threads
from .model import check_files
from .session import open_session
from .tokenizer import Tokenizer

Vectors = NDArray[np.float32]

CPU_BATCH_TOKENS = 1024  # a run keeps all cores busy, and ends soon enough to be aborted
GPU_BATCH_TOKENS = 16384
_PACKED_WEIGHTS = 1.25  # ONNX Runtime repacks weights for the CPU; measured 1.2 times the file
_WORKING_BYTES = 96 << 20  # interpreter and libraries
_MIN_CONTEXT_TOKENS = 512
_SHRINK_TOKENS = 2048  # runs from here on give the memory of their activations back


@dataclass(frozen=True, slots=True)
class LoadedEmbedder:
    """An embedding model ready to run, with what serving it needs to know."""

    model: EmbeddingModel
    tokenizer: Tokenizer
    caps: RuntimeCaps
    batch_tokens: int
    lower_case: bool  # texts are put in lower case
    note: str  # why it does not run where it was meant to, or ""


class EmbeddingModel:
    """A session of an encoder's graph; the contract is CompiledModel's."""

    def __init__(self, session: Any, compiled: CompiledModel, shrink: Any = None) -> None:
        self.vocab_size = compiled.vocab_size
        self.length = compiled.embedding_length
        self._session = session
        self._shrink = shrink  # RunOptions that give memory back

    def run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """One vector for each row of token ids, (B, E) float32; no row may be empty.

        Raises OutOfMemory or RuntimeFailure.
        """
        lengths = np.array([len(row) for row in rows], np.int32)  # (B,)
        ids = np.zeros((len(rows), int(lengths.max())), np.int64)  # (B, S)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        options = self._shrink if ids.size >= _SHRINK_TOKENS else None
        try:
            found = self._session.run(
                ["embeddings"], {"input_ids": ids, "lengths": lengths}, options
            )
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            if "allocate" in reason.lower() or "bad_alloc" in reason:
                raise OutOfMemory(
                    f"{ids.size} tokens do not fit in memory; send shorter texts"
                ) from error
            raise RuntimeFailure(f"the model cannot be run: {reason}") from error
        vectors: Vectors = found[0]
        if not np.isfinite(vectors).all():
            raise RuntimeFailure("embedding contains NaN or Inf values; the model cannot be used")
        return vectors


def load_embedder(spec: RunSpec) -> LoadedEmbedder:
    """Load what `spec` names. Raises RuntimeFailure, OutOfMemory or CorruptFile."""
    folder = Path(spec.folder)
    compiled = check_files(folder)
    tokenizer = Tokenizer(folder, compiled)
    threads = choose_threads(spec, compiled, hardware.physical_cores())
    wanted = choose_context(spec, compiled)
    context_tokens = fit_context(compiled, wanted, hardware.memory_available_bytes())
    opened = open_session(folder, compiled, spec.execution_provider, threads)
    on_gpu = opened.execution_provider == "CUDA"
    caps = RuntimeCaps(
        context_tokens=context_tokens,
        vocab_size=compiled.vocab_size,
        slots=spec.slots,
        max_queue=spec.max_queue,
        chat=False,
        execution_provider=opened.execution_provider,
        weights_bytes=compiled.weights_bytes,
        kv_bytes_per_token=0,
        embedding_length=compiled.embedding_length,
    )
    return LoadedEmbedder(
        model=EmbeddingModel(opened.session, compiled, None if on_gpu else _shrinking()),
        tokenizer=tokenizer,
        caps=caps,
        batch_tokens=GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS,
        lower_case=compiled.lower_case,
        note=opened.note,
    )


def fit_context(compiled: CompiledModel, wanted: int, free_bytes: int) -> int:
    """The longest text, up to `wanted` tokens, whose activations fit beside the weights.

    Raises OutOfMemory when not even a short one fits. Zero free bytes means that the system does
    not say.
    """
    if not free_bytes:
        return wanted
    # the widest moment of a layer, as measured: the feed-forward, and q, k, v with their copies
    per_token = 4 * (3 * compiled.feed_forward_length + 12 * compiled.hidden_size)
    weights_bytes = int(compiled.weights_bytes * _PACKED_WEIGHTS) + _WORKING_BYTES
    batch = max(min(wanted, _MIN_CONTEXT_TOKENS), CPU_BATCH_TOKENS)
    needed = weights_bytes + batch * per_token
    if needed > free_bytes:
        raise OutOfMemory(
            f"the model needs about {human_bytes(needed)} of memory and {human_bytes(free_bytes)} "
            "are free; unload other models, close programs or pull a smaller model",
            needed_bytes=needed,
            free_bytes=free_bytes,
        )
    return min(wanted, (free_bytes - weights_bytes) // per_token)


def _shrinking() -> Any:
    from .session import import_onnxruntime

    options = import_onnxruntime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options
