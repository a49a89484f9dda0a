"""Text ↔ token ids, and chat messages → prompt. Signatures first; bodies in the next commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.records import CompiledModel
from ..runtime_api import Message


class Tokenizer:
    """The compiled model's tokenizer and chat template; thread-safe."""

    has_template: bool
    eos_token_ids: tuple[int, ...]
    vocab_size: int

    def __init__(self, folder: Path, compiled: CompiledModel) -> None:
        raise NotImplementedError

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` adds what the model wants around plain text (BOS)."""
        raise NotImplementedError

    def encode_chat(
        self, messages: Sequence[Message], context_tokens: Sequence[int] = ()
    ) -> list[int]:
        """Prompt of a conversation, up to where the assistant speaks.

        With `context_tokens` (what an earlier reply returned) the messages continue that
        conversation: the result starts with these tokens.
        """
        raise NotImplementedError

    def encode_prompt(self, prompt: str, context_tokens: Sequence[int] = ()) -> list[int]:
        """Prompt of plain text, after `context_tokens` if given (then without BOS)."""
        raise NotImplementedError

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model's template writes it."""
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        raise NotImplementedError
