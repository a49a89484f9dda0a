"""Long work on threads: one job per key, any number of watchers, cancelled when the last leaves."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.core.events import Event, EventSink

_logger = logging.getLogger("ohmygpu.jobs")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Work(Generic[Result]):
    """What a job does: `run` blocks, on a thread of its own, and stops soon after the event is set.

    `finished` is awaited with its result before the `done` event is published; `name` is for logs
    and messages ("pull of org/name").
    """

    name: str
    run: Callable[[EventSink, threading.Event], Result]
    finished: Callable[[Result], Awaitable[None]]


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


class _Job(Generic[Result]):
    def __init__(self, work: Work[Result]) -> None:
        self.work = work
        self.cancel = threading.Event()
        self.watchers: set[_Watcher] = set()
        self.latest: dict[str, Event] = {}  # phase → its newest event, for watchers who join late
        self.finished = asyncio.Event()

    def publish(self, event: Event) -> None:
        self.latest[event.phase] = event
        for watcher in self.watchers:
            watcher.put(event)


class Jobs(Generic[Result]):
    """Starts jobs, or joins the one already running under the same key."""

    def __init__(self) -> None:
        self._jobs: dict[Hashable, _Job[Result]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def watch(self, key: Hashable, work: Work[Result]) -> AsyncGenerator[Event, None]:
        """Events of the job until its `done` or `error`; closing it may cancel the job."""
        while (job := self._jobs.get(key)) is not None and job.cancel.is_set():
            await job.finished.wait()  # the last watcher just left: let it wind down, start afresh
        if job is None:
            job = self._start(key, _Job(work))
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
        """Cancel all jobs and wait for them, `timeout_s` at most."""
        for job in self._jobs.values():
            job.cancel.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _start(self, key: Hashable, job: _Job[Result]) -> _Job[Result]:
        self._jobs[key] = job
        task = asyncio.create_task(self._run(key, job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _run(self, key: Hashable, job: _Job[Result]) -> None:
        internal = f"the {job.work.name} failed inside the daemon; daemon.log says why"
        last = Event("error", message=internal, error=OhMyGPUError(internal))
        try:
            result, done = await self._on_thread(job)
            await job.work.finished(result)
            last = done
        except OhMyGPUError as error:
            last = Event("error", message=error.message, error=error)
        except Exception:
            _logger.exception("the %s failed", job.work.name)
        finally:
            del self._jobs[key]
            job.publish(last)
            job.finished.set()

    async def _on_thread(self, job: _Job[Result]) -> tuple[Result, Event]:
        """Run the work; its result and `done` event, which is held back for the caller."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Result] = loop.create_future()
        done = [Event("done")]

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

        def work() -> None:
            try:
                result = job.work.run(sink, job.cancel)
            except BaseException as error:  # noqa: BLE001 (handed to the loop, raised there)
                post(_settle, outcome, outcome.set_exception, error)
            else:
                post(_settle, outcome, outcome.set_result, result)

        # A daemon thread: an executor's would hold up the exit until a stuck transfer times out.
        threading.Thread(target=work, name=job.work.name, daemon=True).start()
        return await outcome, done[-1]


def _settle(outcome: asyncio.Future[Any], settle: Callable[[Any], None], value: object) -> None:
    if not outcome.done():  # who waited for it may be gone
        settle(value)
