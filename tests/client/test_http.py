from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ohmygpu.client import Address, AsyncClient, ChatOptions, Client
from ohmygpu.core.errors import (
    Busy,
    DaemonError,
    DaemonNotRunning,
    InvalidName,
    ModelNotFound,
    RuntimeFailure,
)
from ohmygpu.core.events import Event
from ohmygpu.runtime_api import Delta, FinishReason, Message, Usage
from tests.cli.fake_daemon import FakeDaemon
from tests.cli.fake_models import install_fake

HI = [Message("user", "hi")]


@pytest.fixture
def client(fake_daemon: FakeDaemon) -> Iterator[Client]:
    with Client(Address(fake_daemon.url)) as client:
        yield client


@pytest.fixture(params=["blocking", "asyncio"])
def chat(request: pytest.FixtureRequest, fake_daemon: FakeDaemon) -> Callable[..., list[Delta]]:
    """The whole answer of either client: both must behave alike."""

    def blocking(options: ChatOptions | None = None) -> list[Delta]:
        with Client(Address(fake_daemon.url)) as client:
            return list(client.chat("org/tiny", HI, options))

    async def collect(options: ChatOptions | None) -> list[Delta]:
        async with AsyncClient(Address(fake_daemon.url)) as client:
            return [delta async for delta in client.chat("org/tiny", HI, options)]

    if request.param == "blocking":
        return blocking
    return lambda options=None: asyncio.run(collect(options))


def test_an_answer_arrives_in_pieces_and_ends_with_reason_and_usage(
    fake_daemon: FakeDaemon, chat: Callable[..., list[Delta]]
) -> None:
    fake_daemon.enqueue("Hé\u2028", "llo\n")  # a line separator that is no end of line here
    *pieces, last = chat(ChatOptions(temperature=0, stop=("x",)))
    assert [delta.text for delta in pieces] == ["Hé\u2028", "llo\n"]
    assert last.finish_reason is FinishReason.STOP
    assert last.usage == Usage(prompt_tokens=7, completion_tokens=2)
    (body,) = fake_daemon.chats()
    assert body["stop"] == ["x"]
    assert body["stream_options"] == {"include_usage": True}


def test_an_error_before_the_answer_keeps_code_and_details(
    fake_daemon: FakeDaemon, chat: Callable[..., list[Delta]]
) -> None:
    fake_daemon.enqueue(refusal=Busy("the queue is full", retry_after_s=3), status=503)
    with pytest.raises(Busy, match="queue is full") as caught:
        chat()
    assert caught.value.retry_after_s == 3


def test_an_error_inside_the_stream_is_raised(
    fake_daemon: FakeDaemon, chat: Callable[..., list[Delta]]
) -> None:
    fake_daemon.enqueue("Half", error=RuntimeFailure("the worker died"))
    with pytest.raises(RuntimeFailure, match="worker died"):
        chat()


def test_a_stream_that_ends_without_its_end_is_an_error(
    fake_daemon: FakeDaemon, chat: Callable[..., list[Delta]]
) -> None:
    fake_daemon.enqueue("Half", cut=True)
    with pytest.raises(DaemonError, match="went away"):
        chat()


def test_nobody_at_the_address_is_daemon_not_running() -> None:
    with Client(Address("http://127.0.0.1:1")) as client, pytest.raises(DaemonNotRunning):
        client.models()


def test_closing_the_answer_tells_the_daemon(fake_daemon: FakeDaemon, client: Client) -> None:
    fake_daemon.enqueue("One", "two", hold_after=1)
    with contextlib.closing(client.chat("org/tiny", HI)) as deltas:
        assert next(deltas).text == "One"
    assert fake_daemon.client_left.wait(10)
    fake_daemon.enqueue("again")
    assert [delta.text for delta in client.chat("org/tiny", HI)] == ["again", ""]


async def test_cancelling_the_answer_tells_the_daemon(fake_daemon: FakeDaemon) -> None:
    fake_daemon.enqueue("One", "two", hold_after=1)

    async def ask() -> None:
        async with AsyncClient(Address(fake_daemon.url)) as client:
            async for _ in client.chat("org/tiny", HI):
                pass

    task = asyncio.create_task(ask())
    assert await asyncio.to_thread(fake_daemon.holding.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(fake_daemon.client_left.wait, 10)


async def test_both_clients_read_the_same_models(
    home: Path, fake_daemon: FakeDaemon, client: Client
) -> None:
    model = install_fake(home)
    fake_daemon.models.append(model)
    async with AsyncClient(Address(fake_daemon.url)) as other:
        assert await other.models() == await asyncio.to_thread(client.models)
        assert (await other.health()).models == ()
    (found,) = await asyncio.to_thread(client.models)
    assert found == replace(model, location=None)


def test_names_with_slashes_and_colons_are_quoted(
    home: Path, fake_daemon: FakeDaemon, client: Client
) -> None:
    fake_daemon.models.append(install_fake(home, "org/tiny"))
    assert client.model("org/tiny:q8").record.name == "org/tiny"
    with pytest.raises(ModelNotFound) as caught:
        client.model("org/tin?y#/../x")
    assert caught.value.details["suggestions"] == ["org/tiny"]
    assert fake_daemon.requests[-1][1] == "/v1/models/org/tin?y#/../x"
    with pytest.raises(InvalidName):
        client.model(" ")


def test_a_pull_yields_its_events_and_raises_its_error(
    fake_daemon: FakeDaemon, client: Client
) -> None:
    done = Event("done", name="org/tiny")
    bar = Event("download", "m", done_bytes=1, total_bytes=2, file="f", sha256="a" * 64)
    fake_daemon.pulls.append([bar.to_dict(), done.to_dict()])
    assert list(client.pull("org/tiny")) == [bar, done]
    error = ModelNotFound("no such repository", suggestions=["org/tiny"])
    fake_daemon.pulls.append([Event("error", error=error).to_dict()])
    with pytest.raises(ModelNotFound) as caught:
        list(client.pull("org/tinny"))
    assert caught.value.details == {"suggestions": ["org/tiny"]}
    fake_daemon.pulls.append([bar.to_dict()])
    with pytest.raises(DaemonError, match="went away"):
        list(client.pull("org/tiny"))


def test_managing_models_reports_what_happened(
    home: Path, fake_daemon: FakeDaemon, client: Client
) -> None:
    fake_daemon.models.append(install_fake(home))
    assert client.unload("org/tiny") is True
    assert client.remove("org/tiny") == 138_000_000
    assert client.gc(sources=True)["freed_bytes"] == 5_000_000
    with pytest.raises(ModelNotFound):
        client.unload("org/tiny")
