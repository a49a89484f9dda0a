"""Loads a compiled model that generates text into an engine: context, threads, memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ohmygpu.core import hardware
from ohmygpu.core.errors import OutOfMemory
from ohmygpu.core.records import CompiledModel, RunSpec
from ohmygpu.core.sizes import human_bytes
from ohmygpu.runtime_api import RuntimeCaps

from .engine import Engine
from .exported import ExportedModel
from .kv_cache import DeviceKVCache, HostKVCache, KVCache, fit_device
from .model import SCORES_BYTES, Model, OnnxModel, check_files
from .scheduler import Scheduler
from .sequence import RopeLengths
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
    free_bytes = hardware.memory_available_bytes()
    check_memory(compiled, context_tokens, free_bytes)
    tokenizer = Tokenizer(folder, compiled)
    threads = choose_threads(spec, compiled, hardware.physical_cores())
    opened = open_session(folder, compiled, spec.execution_provider, threads)
    prompts = None
    if opened.execution_provider == "CPU" and wants_prompts(spec, compiled, free_bytes):
        prompts = open_session(folder, compiled, "CPU", threads, compiled.prompt_graph).session
    slots = spec.slots
    cache: KVCache
    model: Model
    if compiled.exported is not None:
        cache = host = HostKVCache(compiled, slots, context_tokens)
        model = ExportedModel(opened.session, compiled, host, spec.prefill_tokens)
    else:
        if opened.execution_provider == "CUDA":
            gpu_bytes = max((gpu.memory_bytes for gpu in hardware.nvidia_gpus()), default=0)
            budget_bytes = int(gpu_bytes * _USABLE_GPU_MEMORY) - compiled.weights_bytes
            slots, context_tokens = fit_device(compiled, slots, context_tokens, budget_bytes)
            cache = DeviceKVCache(compiled, slots, context_tokens)
        else:
            cache = HostKVCache(compiled, slots, context_tokens)
        model = OnnxModel(opened.session, compiled, cache, spec.prefill_tokens, prompts)
    scheduler = Scheduler(
        slots=slots,
        max_queue=spec.max_queue,
        prefill_tokens=spec.prefill_tokens,
        can_copy=cache.can_copy,
        rope=RopeLengths(compiled.rope_switch_tokens, compiled.rope_grows),
    )
    engine = Engine(
        model,
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
        weights_bytes=compiled.weights_bytes + (compiled.prompt_bytes if prompts else 0),
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
    if compiled.score_heads:
        needed += SCORES_BYTES
    if 0 < free_bytes < needed:
        raise OutOfMemory(
            f"the model needs about {human_bytes(needed)} of memory and {human_bytes(free_bytes)} "
            "are free; unload other models, close programs or pull a smaller model",
            needed_bytes=needed,
            free_bytes=free_bytes,
        )


def wants_prompts(spec: RunSpec, compiled: CompiledModel, free_bytes: int) -> bool:
    """Whether the graph for prompts is opened too: where there is one, and both fit `free_bytes`.

    Zero free bytes means that the system does not say.
    """
    if not compiled.prompt_graph or spec.prompt_graph == "off":
        return False
    both = compiled.weights_bytes + compiled.prompt_bytes
    needed = int(both * _PACKED_WEIGHTS) + _WORKING_BYTES
    if 0 < free_bytes < needed:
        _logger.warning(
            "%s computes prompts in the graph that decodes, slower: both take about %s of memory, "
            "and %s are free",
            spec.model,
            human_bytes(needed),
            human_bytes(free_bytes),
        )
        return False
    return True


def _memory_is_short() -> bool:
    return 0 < hardware.memory_available_bytes() < _SHORT_MEMORY_BYTES
