"""Measures an installed model against its own weights in float32, and keeps the result.

The reference is the same source compiled with the recipe f32 into a temporary folder, gone when
this ends; a process that is killed leaves it to the store's sweep of temporaries.
"""

from __future__ import annotations

import threading
from pathlib import Path

from .core.child import python_module
from .core.errors import Conflict, CorruptFile, InvalidRequest
from .core.events import Event, EventSink
from .core.fidelity import TEXT_VERSION, Fidelity, graph_files, load_fidelity, save_fidelity
from .core.job import Words, run_job
from .core.records import Artifact, CompiledModel, InstallRecord
from .core.repository import Repository
from .core.settings import Settings

WORKER = (*python_module("ohmygpu.runtime_onnx.worker"), "verify", "-")

_WORDS = Words("the measurement", "the measuring process", "try again")
_FLOAT_BYTES = 4
_BESIDE_WEIGHTS_BYTES = 64 << 20  # graph, tokenizer, tables of angles


def ignore(_: Event) -> None:
    """An event sink that drops everything."""


def verify(
    name: str,
    settings: Settings,
    *,
    sink: EventSink = ignore,
    cancel: threading.Event | None = None,
) -> dict[str, Fidelity]:
    """Measure the installed model `name` anew; graph's file name → Fidelity.

    Blocks until done; `sink` receives `verify`, `compile` (the float32 reference) and `measure`
    events on this thread and, when all went well, `done`. Setting `cancel` ends it with Cancelled
    at once, with nothing left behind. Raises ModelNotFound; Conflict when the source files are
    gone; CorruptFile when they are damaged; InvalidRequest for a model of vectors; DiskFull with
    both numbers; and what compiling and running raise.
    """
    repository = Repository(settings.home)
    record = repository.find(name)
    with repository.lease():
        repository.sweep_temporaries()
        found = measure(repository, record, settings, sink, cancel or threading.Event())
    shown = record.name if record.is_default else record.full_name
    sink(Event("done", f"{record.full_name} is measured", name=shown))
    return found


def not_measurable(name: str) -> InvalidRequest:
    """The error for measuring a model that transformers exported."""
    return InvalidRequest(
        f"{name} is exported in float32 as it is, so there is no difference to measure",
        param="verify",
    )


def is_measured(repository: Repository, record: InstallRecord) -> bool:
    """Whether all graphs of the model were measured on today's text."""
    folder = repository.compiled_path(record.compiled_key)
    found = load_fidelity(folder)
    return all(
        name in found and found[name].text_version == TEXT_VERSION
        for name in graph_files(CompiledModel.load(folder))
    )


def measure(
    repository: Repository,
    record: InstallRecord,
    settings: Settings,
    sink: EventSink,
    cancel: threading.Event,
) -> dict[str, Fidelity]:
    """`verify` for a record, with the repository's lease held."""
    key = record.compiled_key
    repository.claim(key, *(artifact.sha256 for artifact in record.artifacts))
    folder = repository.compiled_path(key)
    problem = repository.compiled_problem(key)
    if problem is not None:
        raise CorruptFile(f"the compiled model is damaged: {problem}; pull {record.name} again")
    compiled = CompiledModel.load(folder)
    if compiled.kind != "decoder":
        raise InvalidRequest(
            f"{record.full_name} turns texts into vectors; what can be measured is how a model "
            "continues a text"
        )
    if compiled.exported is not None:
        raise not_measurable(record.full_name)

    def on_wait() -> None:
        sink(Event("measure", f"another process is measuring {record.full_name}; waiting for it"))

    with repository.lock(f"verify {key}", on_wait=on_wait, cancel=cancel):
        if (compiled.recipe, compiled.target) == ("f32", "cpu"):
            found = _compare(folder, folder, compiled, record, settings, sink, cancel)
        else:
            sources = _sources(repository, record)
            check_sources(repository, record.artifacts, sink, cancel)
            needed = compiled.parameters * _FLOAT_BYTES + _BESIDE_WEIGHTS_BYTES
            repository.check_space(
                needed, f"the float32 copy that {record.full_name} is measured against"
            )
            reference = repository.new_compiled()
            try:
                _compile_reference(sources, reference, record, needed, sink, cancel)
                found = _compare(folder, reference, compiled, record, settings, sink, cancel)
            finally:
                repository.discard(reference)
        save_fidelity(folder, found)
    return found


