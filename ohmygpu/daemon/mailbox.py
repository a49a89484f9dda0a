"""Deltas on their way to one reader, in bounded memory; vectors until they are all here."""

from __future__ import annotations

import asyncio
import base64
from collections import deque

from ohmygpu.core.errors import OhMyGPUError
from ohmygpu.runtime_api import Delta, EmbedResult

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


class Vectors:
    """The vectors of one embed request, as frames bring them."""

    def __init__(self) -> None:
        self.result: asyncio.Future[EmbedResult] = asyncio.get_running_loop().create_future()
        self._vectors: list[bytes] = []
        self._prompt_tokens: list[int] = []

    def add(self, data: str, prompt_tokens: list[int], *, last: bool) -> None:
        """Take some vectors, in base64; with the `last` the result is there."""
        raw = base64.b64decode(data)
        size = len(raw) // len(prompt_tokens)
        self._vectors += [raw[start : start + size] for start in range(0, len(raw), size)]
        self._prompt_tokens += prompt_tokens
        if last and not self.result.done():
            self.result.set_result(
                EmbedResult(vectors=tuple(self._vectors), prompt_tokens=tuple(self._prompt_tokens))
            )

    def fail(self, error: OhMyGPUError) -> None:
        """End with an error; ignored when it has ended."""
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # marks it as seen: its reader may have left
