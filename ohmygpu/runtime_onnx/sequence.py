"""Sequence: the integers the scheduler keeps of one request. No text, no arrays, no clock."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import StrEnum

from ohmygpu.core.errors import ContextLengthExceeded

_BLOCK = 512  # tokens compared at once; list slices compare at C speed


class Stage(StrEnum):
    """Where a sequence stands; it moves down this list, or straight to FINISHED.

    Only where RoPE changes with the length may it go from DECODE back to PREFILL, once.
    """

    WAITING = "waiting"  # no slot yet
    PREFILL = "prefill"  # its prompt, or all it has so far, is being computed chunk by chunk
    DECODE = "decode"  # one token a step
    FINISHED = "finished"  # holds no slot any more


@dataclass(frozen=True, slots=True)
class RopeLengths:
    """How a model's RoPE depends on the length of a row.

    Rows of more than `switch_tokens` have other frequencies (0: all rows have the same). Those are
    one set (longrope), or with `grows` every length has its own (dynamic NTK). Keys made with
    other frequencies than the prompt in front of them give wrong scores.
    """

    switch_tokens: int = 0
    grows: bool = False

    def of_prompt(self, tokens: int) -> int:
        """The length that names the frequencies of a prompt of `tokens`; 0 = those of short ones.

        Equal numbers, equal frequencies.
        """
        if not self.switch_tokens or tokens <= self.switch_tokens:
            return 0
        return tokens if self.grows else self.switch_tokens + 1

    def outgrown(self, sequence: Sequence) -> bool:
        """Whether the next token of a decoding sequence needs other keys than those it has.

        Longrope's keys have to be made again, as transformers' Phi-3 does. With dynamic NTK keys
        stay as they are and new ones get the frequencies of their own length, as in transformers.
        """
        if self.grows or not self.switch_tokens:
            return False
        return sequence.rope_length == 0 and len(sequence.tokens) > self.switch_tokens


SAME_ROPE = RopeLengths()
"""Of models whose RoPE is the same for all lengths."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine.

    `tokens` is the prompt followed by what was sampled; the KV of the first `computed` of them lies
    in `slot`. A sequence ends at the latest when it has `limit_tokens` tokens. A prefill computes
    its first `prefill_stop` tokens: the prompt, or more where RoPE makes it start over.

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
    rope_length: int = 0  # which frequencies its keys have (RopeLengths.of_prompt)
    prefill_stop: int = field(init=False)

    def __post_init__(self) -> None:
        self.prefill_stop = self.prompt_tokens

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
