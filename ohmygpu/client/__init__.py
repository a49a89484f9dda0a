"""Typed HTTP client of the daemon: the one door for the terminal and MCP."""

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
