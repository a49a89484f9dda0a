"""Reading messages at a terminal: editing, history, several lines between triple quotes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'
_HISTORY_LINES = 1000


class LineEditor:
    """Reads one message at a time, with readline where Python has it.

    The history lives in `history`, which only its owner may read; None keeps none.
    """

    def __init__(self, history: Path | None, words: Sequence[str]) -> None:
        self._history = history
        self._words = sorted(words)
        self._readline: Any = None
        with contextlib.suppress(ImportError):  # absent on Windows: plain lines then
            import readline

            self._readline = readline
            self._prepare()

    def read(self) -> str:
        """The next message. Raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
        text = input(PROMPT)
        if not text.lstrip().startswith(QUOTES):
            return text
        text = text.lstrip().removeprefix(QUOTES)
        while QUOTES not in text:
            text += "\n" + input(CONTINUED)
        return text.partition(QUOTES)[0].strip("\n")

    def close(self) -> None:
        """Save the history; a folder that cannot be written to only loses it."""
        if self._readline is None or self._history is None:
            return
        with contextlib.suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._history.touch(mode=0o600)
            self._readline.set_history_length(_HISTORY_LINES)
            self._readline.write_history_file(str(self._history))

    def _prepare(self) -> None:
        if self._history is not None:
            with contextlib.suppress(OSError):
                self._readline.read_history_file(str(self._history))
        self._readline.set_completer(self._complete)
        self._readline.set_completer_delims(" ")
        self._readline.parse_and_bind("tab: complete")

    def _complete(self, text: str, index: int) -> str | None:
        matches = [word for word in self._words if text and word.startswith(text)]
        return matches[index] if index < len(matches) else None