def check_sources(
    repository: Repository,
    artifacts: tuple[Artifact, ...],
    sink: EventSink,
    cancel: threading.Event,
) -> None:
    """Read the blobs that this repository object did not store itself.

    Raises CorruptFile for one that is damaged, which is gone then; Cancelled.
    """
    total = sum(artifact.size for artifact in artifacts)
    done = 0
    for artifact in artifacts:

        def progress(count: int, artifact: Artifact = artifact) -> None:
            nonlocal done
            done += count
            sink(
                Event(
                    "verify",
                    f"checking {artifact.filename}",
                    done_bytes=min(done, total),
                    total_bytes=total,
                    file=artifact.filename,
                    sha256=artifact.sha256,
                )
            )

        repository.check_blob(artifact, progress, cancel)


def _sources(repository: Repository, record: InstallRecord) -> dict[str, Path]:
    """The source files by name. Raises Conflict when they are not there any more."""
    for artifact in record.artifacts:
        if not repository.has_blob(artifact.sha256, artifact.size):
            raise Conflict(
                f"{record.full_name} cannot be measured: its source file {artifact.filename} was "
                "freed (omg model gc --sources, or models.keep_source = false); fetch it again "
                f"with `{_pull_command(record)} --verify`",
                filename=artifact.filename,
            )
    return {
        artifact.filename: repository.blob_path(artifact.sha256) for artifact in record.artifacts
    }


def _pull_command(record: InstallRecord) -> str:
    """What to type to pull the same model once more."""
    words = ["omg model pull", record.source_ref, "--recipe", record.recipe]
    if record.name.lower() not in record.source_ref.lower():
        words += ["--name", record.name]
    if record.adapter is not None:
        words += ["--adapter", record.adapter.source_ref]
    return " ".join(words)


def _compile_reference(
    sources: dict[str, Path],
    folder: Path,
    record: InstallRecord,
    needed_bytes: int,
    sink: EventSink,
    cancel: threading.Event,
) -> None:
    from .convert.process import compile_in_subprocess
    from .core.sizes import human_bytes

    message = f"compiling {record.full_name} to float32 ({human_bytes(needed_bytes)}, temporary)"
    sink(Event("compile", message))

    def progress(done_bytes: int, total_bytes: int) -> None:
        sink(Event("compile", message, done_bytes=done_bytes, total_bytes=total_bytes))

    compile_in_subprocess(sources, folder, "f32", "cpu", progress, cancel)


def _compare(
    folder: Path,
    reference: Path,
    compiled: CompiledModel,
    record: InstallRecord,
    settings: Settings,
    sink: EventSink,
    cancel: threading.Event,
) -> dict[str, Fidelity]:
    """Run every graph of the model beside the reference."""
    found: dict[str, Fidelity] = {}
    for graph in graph_files(compiled):
        message = f"measuring {graph} of {record.full_name} against float32"
        sink(Event("measure", message))

        def progress(done_bytes: int, total_bytes: int, message: str = message) -> None:
            sink(Event("measure", message, done_bytes=done_bytes, total_bytes=total_bytes))

        job = {
            "model": record.full_name,
            "folder": str(folder),
            "reference": str(reference),
            "graph": graph,
            "execution_provider": settings.engine.execution_provider,
            "threads": settings.engine.threads,
        }
        answer = run_job(WORKER, job, "fidelity", progress, cancel, _WORDS)
        found[graph] = Fidelity.from_dict(answer)
    return found
