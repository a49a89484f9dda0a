"""Installing and removing models: provider → blobs → compile → record, in one place.

    pull = resolve → (supported? space?) → fetch → verify → compile → record

Each arrow is a commit point: what is finished stays, and the next pull goes on from there. The
record is written last, so a model is installed or it is not. Used by the daemon, and by the
terminal directly when no daemon answers; the store's locks make both safe at once.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .core import files
from .core.errors import (
    Cancelled,
    CorruptFile,
    InvalidName,
    NetworkError,
    NotFound,
    OhMyGPUError,
)
from .core.events import Event, EventSink
from .core.fidelity import FIDELITY_FILE
from .core.manifests import source_of
from .core.records import Artifact, CompiledModel, InstallRecord
from .core.refs import ModelRef, check_name
from .core.repository import GcReport, Removed, Repository
from .core.settings import Settings
from .effort import known_inputs
from .plan import Plan, compiled_estimate_bytes, float_estimate_bytes, make_plan
from .verify import check_sources, is_measured, measure, not_measurable

if TYPE_CHECKING:
    from .core.provider import Provider


def ignore(_: Event) -> None:
    """An event sink that drops everything."""


def pull(
    reference: str,
    settings: Settings,
    *,
    name: str | None = None,
    recipe: str | None = None,
    adapter: str | None = None,
    verify: bool = False,
    export: bool = False,
    sink: EventSink = ignore,
    cancel: threading.Event | None = None,
) -> InstallRecord:
    """Install the model that `reference` names; does only what is not done yet.

    `name` is the name to install under instead of its own, `recipe` what to compile to instead of
    what suits the source; `adapter` refers to a LoRA adapter to merge into it, whose name it then
    has. With `verify` the result is measured against the same weights in float32, unless it was
    already. `export` agrees to the environment that a model without a family file is exported in;
    ConsentNeeded otherwise, where there is none yet. Blocks until done; `sink` receives the events
    on this thread and, last, exactly one `done` or `error`. Setting `cancel` ends it with Cancelled
    within about a second; what was downloaded stays for the next try.
    """
    cancel = cancel or threading.Event()
    try:
        asked = _Asked(reference, name, recipe, adapter, verify, export)
        record = _pull(asked, settings, sink, cancel)
    except Exception as cause:
        error = _as_error(cause, settings)
        sink(Event("error", error.message, error=error))
        if error is cause:
            raise
        raise error from cause
    shown = record.name if record.is_default else record.full_name
    sink(Event("done", f"{record.full_name} is installed", name=shown))
    return record


def remove(name: str, settings: Settings) -> Removed:
    """Remove an installed model and what only it needs; says what that freed.

    Raises ModelNotFound, or Conflict while the model is being pulled.
    """
    return Repository(settings.home).remove(name)


def collect_garbage(settings: Settings, sources: bool = False) -> GcReport:
    """Remove what no installed model needs; with `sources` also the source files of those.

    Environments of the exporter that another version made or that are unfinished go too.
    """
    from .exporter import environment

    report = Repository(settings.home).gc(sources)
    freed_bytes = environment.remove(settings.home, current=False)
    return replace(report, freed_bytes=report.freed_bytes + freed_bytes)


def supported_model_types() -> list[str]:
    """The `model_type`s that can be compiled, sorted."""
    from .convert import family

    return family.supported_model_types()


def is_text_part(name: str) -> bool:
    """Whether models of this family take images too, and their text model alone is compiled."""
    from .convert import family

    return name in family.TEXT_PARTS


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `pull` was asked for."""

    reference: str
    name: str | None
    recipe: str | None
    adapter: str | None
    verify: bool
    export: bool


def _pull(
    asked: _Asked, settings: Settings, sink: EventSink, cancel: threading.Event
) -> InstallRecord:
    from .core.providers import provider_for, with_adapter

    ref = ModelRef.parse(asked.reference)
    name = None if asked.name is None else _given_name(asked.name)
    repository = Repository(settings.home)
    sink(Event("resolve", f"looking up {ref.display}"))
    provider = provider_for(ref, settings)
    if asked.adapter is not None:
        provider = with_adapter(provider, ModelRef.parse(asked.adapter), settings)
    try:
        resolved = provider.resolve(ref)
    except NetworkError as error:
        raise _unreachable(error, repository, asked.reference) from error
    _stop_if(cancel)
    plan = make_plan(resolved, settings, name, asked.recipe)
    if plan.exported and asked.verify:
        raise not_measurable(plan.name)
    if plan.adapter_mismatch:
        sink(Event("resolve", plan.adapter_mismatch))
    record = _installed(repository, plan)
    fresh = False
    if record is None and plan.exported:
        _check_consent(plan, settings, asked.export)
    if record is None or not _is_current(record, plan):

        def on_wait() -> None:
            sink(Event("resolve", f"another process is pulling {plan.name}; waiting for it"))

        with repository.lock(plan.name, on_wait=on_wait, cancel=cancel):
            record = _installed(repository, plan)
            fresh = record is None
            if record is None:
                with repository.lease():
                    record = _install(repository, provider, plan, settings, sink, cancel)
            else:
                record = _update_default(repository, record, plan)
    if asked.verify and not is_measured(repository, record):
        fresh = True
        _measure(repository, provider, plan, record, settings, sink, cancel)
    if fresh and not settings.models.keep_source:
        repository.free_sources(record)
    return record


