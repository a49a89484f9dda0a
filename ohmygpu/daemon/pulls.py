"""Pulls and measurements in progress: one job per model, whoever asks joins it."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol

from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.fidelity import Fidelity
from ohmygpu.core.records import InstallRecord
from ohmygpu.core.refs import ModelRef

from .jobs import Jobs, Work


class PullFunction(Protocol):
    """`install.pull` with its settings bound; blocks, and runs on a thread of its own."""

    def __call__(
        self,
        reference: str,
        *,
        name: str | None,
        recipe: str | None,
        adapter: str | None,
        verify: bool,
        export: bool,
        sink: EventSink,
        cancel: threading.Event,
    ) -> InstallRecord:
        """Pull, report to `sink`, stop soon after `cancel` is set."""
        ...


class VerifyFunction(Protocol):
    """`verify.verify` with its settings bound; blocks, and runs on a thread of its own."""

    def __call__(
        self, name: str, *, sink: EventSink, cancel: threading.Event
    ) -> dict[str, Fidelity]:
        """Measure, report to `sink`, stop soon after `cancel` is set."""
        ...


class Pulls:
    """Starts pulls, or joins the one already running for the same model; a later one resumes.

    `on_installed` is awaited after each successful pull, before its `done` event is published.
    """

    def __init__(
        self, pull: PullFunction, on_installed: Callable[[InstallRecord], Awaitable[None]]
    ) -> None:
        self._pull = pull
        self._on_installed = on_installed
        self._jobs: Jobs[InstallRecord] = Jobs()

    def watch(
        self,
        reference: str,
        *,
        name: str | None = None,
        recipe: str | None = None,
        adapter: str | None = None,
        verify: bool = False,
        export: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Events of the pull until its `done` or `error`; closing it may cancel the pull.

        Raises InvalidName when `reference` or `adapter` is none.
        """

        def run(sink: EventSink, cancel: threading.Event) -> InstallRecord:
            return self._pull(
                reference,
                name=name,
                recipe=recipe,
                adapter=adapter,
                verify=verify,
                export=export,
                sink=sink,
                cancel=cancel,
            )

        work = Work(f"pull of {reference}", run, self._on_installed)
        merged = None if adapter is None else _canonical(adapter)
        return self._jobs.watch((_canonical(reference), name, recipe, merged, verify, export), work)

    async def shutdown(self, timeout_s: float) -> None:
        """Cancel all pulls and wait for them, `timeout_s` at most."""
        await self._jobs.shutdown(timeout_s)


class Verifications:
    """Starts measurements of installed models, or joins the one already running."""

    def __init__(self, verify: VerifyFunction) -> None:
        self._verify = verify
        self._jobs: Jobs[dict[str, Fidelity]] = Jobs()

    def watch(self, full_name: str) -> AsyncGenerator[Event, None]:
        """Events of the measurement until its `done` or `error`; closing it may cancel it."""

        def run(sink: EventSink, cancel: threading.Event) -> dict[str, Fidelity]:
            return self._verify(full_name, sink=sink, cancel=cancel)

        work = Work(f"measurement of {full_name}", run, _nothing_more)
        return self._jobs.watch(full_name.lower(), work)

    async def shutdown(self, timeout_s: float) -> None:
        """Cancel all measurements and wait for them, `timeout_s` at most."""
        await self._jobs.shutdown(timeout_s)


async def _nothing_more(_: dict[str, Fidelity]) -> None:
    """A measurement changes nothing that the daemon holds."""


def _canonical(reference: str) -> str:
    """The same text for every way to write the same reference."""
    parsed = ModelRef.parse(reference)
    return parsed.display if parsed.provider == "file" else parsed.display.lower()
