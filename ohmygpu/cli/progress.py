"""Progress of a pull on stderr: one bar at a time on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from ohmygpu.core.events import Event
from ohmygpu.core.sizes import human_bytes

from .output import human_duration, is_terminal, note

LABELS = {
    "prepare": "making the exporter",
    "download": "downloading",
    "verify": "verifying",
    "compile": "compiling",
    "measure": "measuring",
}
_LINE_STEP = 10  # percent between two plain lines of one phase
_LEAST_PERCENT = 5  # moved before a speed means anything: a phase may take a while to begin


class Display(Protocol):
    """Shows the events of one pull."""

    def show(self, event: Event) -> None:
        """Show one event; called for every event in order."""
        ...

    def close(self) -> None:
        """Leave the cursor at the start of a fresh line; idempotent."""
        ...


class Progress:
    """An event sink that shows what it receives; events may come from any thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr
        self._display: Display = BarDisplay(stream) if is_terminal(stream) else LineDisplay()
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        with self._lock:
            self._display.show(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._display.close()


class BarDisplay:
    """A tqdm bar for each phase that counts bytes, a line for each message of those that do not."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bar: Any = None
        self._phase = ""
        self._message = ""

    def show(self, event: Event) -> None:
        """Move the phase's bar, after closing that of another phase."""
        if event.phase in ("done", "error"):
            self.close()
            return
        if event.phase != self._phase:
            self.close()
            self._phase = event.phase
        if event.total_bytes or event.done_bytes:
            self._move(event)
        elif event.message and event.message != self._message and self._bar is None:
            self._message = event.message
            note(event.message)

    def close(self) -> None:
        """End the bar where it stands, and keep it on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _move(self, event: Event) -> None:
        if self._bar is None:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # no thread of its own
            self._bar = tqdm(
                total=event.total_bytes or None,
                initial=event.done_bytes,  # what was there before does not count as speed
                desc=LABELS.get(event.phase, event.phase),
                unit="B",
                unit_scale=True,
                file=self._stream,
                **_width(self._stream),
            )
        if event.total_bytes:
            self._bar.total = event.total_bytes
        step = event.done_bytes - self._bar.n
        if step >= 0:
            self._bar.update(step)
        else:  # a file is fetched anew
            self._bar.n = event.done_bytes
            self._bar.refresh()
        if event.total_bytes and event.done_bytes >= event.total_bytes:
            self._bar.refresh()


def _width(stream: TextIO) -> dict[str, Any]:
    """How wide a bar may be: as the terminal is at each moment, 80 where it does not tell."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}


class LineDisplay:
    """A line when a phase begins, one every few percent, and one when it ends."""

    def __init__(self) -> None:
        self._phase = ""
        self._message = ""
        self._percent = -1
        self._started_s = 0.0
        self._started_bytes = 0

    def show(self, event: Event) -> None:
        """Write a line when there is news."""
        if event.phase in ("done", "error"):
            return
        if event.phase != self._phase:
            self._phase = event.phase
            self._percent = -1
            self._started_s = time.monotonic()
            self._started_bytes = event.done_bytes
        if event.total_bytes:
            self._count(event)
        elif event.message and event.message != self._message:
            self._message = event.message
            note(event.message)

    def close(self) -> None:
        """Nothing is left open: every line ends when it is written."""

    def _count(self, event: Event) -> None:
        percent = min(100, 100 * event.done_bytes // event.total_bytes)
        if self._percent >= 0 and percent // _LINE_STEP <= self._percent // _LINE_STEP:
            return
        self._percent = percent
        label = LABELS.get(event.phase, event.phase)
        amount = f"{human_bytes(event.done_bytes)} of {human_bytes(event.total_bytes)}"
        note(f"{label} {percent}% ({amount}{self._speed(event)})")

    def _speed(self, event: Event) -> str:
        elapsed_s = time.monotonic() - self._started_s
        moved = event.done_bytes - self._started_bytes
        if elapsed_s < 1 or 100 * moved < _LEAST_PERCENT * event.total_bytes:
            return ""
        left_s = (event.total_bytes - event.done_bytes) * elapsed_s / moved
        rate = f", {human_bytes(moved / elapsed_s)}/s"
        return f"{rate}, {human_duration(left_s)} left" if left_s >= 1 else rate
