"""The installed models: read from disk, changed through the daemon where one answers.

The daemon and this process see the same folder and take the same locks, so both are safe; the
daemon is asked to change things because it knows which models are in use.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from ohmygpu.core.errors import Cancelled, CorruptFile, DaemonError, DaemonNotRunning
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.fidelity import load_fidelity
from ohmygpu.core.records import TEMPLATE_FILE, CompiledModel, InstallRecord
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import Settings

from .output import note

if TYPE_CHECKING:
    from ohmygpu.client import Client, ModelInfo

# What decides a pull's result. The daemon has its own values of these; a value in this command's
# environment must count, so such a pull does not go through the daemon.
_PULL_SETTINGS = (
    "hub.",
    "pypi.",
    "models.recipe",
    "models.keep_source",
    "exporter.",
    "engine.execution_provider",  # what it is compiled for
)


class Catalogue:
    """The installed models of one home folder."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._repository = Repository(settings.home)

    def models(self) -> list[ModelInfo]:
        """All installed models, by name; a damaged one is listed with its problem."""
        records = self._repository.records()
        records.sort(key=lambda record: (record.name.lower(), record.variant))
        return [self._describe(record) for record in records]

    def model(self, name: str) -> ModelInfo:
        """One installed model. Raises ModelNotFound (details: suggestions), CorruptFile."""
        return self._describe(self._repository.find(name))

    def pull(
        self,
        reference: str,
        name: str | None,
        recipe: str | None,
        sink: EventSink,
        *,
        adapter: str | None = None,
        verify: bool = False,
        export: bool = False,
    ) -> str:
        """Install a model, and measure it with `verify`; its name. Raises Cancelled on Ctrl-C."""
        try:
            with self._daemon_for_pull() as client:
                if client is not None:
                    events = client.pull(
                        reference,
                        name=name,
                        recipe=recipe,
                        adapter=adapter,
                        verify=verify,
                        export=export,
                    )
                    return _follow(events, sink)
            return self._pull(reference, name, recipe, adapter, sink, verify, export)
        except (Cancelled, KeyboardInterrupt):
            raise Cancelled(
                "stopped; run the same command again, and it goes on from here"
            ) from None

    def verify(self, name: str, sink: EventSink) -> str:
        """Measure an installed model; its name. Raises ModelNotFound; Cancelled on Ctrl-C."""
        try:
            with self._daemon_for_pull() as client:
                if client is not None:
                    return _follow(client.verify(name), sink)
            from ohmygpu.verify import verify

            with _cancel_on_interrupt() as cancel:
                verify(name, self._settings, sink=sink, cancel=cancel)
            return name
        except (Cancelled, KeyboardInterrupt):
            raise Cancelled("stopped; nothing was measured, and nothing is left behind") from None

    def remove(self, name: str) -> int:
        """Remove a model; bytes freed. Raises ModelNotFound."""
        with self._daemon() as client:
            if client is not None:
                return client.remove(name)
        from ohmygpu.install import remove

        return remove(name, self._settings).freed_bytes

    def gc(self, sources: bool) -> dict[str, Any]:
        """Remove what no record names; counts and `freed_bytes`."""
        with self._daemon() as client:
            if client is not None:
                return client.gc(sources=sources)
        from ohmygpu.install import collect_garbage

        return collect_garbage(self._settings, sources).to_dict()

    def _pull(
        self,
        reference: str,
        name: str | None,
        recipe: str | None,
        adapter: str | None,
        sink: EventSink,
        verify: bool,
        export: bool,
    ) -> str:
        from ohmygpu.install import pull

        with _cancel_on_interrupt() as cancel:
            record = pull(
                reference,
                self._settings,
                name=name,
                recipe=recipe,
                adapter=adapter,
                verify=verify,
                export=export,
                sink=sink,
                cancel=cancel,
            )
        return record.full_name

    def _daemon_for_pull(self) -> contextlib.AbstractContextManager[Client | None]:
        for key, origin in self._settings.origins.items():
            if key.startswith(_PULL_SETTINGS) and origin.startswith("environment"):
                return contextlib.nullcontext()
        return self._daemon()

    @contextlib.contextmanager
    def _daemon(self) -> Iterator[Client | None]:
        """A client of the daemon; None where none answers."""
        from ohmygpu.client import connect

        try:
            client = connect(self._settings)
        except DaemonNotRunning:
            yield None
            return
        except DaemonError as error:
            note(f"going on without the daemon: {error.message}")
            yield None
            return
        with client:
            yield client

    def _describe(self, record: InstallRecord) -> ModelInfo:
        from ohmygpu.client import ModelInfo

        folder = self._repository.compiled_path(record.compiled_key)
        problem = self._repository.compiled_problem(record.compiled_key)
        compiled = None
        with contextlib.suppress(CorruptFile):  # then `problem` says so
            compiled = CompiledModel.load(folder)
        return ModelInfo.from_disk(
            record,
            compiled,
            has_template=(folder / TEMPLATE_FILE).exists(),
            location=str(folder),
            fidelity=load_fidelity(folder),
            problem=f"{problem}; pull the model again to repair it" if problem else None,
        )


def _follow(events: Generator[Event, None, None], sink: EventSink) -> str:
    """Pass on what the daemon reports; the name in its last event."""
    installed = None
    with contextlib.closing(events):
        for event in events:
            sink(event)
            installed = event.name or installed
    if installed is None:
        raise DaemonError("the daemon did not say under which name the model is installed")
    return installed


@contextlib.contextmanager
def _cancel_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts at once."""
    cancel = threading.Event()

    def on_interrupt(_signal: int, _frame: object) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, previous)
