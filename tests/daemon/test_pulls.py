from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from ohmygpu.core.errors import Cancelled, InvalidName, NetworkError, OhMyGPUError
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.fidelity import Fidelity
from ohmygpu.core.records import InstallRecord
from ohmygpu.daemon.pull_wire import checked_reference, raising, to_status
from ohmygpu.daemon.pulls import Pulls, Verifications
from tests.daemon.fakes import install_model


class FakePull:
    """A pull that goes on when it is told to."""

    def __init__(self, record: InstallRecord) -> None:
        self.record = record
        self.calls: list[tuple[str, str | None, str | None]] = []
        self.verified: list[bool] = []
        self.go = threading.Event()
        self.cancelled = threading.Event()
        self.error: Exception | None = None

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
        self.calls.append((reference, name, recipe))
        self.verified.append(verify)
        sink(Event("resolve"))
        for done in range(100):
            sink(Event("download", done_bytes=done, total_bytes=100))
        while not self.go.wait(0.005):
            if cancel.is_set():
                self.cancelled.set()
                raise Cancelled("cancelled")
        if self.error is not None:
            sink(Event("error", error=OhMyGPUError("reported twice")))
            raise self.error
        sink(Event("done", name=reference))
        return self.record


class Setup:
    def __init__(self, home: Path) -> None:
        self.pull = FakePull(install_model(home, "org/m"))
        self.installed: list[InstallRecord] = []
        self.pulls = Pulls(self.pull, self.on_installed)

    async def on_installed(self, record: InstallRecord) -> None:
        self.installed.append(record)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


async def until(events: AsyncGenerator[Event, None], phase: str) -> Event:
    async for event in events:
        if event.phase == phase:
            return event
    raise AssertionError(f"no {phase} event")


async def test_a_pull_reports_its_phases_and_one_done_last(setup: Setup) -> None:
    setup.pull.go.set()
    events = [event async for event in setup.pulls.watch("org/m", recipe="q8")]
    assert [event.phase for event in events if event.phase != "download"] == ["resolve", "done"]
    assert events[-1].name == "org/m"
    assert setup.pull.calls == [("org/m", None, "q8")]
    assert setup.installed == [setup.pull.record]


async def test_progress_that_nobody_took_is_replaced_by_the_newest(setup: Setup) -> None:
    watcher = setup.pulls.watch("org/m")
    assert (await anext(watcher)).phase == "resolve"
    setup.pull.go.set()
    late = setup.pulls.watch("org/m")
    await until(late, "done")
    rest = [event async for event in watcher]
    assert len(rest) <= 100
    assert rest[-1].phase == "done"


async def test_two_watchers_share_one_pull_and_one_may_leave(setup: Setup) -> None:
    first, second = setup.pulls.watch("org/m"), setup.pulls.watch("hf.co/ORG/m")
    await until(first, "download")
    await until(second, "download")
    await first.aclose()
    assert not setup.pull.cancelled.is_set()
    setup.pull.go.set()
    assert (await until(second, "done")).name == "org/m"
    assert len(setup.pull.calls) == 1


async def test_the_pull_is_cancelled_when_the_last_watcher_leaves_and_can_be_pulled_again(
    setup: Setup,
) -> None:
    watcher = setup.pulls.watch("org/m")
    await until(watcher, "download")
    await watcher.aclose()
    again = setup.pulls.watch("org/m")
    setup_go = asyncio.create_task(until(again, "done"))
    assert await asyncio.to_thread(setup.pull.cancelled.wait, 5)
    setup.pull.go.set()
    await setup_go
    assert len(setup.pull.calls) == 2


async def test_different_models_are_pulled_at_the_same_time(setup: Setup) -> None:
    first, second = setup.pulls.watch("org/m"), setup.pulls.watch("org/n")
    await until(first, "download")
    await until(second, "download")
    assert len(setup.pull.calls) == 2
    setup.pull.go.set()
    await until(first, "done")
    await until(second, "done")