def _check_consent(plan: Plan, settings: Settings, agreed: bool) -> None:
    from .exporter import environment

    model_type = str((plan.resolved.config or {}).get("model_type"))
    subject = f"{plan.name} has the architecture {model_type}, which has no converter"
    environment.check_consent(settings, agreed, subject)


def _install(
    repository: Repository,
    provider: Provider,
    plan: Plan,
    settings: Settings,
    sink: EventSink,
    cancel: threading.Event,
) -> InstallRecord:
    """Fetch, verify, compile and record, with the model's lock and a lease held."""
    if not plan.exported:
        return _fetch_and_compile(repository, provider, plan, (), sink, cancel)
    from .exporter import environment

    with environment.in_use(settings, sink, cancel) as python:
        environment.try_config(python, plan.resolved.config or {}, sink, cancel)
        exporter = environment.command(python)
        return _fetch_and_compile(repository, provider, plan, exporter, sink, cancel)


def _fetch_and_compile(
    repository: Repository,
    provider: Provider,
    plan: Plan,
    exporter: Sequence[str],
    sink: EventSink,
    cancel: threading.Event,
) -> InstallRecord:
    if plan.ref.provider != "file":  # of a file the name may stay when its bytes are the same
        repository.check_name_free(_draft(plan, ()))
    repository.claim(*(file.digest for file in plan.resolved.files if file.digest))
    repository.sweep_temporaries()
    needed = _missing_bytes(repository, plan) + compiled_estimate_bytes(plan)
    repository.check_space(needed, f"pulling and compiling {plan.name}")
    artifacts = provider.fetch(plan.resolved, repository, sink, cancel)
    draft = _draft(plan, artifacts)
    repository.check_name_free(draft)

    def on_wait() -> None:
        sink(Event("compile", "another process is compiling the same files; waiting for it"))

    with repository.lock(draft.compiled_key, on_wait=on_wait, cancel=cancel):
        if not repository.has_compiled(draft.compiled_key):
            _stop_if(cancel)
            try:
                check_sources(repository, artifacts, sink, cancel)
            except CorruptFile:  # a damaged blob is gone now: once more from its provider
                fetched = provider.fetch(plan.resolved, repository, sink, cancel)
                if fetched != artifacts:
                    raise
                check_sources(repository, artifacts, sink, cancel)
            _stop_if(cancel)
            _compile(repository, draft, plan, exporter, sink, cancel)
    folder = repository.compiled_path(draft.compiled_key)
    compiled = CompiledModel.load(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != FIDELITY_FILE)
    record = replace(draft, family=compiled.family, compiled_bytes=size)
    return _commit(repository, record)


def _measure(
    repository: Repository,
    provider: Provider,
    plan: Plan,
    record: InstallRecord,
    settings: Settings,
    sink: EventSink,
    cancel: threading.Event,
) -> None:
    """Measure what is installed, fetching sources that were freed; errors say it is installed."""
    try:
        with repository.lease():
            repository.claim(*(artifact.sha256 for artifact in record.artifacts))
            repository.sweep_temporaries()
            stored = (repository.has_blob(a.sha256, a.size) for a in record.artifacts)
            if not all(stored):
                repository.check_space(_missing_bytes(repository, plan), f"pulling {plan.name}")
                provider.fetch(plan.resolved, repository, sink, cancel)
            measure(repository, record, settings, sink, cancel)
    except Cancelled:
        raise
    except OhMyGPUError as error:
        raise type(error)(
            f"{record.full_name} is installed but could not be measured: {error.message}",
            **error.details,
        ) from error


def _commit(repository: Repository, record: InstallRecord) -> InstallRecord:
    """Write the record, unless one that says the same is there."""
    for other in repository.records():
        if (other.provider, other.full_name.lower()) == (
            record.provider,
            record.full_name.lower(),
        ):
            record = replace(record, is_default=record.is_default or other.is_default)
            if replace(record, installed_at=other.installed_at) == other:
                return other
    return repository.write_record(record)


