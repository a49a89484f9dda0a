"""Tokens → text as it streams. Signatures first; the bodies follow in the next commit."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer


class TextStream:
    """The text of one reply, token by token. Do not push the end-of-sequence token."""

    stopped: bool  # a stop string was met: end the sequence with FinishReason.STOP

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: tuple[str, ...] = ()
    ) -> None:
        raise NotImplementedError

    def push(self, token_id: int) -> str:
        """Text now safe to send: whole characters that cannot begin a stop string."""
        raise NotImplementedError

    def finish(self) -> str:
        """What was held back, when the sequence ends without a stop string."""
        raise NotImplementedError
