"""Pulls in progress: one job per model, any number of watchers, cancelled when the last leaves."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from ohmygpu.core.errors import Cancelled, OhMyGPUError
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.records import InstallRecord
from ohmygpu.core.refs import ModelRef

_logger = logging.getLogger("ohmygpu.pull")
_INTERNAL = "the pull failed inside the daemon; daemon.log says why"

PullKey = tuple[str, str | None, str | None]  # canonical reference, name, recipe


class PullFunction(Protocol):
    """`install.pull` with its settings bound; blocks, and runs on a thread of its own."""

    def __call__(
        self,
        reference: str,
        *,
        name: str | None,
        recipe: str | None,
        sink: EventSink,
        cancel: threading.Event,
    ) -> InstallRecord:
        """Pull, report to `sink`, stop soon after `cancel` is set."""
        ...


class _Watcher:
    """Events on their way to one client: progress of the same phase replaces what is untaken."""

    def __init__(self) -> None:
        self._pending: list[Event] = []
        self._filled = asyncio.Event()

    def put(self, event: Event) -> None:
        if self._pending and self._pending[-1].phase == event.phase:
            self._pending[-1] = event
        else:
            self._pending.append(event)
        self._filled.set()

    async def get(self) -> Event:
        while not self._pending:
            self._filled.clear()
            await self._filled.wait()
        return self._pending.pop(0)


class _Job:
    def __init__(self, reference: str, name: str | None, recipe: str | None) -> None:
        self.reference = reference
        self.name = name
        self.recipe = recipe
        self.cancel = threading.Event()
        self.watchers: set[_Watcher] = set()
        self.latest: dict[str, Event] = {}  # phase → its newest event, for watchers who join late
        self.finished = asyncio.Event()

    def publish(self, event: Event) -> None:
        self.latest[event.phase] = event
        for watcher in self.watchers:
            watcher.put(event)


class Pulls:
    """Starts pulls, or joins the one already running for the same model.

    `on_installed` is awaited after each successful pull, before its `done` event is published.
    """

    def __init__(
        self, pull: PullFunction, on_installed: Callable[[InstallRecord], Awaitable[None]]
    ) -> None:
        self._pull = pull
        self._on_installed = on_installed
        self._jobs: dict[PullKey, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def watch(
        self, reference: str, *, name: str | None = None, recipe: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events of the pull until its `done` or `error`; closing it may cancel the pull.

        Raises InvalidName, at the first event, when `reference` is none.
        """
        key = (_canonical(reference), name, recipe)
        while (job := self._jobs.get(key)) is not None and job.cancel.is_set():
            await job.finished.wait()  # the last watcher just left: let it wind down, start afresh
        if job is None:
            job = self._start(key, _Job(reference, name, recipe))
        watcher = _Watcher()
        for event in job.latest.values():
            watcher.put(event)
        job.watchers.add(watcher)
        try:
            while True:
                event = await watcher.get()
                yield event
                if event.phase in {"done", "error"}:
                    return
        finally:
            job.watchers.discard(watcher)
            if not job.watchers:
                job.cancel.set()

    async def shutdown(self, timeout_s: float) -> None:
        """Cancel all pulls and wait for them, `timeout_s` at most; a later pull resumes them."""
        for job in self._jobs.values():
            job.cancel.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _start(self, key: PullKey, job: _Job) -> _Job:
        self._jobs[key] = job
        task = asyncio.create_task(self._run(key, job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _run(self, key: PullKey, job: _Job) -> None:
        last = Event("error", error=OhMyGPUError(_INTERNAL))
        try:
            record, last = await self._on_thread(job)
            await self._on_installed(record)
        except OhMyGPUError as error:
            last = Event("error", message=error.message, error=error)
        except Exception:
            _logger.exception("pull of %s failed", job.reference)
            last = Event("error", message=_INTERNAL, error=OhMyGPUError(_INTERNAL))
        finally:
            del self._jobs[key]
            job.publish(last)
            job.finished.set()

    async def _on_thread(self, job: _Job) -> tuple[InstallRecord, Event]:
        """Run the pull; its record and `done` event, which is held back for the caller."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[InstallRecord] = loop.create_future()
        done: list[Event] = []

        def post(action: Callable[..., None], *arguments: object) -> None:
            try:
                loop.call_soon_threadsafe(action, *arguments)
            except RuntimeError:
                job.cancel.set()  # the loop has closed: the daemon is going down

        def sink(event: Event) -> None:
            if event.phase == "done":
                done.append(event)
            elif event.phase != "error":  # the exception says it, once
                post(job.publish, event)

        def settle(record: InstallRecord | None, error: BaseException | None) -> None:
            if outcome.done():
                return
            if record is not None:
                outcome.set_result(record)
            else:
                outcome.set_exception(error or Cancelled("the pull was cancelled"))

        def work() -> None:
            try:
                record = self._pull(
                    job.reference,
                    name=job.name,
                    recipe=job.recipe,
                    sink=sink,
                    cancel=job.cancel,
                )
            except BaseException as error:  # noqa: BLE001 (handed to the loop, raised there)
                post(settle, None, error)
            else:
                post(settle, record, None)

        # A daemon thread: an executor's would hold up the exit until a stuck transfer times out.
        threading.Thread(target=work, name=f"pull {job.reference}", daemon=True).start()
        record = await outcome
        return record, done[0] if done else Event("done", name=record.full_name)


def _canonical(reference: str) -> str:
    """The same text for every way to write the same reference."""
    parsed = ModelRef.parse(reference)
    return parsed.display if parsed.provider == "file" else parsed.display.lower()
