"""Progress events: one small noun, the same in the CLI, over HTTP and between processes.

A pull yields them in order: `resolve`, for a model that has to be exported `prepare` (many, with
bytes while the exporter's environment is made), then `download` (many, one counter over all files),
then `verify`, then `compile` (many), then exactly one `done` or `error`. Where the result is to be
measured, `compile` (the float32 reference) and `measure` (many, counting bytes of text) follow;
measuring an installed model yields `verify` (of its source files) and these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .errors import OhMyGPUError

Phase = Literal["resolve", "prepare", "download", "verify", "compile", "measure", "done", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """One step of progress.

    `done_bytes` and `total_bytes` count the phase as a whole (0 when unknown); `file` and
    `sha256` name the file they concern when it is one file. In the `done` event `name` is the
    installed model's name; an `error` event carries the error.
    """

    phase: Phase
    message: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    file: str | None = None
    sha256: str | None = None
    name: str | None = None
    error: OhMyGPUError | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; empty fields are left out."""
        data: dict[str, Any] = {"phase": self.phase, "message": self.message}
        if self.total_bytes or self.done_bytes:
            data |= {"done_bytes": self.done_bytes, "total_bytes": self.total_bytes}
        for key in ("file", "sha256", "name"):
            value = getattr(self, key)
            if value is not None:
                data[key] = value
        if self.error is not None:
            data["error"] = self.error.to_dict()
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Event:
        """Inverse of `to_dict`."""
        error = data.get("error")
        return Event(
            phase=data["phase"],
            message=data.get("message", ""),
            done_bytes=int(data.get("done_bytes", 0)),
            total_bytes=int(data.get("total_bytes", 0)),
            file=data.get("file"),
            sha256=data.get("sha256"),
            name=data.get("name"),
            error=OhMyGPUError.from_dict(error) if error else None,
        )


EventSink = Callable[[Event], None]
"""Receives events on the thread that does the work; must return quickly and not raise."""
