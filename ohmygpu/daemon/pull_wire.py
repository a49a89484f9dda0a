"""Pulls on the wire: what may be asked for, and Ollama's words for our events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import PurePath
from typing import Any

from ohmygpu.core.errors import InvalidName, OhMyGPUError
from ohmygpu.core.events import Event
from ohmygpu.core.refs import ModelRef

_SHORT_DIGEST = 12  # hex digits of a digest that Ollama's clients show


def checked_reference(text: str) -> str:
    """`text` when it is a reference with the same meaning for us as for the client.

    Raises InvalidName for what is no reference, and for a relative path: the client's working
    directory is not ours.
    """
    reference = ModelRef.parse(text)
    path = text.strip().removeprefix("file:")
    if reference.provider == "file" and not PurePath(path).is_absolute():
        raise InvalidName("send the absolute path of the file or folder to pull", name=text)
    return text.strip()


async def raising(events: AsyncIterator[Event]) -> AsyncGenerator[Event, None]:
    """The events of a pull; its `error` event is raised instead."""
    async for event in events:
        if event.phase == "error":
            raise event.error or OhMyGPUError(event.message)
        yield event


def to_status(event: Event) -> list[dict[str, Any]]:
    """Ollama's status lines for one event."""
    match event.phase:
        case "resolve":
            return [{"status": "pulling manifest"}]
        case "download":
            return [_progress("pulling", event)]
        case "verify":
            return [{"status": "verifying sha256 digest"}]
        case "compile":
            return [_progress("compiling", event)]
        case "done":
            return [{"status": "writing manifest"}, {"status": "success"}]
        case _:
            return []


def _progress(verb: str, event: Event) -> dict[str, Any]:
    digest = event.sha256 or ""
    subject = digest[:_SHORT_DIGEST] or event.file or "model"
    line: dict[str, Any] = {"status": f"{verb} {subject}"}
    if digest:
        line["digest"] = f"sha256:{digest}"
    if event.total_bytes:
        line["total"] = event.total_bytes
    if event.done_bytes:
        line["completed"] = event.done_bytes
    return line
