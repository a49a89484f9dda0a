"""What is loaded: the bookkeeping of one model, how it runs, and how much memory it takes."""

from __future__ import annotations

import asyncio
import math
from dataclasses import asdict, dataclass, field
from typing import Protocol

from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.core.records import RunSpec
from ohmygpu.core.settings import Settings
from ohmygpu.runtime_api import Runtime, RuntimeCaps, RuntimeStatus

from .cards import ModelCard


class ManagedRuntime(Runtime, Protocol):
    """A Runtime that can tell without waiting whether its model is still there."""

    @property
    def alive(self) -> bool:
        """False before `load`, after `unload` and once its process has died."""
        ...


@dataclass(frozen=True, slots=True)
class Lease:
    """A loaded model, pinned for one request. `load_s`: seconds this request waited for it."""

    runtime: ManagedRuntime
    caps: RuntimeCaps
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """One row of what is loaded. `expires_in_s`: inf = never, None while it loads or is in use."""

    card: ModelCard
    caps: RuntimeCaps | None
    status: RuntimeStatus
    users: int
    keep_alive_s: float
    expires_in_s: float | None


@dataclass(eq=False)
class Entry:
    """One loaded model, or one on its way in or out; see ModelManager for its life."""

    card: ModelCard
    runtime: ManagedRuntime
    keep_alive_s: float
    loaded: asyncio.Future[RuntimeCaps]
    last_used: float
    users: int = 0
    state: str = "loading"  # loading | ready | closing
    stale: bool = False  # its model was pulled again or removed: unload when idle
    expires_at: float | None = None
    timer: asyncio.TimerHandle | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What the manager's table knows it by."""
        return self.card.record.compiled_key

    @property
    def idle(self) -> bool:
        """Loaded, and nobody uses it."""
        return self.state == "ready" and self.users == 0

    @property
    def usable(self) -> bool:
        """Whether a new request may use it: its process may have died since it was loaded."""
        return self.state == "loading" or (self.state == "ready" and self.runtime.alive)

    def expires_in_s(self, now: float) -> float | None:
        """Seconds until it unloads; None while it loads or is in use, inf for never."""
        if self.state != "ready" or self.users:
            return None
        return math.inf if self.expires_at is None else max(0.0, self.expires_at - now)

    def disarm(self) -> None:
        """Stop the idle timer."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None
        self.expires_at = None

    def fail(self, error: OhMyGPUError) -> None:
        """Raise `error` in everybody who waits for the load."""
        if not self.loaded.done():
            self.loaded.set_exception(error)
            self.loaded.exception()  # marks it as seen: nobody waits when the load was given up


def run_spec(card: ModelCard, settings: Settings) -> RunSpec:
    """How to run a model: the engine's settings, all of them."""
    return RunSpec(model=card.name, folder=str(card.folder), **asdict(settings.engine))


def estimate_bytes(card: ModelCard, settings: Settings) -> int:
    """Memory a model takes: its weights and a tenth for buffers, and the KV of one full context.

    KV memory is mapped lazily, so eight slots of short conversations take no more than that.
    """
    compiled = card.compiled
    context_tokens = compiled.served_context_tokens(settings.engine.context_tokens)
    weights_bytes = compiled.weights_bytes
    if settings.engine.prompt_graph != "off":
        weights_bytes += compiled.prompt_bytes
    return weights_bytes * 11 // 10 + context_tokens * compiled.kv_bytes_per_token
