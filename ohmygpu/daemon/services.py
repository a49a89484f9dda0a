"""What the routes work with, attached to the application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quart import current_app, request

from ohmygpu.core.settings import Settings

from .errors import Family
from .limits import parse_body
from .manager import ModelManager
from .pulls import Pulls, Verifications

EXTENSION = "ohmygpu"


@dataclass(kw_only=True)
class DaemonState:
    """What the process is doing now."""

    url: str
    socket_path: Path | None = None
    started: float = field(default_factory=time.monotonic)
    draining: bool = False  # new work is refused
    requests: int = 0  # in progress
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set when one ends


@dataclass(frozen=True, kw_only=True)
class Services:
    """The daemon's parts. `remove` and `collect_garbage` block: call them on a thread."""

    settings: Settings
    state: DaemonState
    manager: ModelManager
    pulls: Pulls
    verifications: Verifications
    remove: Callable[[str], Any]  # full name → Removed(record, freed_bytes)
    collect_garbage: Callable[[bool], Any]  # sources → GcReport


def services() -> Services:
    """The services of the application that handles the current request."""
    found: Services = current_app.extensions[EXTENSION]
    return found


async def json_body(family: Family, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object the current request sent; with `optional`, {} when it sent nothing."""
    raw = await request.get_data()
    assert isinstance(raw, bytes)
    return {} if optional and not raw else parse_body(raw, family)
