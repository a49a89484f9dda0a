from __future__ import annotations

import asyncio

import pytest

from ohmygpu.core.errors import Busy
from ohmygpu.daemon.mailbox import MAX_PENDING, Mailbox
from ohmygpu.runtime_api import Delta, FinishReason


async def test_a_reader_who_keeps_up_gets_every_delta() -> None:
    box = Mailbox()
    for number in range(100):
        box.put(Delta(text=str(number)))
        assert (await box.get()).text == str(number)


async def test_a_reader_who_falls_behind_gets_merged_text_and_counts() -> None:
    box = Mailbox()
    for _ in range(MAX_PENDING + 50):
        box.put(Delta(text="x", completion_tokens=2))
    received = [await box.get() for _ in range(MAX_PENDING + 1)]
    assert "".join(delta.text for delta in received) == "x" * (MAX_PENDING + 50)
    assert received[-1].completion_tokens == 100
    box.put(Delta(text="y"))
    assert (await box.get()).text == "y"


async def test_the_last_delta_takes_the_merged_text_with_it() -> None:
    box = Mailbox()
    for _ in range(MAX_PENDING + 5):
        box.put(Delta(text="x"))
    box.put(Delta(text="!", finish_reason=FinishReason.LENGTH))
    box.put(Delta(text="ignored"))
    received: list[Delta] = []
    while not received or received[-1].finish_reason is None:
        received.append(await box.get())
    assert len(received) == MAX_PENDING + 1
    assert received[-1].text == "xxxxx!"


async def test_an_error_comes_after_the_text_and_only_once_finished() -> None:
    box = Mailbox()
    box.put(Delta(text="a"))
    box.fail(Busy("full"))
    box.fail(Busy("again"))
    assert (await box.get()).text == "a"
    with pytest.raises(Busy, match="full"):
        await box.get()


async def test_get_waits_for_put() -> None:
    box = Mailbox()
    reading = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    assert not reading.done()
    box.put(Delta(text="a"))
    assert (await reading).text == "a"
