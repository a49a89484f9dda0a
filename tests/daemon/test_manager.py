from __future__ import annotations

import asyncio
import math
import shutil
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.errors import (
    Busy,
    Conflict,
    CorruptFile,
    ModelNotFound,
    OutOfMemory,
    RuntimeFailure,
)
from ohmygpu.core.repository import Repository
from ohmygpu.daemon.loaded import estimate_bytes
from ohmygpu.daemon.manager import ModelManager
from ohmygpu.runtime_api import GenerateRequest, SamplingParams
from tests.daemon.fakes import END, GIB, Runtimes, install_model, settings_of

REQUEST = GenerateRequest(sampling=SamplingParams(), prompt="hi")


class Setup:
    """A manager over fake runtimes, with as much free memory as a test says."""

    def __init__(self, home: Path, **models: Any) -> None:
        self.home = home
        self.runtimes = Runtimes()
        self.free_bytes = 100 * GIB
        self.manager = ModelManager(
            settings_of(home, models=models),
            Repository(home),
            self.runtimes,
            lambda: self.free_bytes,
        )

    async def use(self, name: str, keep_alive_s: float | None = None) -> None:
        async with self.manager.acquire(self.manager.card(name), keep_alive_s):
            pass

    async def loaded_names(self) -> list[str]:
        return [model.card.name for model in await self.manager.loaded()]

    async def settled(self) -> None:
        """Until everything that is being unloaded is unloaded."""
        await self.manager._settled()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    for name in ("org/a", "org/b", "org/c"):
        install_model(tmp_path, name)
    return Setup(tmp_path)


async def test_concurrent_first_requests_share_one_load(setup: Setup) -> None:
    setup.runtimes.may_load.clear()
    uses = [asyncio.create_task(setup.use("org/a")) for _ in range(5)]
    await asyncio.sleep(0)
    setup.runtimes.may_load.set()
    await asyncio.gather(*uses)
    assert setup.runtimes.loads == ["org/a:latest"]
    await setup.use("ORG/A:latest")
    assert len(setup.runtimes.loads) == 1


async def test_a_failed_load_is_told_to_all_who_wait_and_tried_again_by_the_next(
    setup: Setup,
) -> None:
    setup.runtimes.may_load.clear()
    setup.runtimes.load_errors.append(CorruptFile("damaged"))
    uses = [asyncio.create_task(setup.use("org/a")) for _ in range(2)]
    await asyncio.sleep(0)
    setup.runtimes.may_load.set()
    for result in await asyncio.gather(*uses, return_exceptions=True):
        assert isinstance(result, CorruptFile)
    assert await setup.loaded_names() == []
    await setup.use("org/a")
    assert await setup.loaded_names() == ["org/a:latest"]


async def test_an_unforeseen_load_failure_is_a_runtime_failure(setup: Setup) -> None:
    setup.runtimes.load_errors.append(ZeroDivisionError())
    with pytest.raises(RuntimeFailure, match=r"daemon\.log"):
        await setup.use("org/a")


