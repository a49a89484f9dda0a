"""ModelManager: which models are loaded, for whom, and for how long.

A loaded model is an `Entry`, keyed by its compiled content. States go one way:

    loading → ready → closing          a request pins its entry (`users`) from `acquire` to the end

An entry leaves the table the moment it starts closing (or its worker is found dead), so the next
request makes a fresh one; loads run one at a time, and wait for what is closing to give its memory
back. All methods run on one asyncio loop; all times are monotonic.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from ohmygpu.core.errors import (
    Busy,
    Conflict,
    CorruptFile,
    OhMyGPUError,
    OutOfMemory,
    RuntimeFailure,
)
from ohmygpu.core.records import InstallRecord, RunSpec
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import Settings, parse_duration
from ohmygpu.core.sizes import human_bytes
from ohmygpu.runtime_api import Delta, GenerateRequest, RuntimeCaps

from .cards import ModelCard, read_card
from .loaded import Entry, Lease, LoadedModel, ManagedRuntime, estimate_bytes, run_spec

ROOM_TIMEOUT_S = 30.0  # how long a load waits for a busy model to become idle
REMOVE_TIMEOUT_S = 30.0  # how long a removal waits for running requests

_logger = logging.getLogger("ohmygpu.models")


class ModelManager:
    """Loads models on first use, keeps them while they are wanted, and makes room for others.

    `make_runtime` builds the runtime of a RunSpec; `free_bytes` tells how much memory a new model
    may take now.
    """

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        make_runtime: Callable[[RunSpec], ManagedRuntime],
        free_bytes: Callable[[], int],
    ) -> None:
        self.settings = settings
        self.repository = repository
        self._make_runtime = make_runtime
        self._free_bytes = free_bytes
        self._keep_alive_s = parse_duration(settings.models.keep_alive)
        self._entries: dict[str, Entry] = {}
        self._closing: set[Entry] = set()
        self._removing: set[str] = set()
        self._load_lock = asyncio.Lock()
        self._changed = asyncio.Event()  # an entry became idle or finished closing
        self._shutting_down = False

    # what is installed

    def card(self, name: str) -> ModelCard:
        """The installed model of that name. Raises ModelNotFound, InvalidName or CorruptFile."""
        return self._read(self.repository.find(name))

    def cards(self) -> list[ModelCard]:
        """All installed models, newest first; a damaged one is left out and logged."""
        cards = []
        for record in self.repository.records():
            try:
                cards.append(self._read(record))
            except OhMyGPUError as error:
                _logger.warning("%s is not listed: %s", record.full_name, error.message)
        return sorted(cards, key=lambda card: card.installed_at, reverse=True)

    def _read(self, record: InstallRecord) -> ModelCard:
        return read_card(record, self.repository.compiled_path(record.compiled_key))

    # what is loaded

    @contextlib.asynccontextmanager
    async def acquire(
        self, card: ModelCard, keep_alive_s: float | None = None
    ) -> AsyncIterator[Lease]:
        """The loaded model, pinned until the block ends.

        The first request loads it and later ones share that load; a load ends when all who wait for
        it have left. `keep_alive_s` (None: as before, else the setting) replaces the model's value:
        how long it stays after its last request, inf for ever, 0 not at all. Raises what loading
        raises, Busy or OutOfMemory when there is no room, Conflict when it is being removed.
        """
        started = time.monotonic()
        entry = self._enter(card, keep_alive_s)
        try:
            caps = await asyncio.shield(entry.loaded)
            yield Lease(entry.runtime, caps, time.monotonic() - started)
        finally:
            self._leave(entry)

    async def generate(
        self,
        card: ModelCard,
        request: GenerateRequest,
        keep_alive_s: float | None = None,
        on_load: Callable[[float], None] = lambda load_s: None,
    ) -> AsyncGenerator[Delta, None]:
        """Acquire and generate; closing it frees the slot. `on_load` is told the load's seconds."""
        async with self.acquire(card, keep_alive_s) as lease:
            on_load(lease.load_s)
            async with contextlib.aclosing(lease.runtime.generate(request)) as deltas:
                async for delta in deltas:
                    yield delta

    async def loaded(self) -> list[LoadedModel]:
        """What is loaded or loading, with a snapshot of each."""
        entries = [entry for entry in self._entries.values() if entry.usable]
        statuses = await asyncio.gather(*(entry.runtime.health() for entry in entries))
        now = time.monotonic()
        return [
            LoadedModel(
                card=entry.card,
                caps=entry.loaded.result() if entry.state == "ready" else None,
                status=status,
                users=entry.users,
                keep_alive_s=entry.keep_alive_s,
                expires_in_s=entry.expires_in_s(now),
            )
            for entry, status in zip(entries, statuses, strict=True)
        ]

    async def unload(self, name: str) -> bool:
        """Unload a model; while it is in use, as soon as it is not. True when it is gone now."""
        record = self.repository.find(name)
        entry = self._entries.get(record.compiled_key)
        if entry is None:
            return True
        entry.keep_alive_s = 0.0
        if entry.users:
            return False
        await self._close(entry)
        return True

    @contextlib.asynccontextmanager
    async def removing(self, name: str) -> AsyncIterator[str]:
        """The full name of a model nobody uses, and nobody can start to use, within the block.

        Waits for running requests. Raises Conflict when they take too long, ModelNotFound.
        """
        try:
            record = self.repository.find(name)
        except CorruptFile:  # cannot be in use, and removing it is how it is got rid of
            yield name
            return
        if record.full_name in self._removing:
            raise Conflict(f"{record.full_name} is already being removed")
        self._removing.add(record.full_name)
        try:
            await self._end_use(record)
            yield record.full_name
        finally:
            self._removing.discard(record.full_name)

    async def refresh(self) -> None:
        """Let go of loaded models whose files are no longer those of an installed model."""
        current = {record.compiled_key for record in self.repository.records()}
        for entry in list(self._entries.values()):
            if entry.key not in current:
                entry.stale = True
                if entry.idle:
                    await self._close(entry)

    async def shutdown(self) -> None:
        """Unload everything, ending requests that still run, and refuse new ones."""
        self._shutting_down = True
        for entry in list(self._entries.values()):
            self._start_closing(entry)
        await self._settled()

    # one entry's life

    def _enter(self, card: ModelCard, keep_alive_s: float | None) -> Entry:
        if self._shutting_down:
            raise Busy("the daemon is shutting down", retry_after_s=5)
        if card.record.full_name in self._removing:
            raise Conflict(f"{card.record.full_name} is being removed")
        entry = self._entries.get(card.record.compiled_key)
        if entry is not None and not entry.usable:
            self._start_closing(entry)
            entry = None
        if entry is None:
            entry = self._start_loading(card)
        if keep_alive_s is not None:
            entry.keep_alive_s = keep_alive_s
        entry.users += 1
        entry.disarm()
        return entry

    def _leave(self, entry: Entry) -> None:
        entry.users -= 1
        entry.last_used = time.monotonic()
        if entry.users:
            return
        self._changed.set()
        if entry.state == "loading" or (entry.state == "ready" and not entry.usable):
            self._start_closing(entry)
        elif entry.state == "ready":
            self._arm(entry)

    def _arm(self, entry: Entry) -> None:
        """Start the idle timer."""
        if entry.stale or entry.keep_alive_s <= 0:
            self._start_closing(entry)
        elif not math.isinf(entry.keep_alive_s):
            loop = asyncio.get_running_loop()
            entry.expires_at = entry.last_used + entry.keep_alive_s
            entry.timer = loop.call_later(entry.keep_alive_s, self._start_closing, entry)

    def _start_loading(self, card: ModelCard) -> Entry:
        entry = Entry(
            card=card,
            runtime=self._make_runtime(run_spec(card, self.settings)),
            keep_alive_s=self._keep_alive_s,
            loaded=asyncio.get_running_loop().create_future(),
            last_used=time.monotonic(),
        )
        self._entries[entry.key] = entry
        entry.tasks.append(asyncio.create_task(self._load(entry)))
        return entry

    async def _load(self, entry: Entry) -> None:
        try:
            async with self._load_lock:
                await self._make_room(entry)
                started = time.monotonic()
                caps = await self._load_or_evict(entry)
        except asyncio.CancelledError:
            entry.fail(Conflict(f"{entry.card.name} was unloaded while it was loading"))
            await entry.runtime.unload()
            raise
        except OhMyGPUError as error:
            self._forget(entry)
            entry.fail(error)
        except Exception:
            _logger.exception("%s cannot be loaded", entry.card.name)
            self._forget(entry)
            entry.fail(RuntimeFailure(f"{entry.card.name} cannot be loaded; see daemon.log"))
        else:
            entry.state = "ready"
            entry.loaded.set_result(caps)
            _logger.info("%s loaded in %.2f s", entry.card.name, time.monotonic() - started)

    async def _load_or_evict(self, entry: Entry) -> RuntimeCaps:
        """Load; when memory is short after all, evict what is idle and try once more."""
        try:
            return await entry.runtime.load()
        except OutOfMemory:
            idle = [other for other in self._entries.values() if other.idle]
            if not idle:
                raise
            for other in idle:
                self._start_closing(other)
            await self._settled()
            return await entry.runtime.load()

    def _forget(self, entry: Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        entry.state = "closing"
        self._changed.set()

    def _start_closing(self, entry: Entry) -> None:
        """Take the entry out of the table and unload it in the background; idempotent."""
        if entry.state == "closing":
            return
        loading = entry.tasks[0] if entry.state == "loading" else None
        entry.disarm()
        self._forget(entry)
        self._closing.add(entry)
        entry.tasks.append(asyncio.create_task(self._finish_closing(entry, loading)))

    async def _finish_closing(self, entry: Entry, loading: asyncio.Task[None] | None) -> None:
        try:
            if loading is not None:
                loading.cancel()  # unloads, too
                await asyncio.wait({loading})
                entry.fail(Conflict(f"{entry.card.name} was unloaded while it was loading"))
            await entry.runtime.unload()
            _logger.info("%s unloaded", entry.card.name)
        except Exception:
            _logger.exception("%s could not be unloaded cleanly", entry.card.name)
        finally:
            self._closing.discard(entry)
            self._changed.set()

    async def _close(self, entry: Entry) -> None:
        self._start_closing(entry)
        await self._wait_until(lambda: entry not in self._closing)

    # room for one more

    async def _make_room(self, entry: Entry) -> None:
        """Evict least recently used idle models until `entry` fits. Raises Busy or OutOfMemory."""
        deadline = time.monotonic() + ROOM_TIMEOUT_S
        while True:
            await self._settled()
            others = [other for other in self._entries.values() if other.state == "ready"]
            obstacle = self._obstacle(entry, len(others))
            if obstacle is None:
                return
            idle = [other for other in others if other.idle]
            if idle:
                victim = min(idle, key=lambda other: other.last_used)
                _logger.info("%s makes room for %s", victim.card.name, entry.card.name)
                await self._close(victim)
            elif not others:
                if isinstance(obstacle, OutOfMemory) and not _fits_tightly(entry, obstacle):
                    raise obstacle
                return  # the weights fit: a shorter context than the estimate's will do
            elif not await self._wait_until(self._any_idle, deadline):
                if isinstance(obstacle, OutOfMemory) and _fits_tightly(entry, obstacle):
                    return
                raise obstacle if isinstance(obstacle, Busy) else _no_room(entry, obstacle)

    def _obstacle(self, entry: Entry, others: int) -> OhMyGPUError | None:
        most = self.settings.models.max_loaded
        if most and others >= most:
            return Busy(
                f"{entry.card.name} cannot be loaded now: models.max_loaded is {most} and all "
                "loaded models are in use",
                retry_after_s=5,
            )
        needed, free = estimate_bytes(entry.card, self.settings), self._free_bytes()
        if needed > free:
            return OutOfMemory(
                f"{entry.card.name} needs about {human_bytes(needed)} of memory and "
                f"{human_bytes(free)} are free; close other programs, or use a smaller model or "
                "recipe",
                needed_bytes=needed,
                free_bytes=free,
            )
        return None

    def _any_idle(self) -> bool:
        return any(entry.idle for entry in self._entries.values())

    async def _settled(self) -> None:
        await self._wait_until(lambda: not self._closing)

    async def _end_use(self, record: InstallRecord) -> None:
        entry = self._entries.get(record.compiled_key)
        if entry is None or entry.card.record.full_name != record.full_name:
            return
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        if not await self._wait_until(lambda: entry.users == 0, deadline):
            raise Conflict(f"{record.full_name} is in use by {entry.users} requests; try later")
        await self._close(entry)

    async def _wait_until(
        self, condition: Callable[[], bool], deadline: float | None = None
    ) -> bool:
        """Wait until `condition` holds; False when it does not by `deadline`."""
        while not condition():
            self._changed.clear()
            try:
                async with asyncio.timeout(
                    None if deadline is None else max(0.0, deadline - time.monotonic())
                ):
                    await self._changed.wait()
            except TimeoutError:
                return condition()
        return True


def _fits_tightly(entry: Entry, obstacle: OutOfMemory) -> bool:
    return entry.card.compiled.weights_bytes <= int(obstacle.details["free_bytes"])


def _no_room(entry: Entry, obstacle: OhMyGPUError) -> Busy:
    return Busy(
        f"there is no memory for {entry.card.name} beside the models in use; try again later",
        retry_after_s=10,
        **obstacle.details,
    )
