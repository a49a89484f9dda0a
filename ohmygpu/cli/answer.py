"""Asking for one answer and printing it as it comes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from ohmygpu.client import ChatOptions, Client, ModelInfo
from ohmygpu.runtime_api import Delta, FinishReason, Message, Usage

from .output import is_terminal, note, write

_WAITING = "…"


@dataclass(slots=True)
class Answer:
    """What came back; times are seconds of this process's clock."""

    text: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    interrupted: bool = False
    first_s: float = 0.0  # asked → first text
    total_s: float = 0.0

    def summary(self) -> str:
        """Token counts and speed, one line."""
        parts = []
        if self.usage:
            cached = f" ({self.usage.cached_tokens} cached)" if self.usage.cached_tokens else ""
            parts.append(f"prompt {self.usage.prompt_tokens} tokens{cached}")
            parts.append(f"answer {self.usage.completion_tokens} tokens")
            decode_s = self.total_s - self.first_s
            if self.usage.completion_tokens > 1 and decode_s > 0:
                parts.append(f"{(self.usage.completion_tokens - 1) / decode_s:.1f} tokens/s")
        parts.append(f"first text after {self.first_s:.2f} s")
        parts.append(f"total {self.total_s:.2f} s")
        return ", ".join(parts)


def ask(
    client: Client, model: ModelInfo, messages: Sequence[Message], options: ChatOptions
) -> Generator[Delta, None, None]:
    """The model's answer; one without a chat template goes on with the last message's text."""
    if model.has_template:
        return client.chat(model.name, messages, options)
    return client.complete(model.name, messages[-1].content, options)


def print_answer(pieces: Generator[Delta, None, None], *, show_waiting: bool = False) -> Answer:
    """Stream an answer to stdout; Ctrl-C stops it and keeps what was said."""
    answer = Answer()
    started = time.monotonic()
    waiting = show_waiting and is_terminal(sys.stderr)
    if waiting:
        _put(_WAITING)
    try:
        with contextlib.closing(pieces) as deltas:
            for delta in deltas:
                if delta.text and waiting:
                    waiting = _erase()
                if delta.text and not answer.text:
                    answer.first_s = time.monotonic() - started
                answer.text += delta.text
                write(delta.text)
                answer.finish_reason = delta.finish_reason or answer.finish_reason
                answer.usage = delta.usage or answer.usage
    except KeyboardInterrupt:
        answer.interrupted = True
    finally:
        if waiting:
            _erase()
        answer.total_s = time.monotonic() - started
        if answer.text and not answer.text.endswith("\n"):
            write("\n")  # also after an error, so that its sentence gets a line of its own
    return answer


def explain_end(answer: Answer) -> None:
    """Say why an answer ended, where that was not its own end."""
    if answer.finish_reason is FinishReason.LENGTH:
        note("(cut off: the limit of tokens or the end of the context is reached)")


def _put(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _erase() -> bool:
    """Remove the waiting mark; False, for there is none any more."""
    _put("\r\x1b[K")
    return False