def _compile(
    repository: Repository,
    draft: InstallRecord,
    plan: Plan,
    exporter: Sequence[str],
    sink: EventSink,
    cancel: threading.Event,
) -> None:
    """Compile into a temporary folder and commit that."""
    from .convert import recipes
    from .convert.process import compile_in_subprocess

    message = f"{'exporting' if plan.exported else 'compiling'} {draft.full_name}"

    def progress(done_bytes: int, total_bytes: int) -> None:
        sink(Event("compile", message, done_bytes=done_bytes, total_bytes=total_bytes))

    sink(Event("compile", message))
    sources = {
        artifact.filename: repository.blob_path(artifact.sha256) for artifact in draft.artifacts
    }
    with ExitStack() as stack:
        folder = repository.new_compiled()
        stack.callback(repository.discard, folder)
        calibration = None
        if recipes.recipe(draft.recipe).knows_inputs:
            size = float_estimate_bytes(plan.resolved)
            calibration = stack.enter_context(
                known_inputs(repository, sources, size, draft.full_name, sink, cancel)
            )
            sink(Event("compile", message))
        compile_in_subprocess(
            sources,
            folder,
            draft.recipe,
            plan.target,
            progress,
            cancel,
            calibration=calibration,
            exporter=exporter,
        )
        repository.commit_compiled(folder, draft.compiled_key)


def _draft(plan: Plan, artifacts: tuple[Artifact, ...]) -> InstallRecord:
    """The record to be, without what only the compile tells."""
    from .convert.family import compile_key

    digests = [artifact.sha256 for artifact in artifacts]
    return InstallRecord(
        provider=plan.ref.provider,
        name=plan.name,
        variant=plan.variant,
        is_default=plan.wants_default,
        source_ref=plan.ref.display,
        revision=plan.resolved.revision,
        artifacts=artifacts,
        compiled_key=compile_key(digests, plan.family, plan.recipe, plan.target),
        recipe=plan.recipe,
        recipe_reason=plan.recipe_reason,
        prompt_reason=plan.prompt_reason,
        adapter=plan.adapter,
        family=plan.family,
        compiled_bytes=0,
        installed_at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def _installed(repository: Repository, plan: Plan) -> InstallRecord | None:
    """The record of exactly this revision, recipe and target, if its compiled model is whole."""
    revision = plan.resolved.revision
    for record in repository.records():
        if (
            revision is not None
            and record.revision is not None
            and record.revision.resolved_commit == revision.resolved_commit
            and (record.provider, record.recipe) == (plan.ref.provider, plan.recipe)
            and (record.name.lower(), record.variant) == (plan.name.lower(), plan.variant)
            and source_of(record) == plan.source
            and record.adapter == plan.adapter
            and repository.compiled_problem(record.compiled_key) is None
        ):
            compiled = CompiledModel.load(repository.compiled_path(record.compiled_key))
            return record if compiled.target == plan.target else None
    return None


def _is_current(installed: InstallRecord, plan: Plan) -> bool:
    return installed.is_default or not plan.wants_default


def _update_default(repository: Repository, installed: InstallRecord, plan: Plan) -> InstallRecord:
    if _is_current(installed, plan):
        return installed
    return repository.write_record(replace(installed, is_default=True))


def _missing_bytes(repository: Repository, plan: Plan) -> int:
    """Bytes that the sources still need on the disk."""
    total = 0
    for file in plan.resolved.files:
        if file.sha256 and repository.has_blob(file.sha256, file.size):
            continue
        if plan.ref.provider == "file" and files.shares_disk(file.url, repository.models_dir):
            continue  # linked, not copied
        part = repository.partial_dir / f"{file.digest}.part"
        total += max(0, file.size - files.allocated_bytes(part))
    return total


def _as_error(cause: Exception, settings: Settings) -> OhMyGPUError:
    """The error to show for whatever a pull raised."""
    if isinstance(cause, OhMyGPUError):
        return cause
    if isinstance(cause, OSError):
        reason = f"{cause.strerror or type(cause).__name__}: {cause.filename or settings.home}"
        return files.explain(cause, settings.home, "the model") or OhMyGPUError(reason)
    return OhMyGPUError(f"the pull failed unexpectedly ({type(cause).__name__}: {cause})")


def _given_name(name: str) -> str:
    """A name the user chose. Raises InvalidName."""
    name = name.strip()
    head, _, variant = name.partition(":")
    if variant and variant.lower() != "latest":
        raise InvalidName(
            f'"{name}": a name has no variant of its own; leave out ":{variant}"', name=name
        )
    return check_name(head)


def _unreachable(error: NetworkError, repository: Repository, reference: str) -> NetworkError:
    """`error`, saying that the model is installed where that is so."""
    try:
        record = repository.find(reference)
    except (NotFound, InvalidName, CorruptFile):
        return error
    return type(error)(
        f"{error.message}; {record.full_name} is installed and stays usable", **error.details
    )


def _stop_if(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("the pull was cancelled")
