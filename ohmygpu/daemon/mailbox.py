"""Deltas on their way to one reader, in bounded memory."""

from __future__ import annotations

import asyncio
from collections import deque

from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.runtime_api import Delta

MAX_PENDING = 32


class Mailbox:
    """Deltas of one request, put by the model's reader task and taken by the request's own.

    `put` never waits, so a slow client holds up nobody else. Beyond MAX_PENDING untaken Deltas,
    further ones merge into one: the text is kept, so memory is bounded by the longest answer.
    """

    def __init__(self) -> None:
        self.finished = False  # the last Delta or an error has been put
        self._deltas: deque[Delta] = deque()
        self._texts: list[str] = []  # the merged Delta, in pieces
        self._tokens = 0
        self._error: OhMyGPUError | None = None
        self._filled = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Add a Delta; ignored after the last one."""
        if self.finished:
            return
        self.finished = delta.finish_reason is not None
        if len(self._deltas) < MAX_PENDING and not self._texts:
            self._deltas.append(delta)
        else:
            self._texts.append(delta.text)
            self._tokens += delta.completion_tokens
            if self.finished:
                self._deltas.append(self._merged(delta))
        self._filled.set()

    def fail(self, error: OhMyGPUError) -> None:
        """End with an error, raised after the Deltas already here; ignored after the last one."""
        if self.finished:
            return
        self.finished = True
        self._error = error
        self._filled.set()

    async def get(self) -> Delta:
        """The next Delta; waits for it. Raises the error given to `fail`."""
        while True:
            if self._deltas:
                return self._deltas.popleft()
            if self._texts:
                return self._merged(Delta())
            if self._error is not None:
                raise self._error
            self._filled.clear()
            await self._filled.wait()

    def _merged(self, last: Delta) -> Delta:
        merged = Delta(
            text="".join(self._texts),
            completion_tokens=self._tokens,
            finish_reason=last.finish_reason,
            usage=last.usage,
            context=last.context,
        )
        self._texts, self._tokens = [], 0
        return merged