async def test_a_failed_pull_is_one_error_event(setup: Setup) -> None:
    setup.pull.error = NetworkError("no network")
    setup.pull.go.set()
    events = [event async for event in setup.pulls.watch("org/m")]
    errors = [event for event in events if event.phase == "error"]
    assert len(errors) == 1
    assert isinstance(errors[0].error, NetworkError)
    assert setup.installed == []
    with pytest.raises(NetworkError):
        _ = [event async for event in raising(setup.pulls.watch("org/m"))]


async def test_an_unforeseen_failure_tells_no_internals(setup: Setup) -> None:
    setup.pull.error = ZeroDivisionError("/secret/path")
    setup.pull.go.set()
    last = await until(setup.pulls.watch("org/m"), "error")
    assert last.error is not None
    assert "secret" not in last.error.message
    assert "daemon.log" in last.error.message


async def test_shutdown_cancels_pulls_and_tells_their_watchers(setup: Setup) -> None:
    watcher = setup.pulls.watch("org/m")
    await until(watcher, "download")
    await setup.pulls.shutdown(5)
    assert setup.pull.cancelled.is_set()
    assert isinstance((await until(watcher, "error")).error, Cancelled)


async def test_shutdown_does_not_wait_for_a_pull_that_is_stuck(tmp_path: Path) -> None:
    stuck = threading.Event()

    def pull(reference: str, **_: object) -> InstallRecord:
        stuck.wait()
        raise Cancelled("at last")

    async def on_installed(_: InstallRecord) -> None:
        raise AssertionError("nothing was installed")

    pulls = Pulls(pull, on_installed)
    watching = asyncio.create_task(until(pulls.watch("org/m"), "error"))
    await asyncio.sleep(0)
    await pulls.shutdown(0.01)
    assert not watching.done()
    stuck.set()
    await watching


async def test_a_measurement_is_shared_and_stops_when_the_last_watcher_leaves() -> None:
    calls: list[str] = []
    stopped = threading.Event()

    def verify(name: str, *, sink: EventSink, cancel: threading.Event) -> dict[str, Fidelity]:
        calls.append(name)
        sink(Event("measure", done_bytes=1, total_bytes=2))
        cancel.wait()
        stopped.set()
        raise Cancelled("cancelled")

    verifications = Verifications(verify)
    first, second = verifications.watch("org/m:q8"), verifications.watch("Org/m:q8")
    await until(first, "measure")
    await until(second, "measure")
    await first.aclose()
    assert not stopped.is_set()
    await second.aclose()
    assert await asyncio.to_thread(stopped.wait, 5)
    assert calls == ["org/m:q8"]


async def test_shutdown_cancels_a_measurement_and_tells_its_watcher() -> None:
    def verify(name: str, *, sink: EventSink, cancel: threading.Event) -> dict[str, Fidelity]:
        sink(Event("measure"))
        cancel.wait()
        raise Cancelled(f"the measurement of {name} was cancelled")

    verifications = Verifications(verify)
    watcher = verifications.watch("org/m:q8")
    await until(watcher, "measure")
    await verifications.shutdown(5)
    assert isinstance((await until(watcher, "error")).error, Cancelled)


def test_a_relative_path_means_nothing_to_the_daemon() -> None:
    assert checked_reference(" org/name:q4 ") == "org/name:q4"
    assert checked_reference("/models/a.gguf") == "/models/a.gguf"
    assert checked_reference("file:/models/a.gguf") == "file:/models/a.gguf"
    for reference in ("./a.gguf", "a.gguf", "../folder", "file:a.gguf", "~/a.gguf"):
        with pytest.raises(InvalidName, match="absolute"):
            checked_reference(reference)


def test_events_become_ollamas_statuses() -> None:
    digest = "74701a8c35f6" + "0" * 52
    download = Event("download", file="a.gguf", sha256=digest, done_bytes=5, total_bytes=10)
    assert to_status(Event("resolve")) == [{"status": "pulling manifest"}]
    assert to_status(download) == [
        {
            "status": "pulling 74701a8c35f6",
            "digest": f"sha256:{digest}",
            "total": 10,
            "completed": 5,
        }
    ]
    assert to_status(Event("compile", done_bytes=0, total_bytes=10)) == [
        {"status": "compiling model", "total": 10}
    ]
    assert to_status(Event("verify")) == [{"status": "verifying sha256 digest"}]
    assert to_status(Event("done"))[-1] == {"status": "success"}
