"""Opens an InferenceSession on the right execution provider, or says in one sentence why not."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ohmygpu.core.errors import CorruptFile, OutOfMemory, RuntimeFailure
from ohmygpu.core.records import GRAPH_FILE, CompiledModel

_logger = logging.getLogger(__name__)

EXECUTION_PROVIDERS = ("CPU", "CUDA")
_SPIN_US = "50"
_NOT_INSTALLED = (
    "ONNX Runtime is not installed; install ohmygpu[cpu], or ohmygpu[cuda] on a machine with an "
    "NVIDIA GPU"
)


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """A session, the execution provider it runs on, and why it is not the better one (or "")."""

    session: Any
    execution_provider: str
    note: str = ""


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises RuntimeFailure when no package brings it."""
    try:
        import onnxruntime
    except ImportError as error:
        if error.name == "onnxruntime":
            raise RuntimeFailure(_NOT_INSTALLED) from error
        raise RuntimeFailure(f"ONNX Runtime cannot be loaded: {error}") from error
    return onnxruntime


def available_providers() -> list[str]:
    """Execution providers of the installed package, in our words: CUDA before CPU."""
    names = import_onnxruntime().get_available_providers()
    known = (name.removesuffix("ExecutionProvider") for name in names)
    return [name for name in known if name in EXECUTION_PROVIDERS]


def open_session(
    folder: Path,
    compiled: CompiledModel,
    execution_provider: str,
    threads: int,
    graph: str = GRAPH_FILE,
) -> OpenedSession:
    """Open `graph` in `folder` on `execution_provider` (auto, CPU or CUDA).

    `auto` takes CUDA where the model was compiled for it and falls back to the CPU with a note;
    an execution provider asked for by name is never replaced by another.
    Raises RuntimeFailure, OutOfMemory or CorruptFile.
    """
    wanted = _resolve(compiled, execution_provider)
    if wanted == "CUDA":
        try:
            return OpenedSession(_open_cuda(folder, graph), "CUDA")
        except RuntimeFailure as error:
            if execution_provider != "auto" or compiled.kv_dtype == "bfloat16":
                raise  # ONNX Runtime does not compute in bfloat16 on a CPU
            note = f"runs on the CPU, slowly: {error.message}"
            _logger.warning("%s", note)
            return OpenedSession(_open_cpu(folder, threads, graph), "CPU", note)
    return OpenedSession(_open_cpu(folder, threads, graph), "CPU")


def open_streamed(folder: Path, threads: int, graph: str = GRAPH_FILE) -> Any:
    """A session of a graph in `folder` on the CPU that keeps no copy of its weights.

    They are read from their file through a mapping: slower than a copy laid out for the processor,
    but the system can drop what it read, so a model may be larger than the memory.
    Raises RuntimeFailure, OutOfMemory or CorruptFile.
    """
    onnxruntime = import_onnxruntime()
    options = _options(onnxruntime)
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_prepacking", "1")
    return _create(onnxruntime, folder / graph, options, ["CPUExecutionProvider"])


def _resolve(compiled: CompiledModel, execution_provider: str) -> str:
    if execution_provider not in ("auto", *EXECUTION_PROVIDERS):
        raise RuntimeFailure(
            f"there is no execution provider {execution_provider}; use auto, "
            + " or ".join(EXECUTION_PROVIDERS)
        )
    if execution_provider == "CUDA" and compiled.target != "cuda":
        raise RuntimeFailure(
            "this model was compiled for the CPU and cannot run on CUDA; pull it again with the "
            "execution provider set to CUDA"
        )
    if execution_provider == "CPU" and compiled.kv_dtype == "bfloat16":
        raise RuntimeFailure(
            "this model computes in bfloat16, which runs on a GPU only; set the execution provider "
            "to CPU and pull it again"
        )
    if execution_provider == "auto":
        return "CUDA" if compiled.target == "cuda" else "CPU"
    return execution_provider


def _options(onnxruntime: Any) -> Any:
    options = onnxruntime.SessionOptions()
    # The graphs are written with ONNX Runtime's own fused operators: there is no layout to search.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # shapes differ from run to run
    options.log_severity_level = 3
    return options


def _open_cpu(folder: Path, threads: int, graph: str) -> Any:
    onnxruntime = import_onnxruntime()
    options = _options(onnxruntime)
    options.intra_op_num_threads = threads
    # Operators are microseconds apart, so between them threads spin instead of sleeping: a third
    # faster. No longer than that, though: on a busy machine threads that spin keep those they wait
    # for off the cores, which made steps twice as slow with the default duration.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return _create(onnxruntime, folder / graph, options, ["CPUExecutionProvider"])


def _open_cuda(folder: Path, graph: str) -> Any:
    """Written to ONNX Runtime's documented interface; it has not been run on a GPU."""
    onnxruntime = import_onnxruntime()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeFailure(
            "the installed ONNX Runtime has no CUDA; install ohmygpu[cuda] in place of ohmygpu[cpu]"
        )
    onnxruntime.preload_dlls()
    options = _options(onnxruntime)
    # Weights outside the arena: it would round their size up and keep the rest.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    provider = ("CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"})
    session = _create(onnxruntime, folder / graph, options, [provider, "CPUExecutionProvider"])
    if "CUDAExecutionProvider" not in session.get_providers():  # it falls back without a word
        raise RuntimeFailure(
            "CUDA cannot be started; check that the NVIDIA driver is version 580 or newer "
            "(`nvidia-smi`) and that the GPU has compute capability 7.5 or higher"
        )
    return session


def _create(onnxruntime: Any, path: Path, options: Any, providers: list[Any]) -> Any:
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].replace(f"{path.parent}/", "")
        kind = type(error).__name__
        if isinstance(error, MemoryError) or "bad_alloc" in reason or "allocate" in reason.lower():
            raise OutOfMemory(f"the model does not fit in memory: {reason}") from error
        if kind in ("InvalidProtobuf", "InvalidGraph", "NoSuchFile"):
            # A pull takes a file of the right size for whole, so the model must go first.
            raise CorruptFile(
                f"{path.name} is damaged ({reason}); remove it with omg model rm, then pull the "
                "model again",
                file=path.name,
            ) from error
        raise RuntimeFailure(f"ONNX Runtime cannot load the model: {reason}") from error