async def test_a_load_goes_on_while_somebody_waits_and_ends_when_all_have_left(
    setup: Setup,
) -> None:
    setup.runtimes.may_load.clear()
    first, second = (asyncio.create_task(setup.use("org/a")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    assert await setup.loaded_names() == ["org/a:latest"]
    second.cancel()
    await asyncio.wait({second})
    await setup.settled()
    assert await setup.loaded_names() == []
    assert setup.runtimes.made[0].unloads > 0
    setup.runtimes.may_load.set()
    await setup.use("org/a")
    assert len(setup.runtimes.made) == 2


async def test_a_model_in_use_is_pinned_and_its_timer_starts_when_the_last_request_ends(
    setup: Setup,
) -> None:
    card = setup.manager.card("org/a")
    async with setup.manager.acquire(card, 30):
        async with setup.manager.acquire(card):
            (row,) = await setup.manager.loaded()
            assert (row.users, row.expires_in_s) == (2, None)
        (row,) = await setup.manager.loaded()
        assert (row.users, row.expires_in_s) == (1, None)
    (row,) = await setup.manager.loaded()
    assert row.users == 0
    assert row.expires_in_s is not None
    assert 29 < row.expires_in_s <= 30


async def test_a_later_keep_alive_replaces_the_earlier_and_none_leaves_it(setup: Setup) -> None:
    await setup.use("org/a", 1000)
    await setup.use("org/a")
    assert (await setup.manager.loaded())[0].keep_alive_s == 1000
    await setup.use("org/a", 20)
    assert (await setup.manager.loaded())[0].keep_alive_s == 20


async def test_keep_alive_zero_unloads_after_the_request(setup: Setup) -> None:
    await setup.use("org/a", 0)
    await setup.settled()
    assert setup.runtimes.unloaded == ["org/a:latest"]
    assert await setup.loaded_names() == []


async def test_keep_alive_for_ever_has_no_timer(setup: Setup) -> None:
    await setup.use("org/a", math.inf)
    assert (await setup.manager.loaded())[0].expires_in_s == math.inf


async def test_an_idle_model_unloads_when_its_time_is_over(setup: Setup) -> None:
    await setup.use("org/a", 0.01)
    async with asyncio.timeout(60):
        await setup.runtimes.stopping.wait()
    assert await setup.loaded_names() == []


async def test_the_setting_says_how_long_models_stay(tmp_path: Path) -> None:
    install_model(tmp_path, "org/a")
    setup = Setup(tmp_path, keep_alive="1h30m")
    await setup.use("org/a")
    assert (await setup.manager.loaded())[0].keep_alive_s == 5400


async def test_the_least_recently_used_idle_model_makes_room(setup: Setup) -> None:
    setup.manager.settings = settings_of(setup.home, models={"max_loaded": 2})
    await setup.use("org/a")
    await setup.use("org/b")
    await setup.use("org/a")
    await setup.use("org/c")
    assert setup.runtimes.unloaded == ["org/b:latest"]
    assert sorted(await setup.loaded_names()) == ["org/a:latest", "org/c:latest"]


async def test_idle_models_are_evicted_until_the_new_one_fits_in_memory(setup: Setup) -> None:
    needed = estimate_bytes(setup.manager.card("org/a"), setup.manager.settings)
    runtimes = setup.runtimes

    def room_for_two() -> int:
        return needed * (2 - (len(runtimes.loads) - len(runtimes.unloaded)))

    manager = ModelManager(setup.manager.settings, setup.manager.repository, runtimes, room_for_two)
    for name in ("org/a", "org/b", "org/c"):
        async with manager.acquire(manager.card(name)):
            pass
    assert runtimes.unloaded == ["org/a:latest"]


def test_a_context_beyond_the_models_own_takes_no_more_memory(setup: Setup) -> None:
    card = setup.manager.card("org/a")
    own = card.compiled.context_length
    settings = setup.manager.settings
    needed = {
        estimate_bytes(
            card, replace(settings, engine=replace(settings.engine, context_tokens=tokens))
        )
        for tokens in (own, own + 1, 2**31 - 1)
    }
    assert len(needed) == 1


async def test_a_model_larger_than_the_memory_is_refused_with_both_numbers(setup: Setup) -> None:
    setup.free_bytes = 500
    with pytest.raises(OutOfMemory) as caught:
        await setup.use("org/a")
    assert caught.value.details["free_bytes"] == 500
    assert caught.value.details["needed_bytes"] > 1000
    setup.free_bytes = 1001  # the weights fit, a full context would not
    await setup.use("org/a")


async def test_a_load_waits_for_a_busy_model_to_become_idle(setup: Setup) -> None:
    setup.manager.settings = settings_of(setup.home, models={"max_loaded": 1})
    async with setup.manager.acquire(setup.manager.card("org/a")):
        waiting = asyncio.create_task(setup.use("org/b"))
        await asyncio.sleep(0.01)
        assert setup.runtimes.unloaded == []
    await waiting
    assert setup.runtimes.unloaded == ["org/a:latest"]


async def test_a_load_that_waits_too_long_for_room_is_busy(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ohmygpu.daemon.manager.ROOM_TIMEOUT_S", 0.0)
    setup.manager.settings = settings_of(setup.home, models={"max_loaded": 1})
    async with setup.manager.acquire(setup.manager.card("org/a")):
        with pytest.raises(Busy, match="max_loaded") as caught:
            await setup.use("org/b")
        assert caught.value.retry_after_s
    setup.manager.settings = settings_of(setup.home)
    async with setup.manager.acquire(setup.manager.card("org/a")):
        setup.free_bytes = 10
        with pytest.raises(Busy, match="memory"):
            await setup.use("org/b")


async def test_memory_short_after_all_evicts_what_is_idle_and_tries_once_more(
    setup: Setup,
) -> None:
    await setup.use("org/a")
    setup.runtimes.load_errors.append(OutOfMemory("no"))
    await setup.use("org/b")
    assert setup.runtimes.unloaded == ["org/a:latest"]
    setup.runtimes.load_errors.extend([OutOfMemory("no"), OutOfMemory("still no")])
    with pytest.raises(OutOfMemory, match="still no"):
        await setup.use("org/c")


async def test_a_dead_worker_is_replaced_by_the_next_request(setup: Setup) -> None:
    await setup.use("org/a")
    setup.runtimes.made[0].alive = False
    assert await setup.loaded_names() == []
    await setup.use("org/a")
    assert len(setup.runtimes.made) == 2
    assert await setup.loaded_names() == ["org/a:latest"]


async def test_a_dead_workers_other_requests_still_end_in_order(setup: Setup) -> None:
    card = setup.manager.card("org/a")
    async with setup.manager.acquire(card):
        setup.runtimes.made[0].alive = False
        await setup.use("org/a")
    await setup.settled()
    assert await setup.loaded_names() == ["org/a:latest"]


async def test_unload_is_at_once_when_idle_and_after_the_request_when_not(setup: Setup) -> None:
    assert await setup.manager.unload("org/a")
    await setup.use("org/a")
    assert await setup.manager.unload("org/a")
    assert await setup.loaded_names() == []
    async with setup.manager.acquire(setup.manager.card("org/a")):
        assert not await setup.manager.unload("org/a")
        assert await setup.loaded_names() == ["org/a:latest"]
    await setup.settled()
    assert await setup.loaded_names() == []
    with pytest.raises(ModelNotFound):
        await setup.manager.unload("org/unknown")


async def test_removing_waits_for_running_requests_and_refuses_new_ones(setup: Setup) -> None:
    card = setup.manager.card("org/a")
    removed = asyncio.Event()

    async def remove() -> None:
        async with setup.manager.removing("org/a") as name:
            assert name == "org/a:q8"
            removed.set()

    async with setup.manager.acquire(card):
        removing = asyncio.create_task(remove())
        await asyncio.sleep(0.01)
        assert not removed.is_set()
        with pytest.raises(Conflict):
            await setup.use("org/a")
        with pytest.raises(Conflict):
            async with setup.manager.removing("org/a"):
                pass
    await removing
    assert setup.runtimes.unloaded == ["org/a:latest"]
    await setup.use("org/a")


async def test_removing_gives_up_on_a_request_that_does_not_end(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ohmygpu.daemon.manager.REMOVE_TIMEOUT_S", 0.0)
    async with setup.manager.acquire(setup.manager.card("org/a")):
        with pytest.raises(Conflict, match="in use"):
            async with setup.manager.removing("org/a"):
                pass


async def test_two_names_of_one_compiled_model_share_its_worker(setup: Setup) -> None:
    install_model(setup.home, "other/twin", content="org/a")
    await setup.use("org/a")
    await setup.use("other/twin")
    assert len(setup.runtimes.made) == 1
    async with setup.manager.removing("other/twin"):
        assert await setup.loaded_names() == ["org/a:latest"]


async def test_a_model_pulled_again_serves_new_requests_from_its_new_compile(setup: Setup) -> None:
    card = setup.manager.card("org/a")
    async with setup.manager.acquire(card, math.inf):
        install_model(setup.home, "org/a", content="newer")
        await setup.manager.refresh()
        assert setup.runtimes.unloaded == []
        await setup.use("org/a")
        assert len(setup.runtimes.made) == 2
    await setup.settled()
    assert setup.runtimes.unloaded == ["org/a:latest"]
    assert [entry.spec.folder for entry in setup.runtimes.made if entry.alive] == [
        str(setup.manager.card("org/a").folder)
    ]


async def test_an_idle_model_pulled_again_is_let_go_at_once(setup: Setup) -> None:
    await setup.use("org/a")
    install_model(setup.home, "org/a", content="newer")
    await setup.manager.refresh()
    assert setup.runtimes.unloaded == ["org/a:latest"]


async def test_generate_passes_the_answer_on_and_frees_the_slot_when_closed(setup: Setup) -> None:
    never = asyncio.Event()
    setup.runtimes.enqueue("a", "b", END)
    setup.runtimes.enqueue("a", never, END)
    card = setup.manager.card("org/a")
    loads: list[float] = []
    answer = setup.manager.generate(card, REQUEST, None, loads.append)
    assert "".join([delta.text async for delta in answer]) == "ab"
    assert len(loads) == 1
    async with aclosing(setup.manager.generate(card, REQUEST)) as answer:
        await anext(answer)
        assert setup.runtimes.running == 1
    assert setup.runtimes.running == 0
    assert (await setup.manager.loaded())[0].users == 0


async def test_shutdown_unloads_everything_even_what_is_loading_and_refuses_the_rest(
    setup: Setup,
) -> None:
    await setup.use("org/a")
    setup.runtimes.may_load.clear()
    loading = asyncio.create_task(setup.use("org/b"))
    await asyncio.sleep(0)
    await setup.manager.shutdown()
    with pytest.raises(Conflict):
        await loading
    with pytest.raises(Busy):
        await setup.use("org/c")
    assert "org/a:latest" in setup.runtimes.unloaded
    assert not any(runtime.alive for runtime in setup.runtimes.made)


async def test_a_damaged_model_is_left_out_of_the_list_and_refused_when_asked_for(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(setup.manager.card("org/a").folder)
    assert [card.name for card in setup.manager.cards()] == ["org/b:latest", "org/c:latest"]
    assert "org/a" in caplog.text
    with pytest.raises(CorruptFile):
        setup.manager.card("org/a")


async def test_a_misspelt_name_suggests_the_near_one(setup: Setup) -> None:
    install_model(setup.home, "org/smollm2")
    with pytest.raises(ModelNotFound) as caught:
        setup.manager.card("org/smolm2")
    assert "org/smollm2" in str(caught.value.details["suggestions"])
