"""Tokens → text as it streams: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from .tokenizer import Tokenizer

_CONTEXT_TOKENS = 8  # of the prompt, that a decoder which looks back may see
_MAX_HELD_TOKENS = 8  # a character has at most 4 bytes; beyond that the bytes are not UTF-8
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one reply, token by token.

    What `push` and `finish` return, concatenated, is the decoded reply up to the first stop string;
    a last character of which the reply has only some bytes is left out. The first stop string is
    the one whose last character comes first (of two that end together, the longer), so the result
    does not depend on how the text falls into tokens. The end-of-sequence token, like every special
    token, has no text. U+FFFD appears only where the tokens' bytes can never be UTF-8.

    `prompt_ids` are the tokens before the reply: after them a reply's leading space is text.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), stop: tuple[str, ...] = ()
    ) -> None:
        self._decoder: _Decoder
        if tokenizer.has_bytes:
            self._decoder = _ByteDecoder(tokenizer)
        else:
            self._decoder = _WindowDecoder(tokenizer, prompt_ids)
        self._stop = _StopMatcher(stop) if stop else None
        self.stopped = False  # a stop string was met: the sequence is to end

    def push(self, token_id: int) -> str:
        """Text that is now safe to send: whole characters that cannot begin a stop string."""
        return self._passed(self._decoder.push(token_id))

    def finish(self) -> str:
        """What was held back, at the end of a sequence; nothing after a stop string."""
        text = self._passed(self._decoder.finish())
        if self._stop is not None and not self.stopped:
            text += self._stop.release()
        return text

    def _passed(self, text: str) -> str:
        if self._stop is None or not text:
            return text
        if self.stopped:
            return ""
        text, self.stopped = self._stop.push(text)
        return text


class _Decoder(Protocol):
    def push(self, token_id: int) -> str:
        """Whole characters that the token completes."""
        ...

    def finish(self) -> str:
        """Whole characters that were still held back."""
        ...


class _ByteDecoder:
    """For tokens that stand for bytes: an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return ""  # it holds back nothing but the beginning of a character


class _WindowDecoder:
    """For decoders that look at several tokens: decodes a few tokens twice and takes the rest.

    The window holds the tokens whose text was already given (`read` of them) and the pending ones;
    whenever the pending ones give whole characters, they become the window.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = [
            token_id for token_id in prompt_ids[-64:] if token_id not in tokenizer.special_ids
        ][-_CONTEXT_TOKENS:]
        self._read = len(self._window)

    def push(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self._pending()
        held = len(self._window) - self._read
        if not text or (text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        del self._window[: self._read]
        self._read = len(self._window)
        return text

    def finish(self) -> str:
        text = self._pending()
        self._read = len(self._window)
        return text.rstrip(_REPLACEMENT)

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._window[: self._read])
        return self._tokenizer.decode(self._window)[len(before) :]


class _StopMatcher:
    """Finds stop strings in a stream, with Knuth, Morris and Pratt's automaton for each.

    `states[i]` is how many characters of stop string i the text ends with; the longest of them is
    what must be held back.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._links = [_failure_links(stop) for stop in stops]
        self._states = [0] * len(stops)
        self._first = frozenset(stop[0] for stop in stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text safe to send, whether a stop string ended in it)."""
        if not self._held and self._first.isdisjoint(text):
            return text, False
        text = self._held + text
        for position in range(len(self._held), len(text)):
            matched = self._advance(text[position])
            if matched:
                return text[: position + 1 - matched], True
        keep = max(self._states)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def release(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> int:
        """Take one character; length of the longest stop string that it completes, or 0."""
        matched = 0
        for index, stop in enumerate(self._stops):
            state = self._states[index]
            links = self._links[index]
            while state and stop[state] != character:
                state = links[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                matched = max(matched, state)
                state = 0
            self._states[index] = state
        return matched


def _failure_links(stop: str) -> list[int]:
    """For each prefix of `stop`: how long the longest shorter prefix is that it ends with."""
    links = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = links[length - 1]
        if stop[index] == stop[length]:
            length += 1
        links[index] = length
    return links
