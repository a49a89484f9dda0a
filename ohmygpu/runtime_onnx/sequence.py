"""Sequence: the integers the scheduler keeps of one request. No text, no arrays, no clock."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from enum import StrEnum

from ohmygpu.core.errors import ContextLengthExceeded

_BLOCK = 512  # tokens compared at once; list slices compare at C speed


class Stage(StrEnum):
    """Where a sequence stands; it only ever moves down this list (or straight to FINISHED)."""

    WAITING = "waiting"  # no slot yet
    PREFILL = "prefill"  # its prompt is being computed, chunk by chunk
    DECODE = "decode"  # one token a step
    FINISHED = "finished"  # holds no slot any more


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine.

    `tokens` is the prompt followed by what was sampled; the KV of the first `computed` of them lies
    in `slot`. A sequence ends at the latest when it has `limit_tokens` tokens.

    KV written while decoding differs from what a prefill of the same tokens writes, by rounding. A
    `reproducible` sequence reuses only the other kind, so that what it produces does not depend on
    what the slots happen to hold: `pure_tokens` counts the leading positions without a decoded one.
    """

    sequence_id: int
    tokens: list[int]
    prompt_tokens: int
    limit_tokens: int
    reproducible: bool = False
    stage: Stage = Stage.WAITING
    slot: int = -1
    computed: int = 0
    cached: int = 0  # prompt tokens whose KV was reused, not computed
    pure_tokens: int = 0

    @property
    def completion_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def is_full(self) -> bool:
        """True when no further token may be added."""
        return len(self.tokens) >= self.limit_tokens


def new_sequence(
    sequence_id: int,
    prompt: Tokens[int],
    context_tokens: int,
    max_tokens: int | None,
    *,
    reproducible: bool = False,
) -> Sequence:
    """A waiting sequence for `prompt` in a context of `context_tokens` (prompt and completion).

    Raises ContextLengthExceeded when the prompt leaves no room for a single new token.
    """
    check_fits(len(prompt), context_tokens)
    limit = context_tokens
    if max_tokens is not None:
        limit = min(limit, len(prompt) + max_tokens)
    return Sequence(sequence_id, list(prompt), len(prompt), limit, reproducible)


def check_fits(prompt_tokens: int, context_tokens: int) -> None:
    """Raise ContextLengthExceeded unless the prompt and one new token fit the context."""
    if prompt_tokens >= context_tokens:
        raise ContextLengthExceeded(
            f"the prompt has {prompt_tokens} tokens and the context holds {context_tokens}, one of "
            "them for the answer; shorten the prompt or raise the context length",
            prompt_tokens=prompt_tokens,
            context_tokens=context_tokens,
        )


def common_prefix(left: Tokens[int], right: Tokens[int], limit: int) -> int:
    """How many leading tokens `left` and `right` share, at most `limit`."""
    limit = min(limit, len(left), len(right))
    start = 0
    while start < limit:
        stop = min(start + _BLOCK, limit)
        if left[start:stop] != right[start:stop]:
            break
        start = stop
    while start < limit and left[start] == right[start]:
        start += 1
    return start
