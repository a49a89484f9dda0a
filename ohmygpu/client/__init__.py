"""Typed HTTP client of the daemon: the one door for the terminal and MCP.

Names are imported when they are first used: commands that only describe models need no HTTP.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .find import connect, find_daemon, settings_url
    from .http import AsyncClient, Client
    from .nouns import Address, ChatOptions, Health, LoadedModel, ModelInfo

__all__ = [
    "Address",
    "AsyncClient",
    "ChatOptions",
    "Client",
    "Health",
    "LoadedModel",
    "ModelInfo",
    "connect",
    "find_daemon",
    "settings_url",
]

_MODULES = ("nouns", "find", "http")  # the light one first


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = vars(import_module(f".{module}", __name__))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
