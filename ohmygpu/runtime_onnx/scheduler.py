"""Decides which sequence computes what in the next step. Integers only: no arrays, clock or I/O.

A step is one batched decode over every running sequence whose prompt is done, then prompt chunks
of at most `prefill_tokens` in all. Sequences wait first come, first served for a slot; those being
prefilled take turns, so that a short prompt passes a long one after a single chunk. A slot keeps
the tokens of its last sequence until it is given away: a new prompt that starts alike reuses their
KV in place or, where the cache can copy, from any slot, running ones included.

A chunk has two tokens at least (with a budget of three or more, and but for one-token prompts): one
token alone goes through other kernels, with other rounding, and what a prompt gives must not depend
on how it was cut.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ohmygpu.core.errors import Busy

from .sequence import SAME_ROPE, RopeLengths, Sequence, Stage, common_prefix

_MIN_CHUNK_TOKENS = 2
_MIN_COPY_TOKENS = 16  # below this a copy saves less than it costs to plan
_TYPICAL_COMPLETION_TOKENS = 128  # until finished sequences tell better


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """Copy the KV of positions [start, stop) from one slot to the same positions of another."""

    source_slot: int
    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Compute the tokens [start, stop) of a sequence, after `copy` where there is one."""

    sequence: Sequence
    start: int
    stop: int
    copy: PrefixCopy | None

    @property
    def is_last(self) -> bool:
        """True when this chunk ends the prefill, so that its last row gives a token."""
        return self.stop == self.sequence.prefill_stop


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes: the decodes, then the chunks in this order."""

    decodes: tuple[Sequence, ...]
    prefills: tuple[PrefillChunk, ...]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """The sequences that get a token from this step, in the order of their logits rows."""
        ended = tuple(chunk.sequence for chunk in self.prefills if chunk.is_last)
        return self.decodes + ended


class Scheduler:
    """Slots, the waiting queue and the plan of the next step.

    `slots` sequences run at once and `max_queue` more may wait. With `can_copy` prefixes are also
    copied between slots. Only KV with the RoPE frequencies a sequence needs is reused (`rope`).
    """

    def __init__(
        self,
        *,
        slots: int,
        max_queue: int,
        prefill_tokens: int,
        can_copy: bool = True,
        rope: RopeLengths = SAME_ROPE,
    ) -> None:
        self.slots = slots
        self.max_queue = max_queue
        self.prefill_tokens = prefill_tokens
        self.can_copy = can_copy
        self.rope = rope
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: list[Sequence] = []
        self._owner: list[Sequence | None] = [None] * slots
        self._kept: list[list[int]] = [[] for _ in range(slots)]  # tokens left in a free slot
        self._kept_pure = [0] * slots  # how many of those a prefill wrote (Sequence.pure_tokens)
        self._kept_rope = [0] * slots  # which frequencies those have (Sequence.rope_length)
        self._used_at = [0] * slots  # step of last use: the least recently used slot goes first
        self._step = 0
        self._typical_completion = _TYPICAL_COMPLETION_TOKENS

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def decoding(self) -> int:
        """Running sequences whose prompt is done."""
        return len(self._decoding)

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def free_slots(self) -> int:
        """Slots nobody holds."""
        return self.slots - self.running

    @property
    def has_work(self) -> bool:
        """True when the next plan is not empty."""
        return bool(self._waiting or self._prefilling or self._decoding)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises Busy when the queue is full."""
        if self.running + self.waiting >= self.slots + self.max_queue:
            raise Busy(
                f"{self.running} requests are running and {self.waiting} are waiting, as many as "
                "the queue takes; try again later"
            )
        sequence.rope_length = self.rope.of_prompt(sequence.prompt_tokens)
        self._waiting.append(sequence)

    def schedule(self, prefill_tokens: int | None = None) -> StepPlan:
        """Plan one step; the plan counts as computed from here on (see `discard`).

        `prefill_tokens` lowers the budget of this step.
        """
        self._step += 1
        budget = min(self.prefill_tokens, prefill_tokens or self.prefill_tokens)
        self._restart_outgrown()
        decodes = tuple(self._decoding)
        for sequence in decodes:
            sequence.computed += 1
            self._used_at[sequence.slot] = self._step
        while self._waiting and self.free_slots:
            self._admit(self._waiting.popleft())
        return StepPlan(decodes, self._plan_prefills(budget))

    def append(self, sequence: Sequence, token: int) -> None:
        """Add a sampled token to a running sequence."""
        assert sequence.stage is Stage.DECODE
        assert not sequence.is_full
        sequence.tokens.append(token)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence at any stage; its slot is free at once and keeps its tokens for reuse."""
        if sequence.stage is Stage.DECODE:
            completion = sequence.completion_tokens
            self._typical_completion += (completion - self._typical_completion) // 4
        self._leave(sequence, sequence.computed)

    def discard(self, sequence: Sequence) -> None:
        """End a sequence whose step failed: nothing in its slot can be relied on."""
        self._leave(sequence, 0)

    def kept_tokens(self, slot: int) -> int:
        """Positions of `slot` whose KV is still of use."""
        owner = self._owner[slot]
        return len(self._kept[slot]) if owner is None else owner.computed

    def forget(self) -> list[int]:
        """Drop what free slots keep; returns the slots that kept something."""
        slots = [slot for slot, kept in enumerate(self._kept) if kept]
        for slot in slots:
            self._kept[slot] = []
            self._kept_pure[slot] = 0
        return slots

    def steps_until_free(self) -> int:
        """Estimated steps until a running sequence ends: what a refused request should wait.

        A sequence is taken to produce as many tokens as those before it did on average, or its own
        limit where that is less.
        """
        estimates = [
            -(-(sequence.prefill_stop - sequence.computed) // self.prefill_tokens)
            + self._completion_left(sequence)
            for sequence in (*self._prefilling, *self._decoding)
        ]
        return min(estimates, default=1)

    def _completion_left(self, sequence: Sequence) -> int:
        left = sequence.limit_tokens - len(sequence.tokens)
        expected = self._typical_completion - sequence.completion_tokens
        return max(1, min(left, expected if expected > 0 else left))

    # admission

    def _admit(self, sequence: Sequence) -> None:
        slot, reused = self._choose_slot(sequence)
        pure = self._kept_pure[slot]
        sequence.pure_tokens = sequence.prompt_tokens if reused <= pure else pure
        self._kept[slot] = []
        self._owner[slot] = sequence
        self._used_at[slot] = self._step
        sequence.slot = slot
        sequence.computed = sequence.cached = reused
        sequence.stage = Stage.PREFILL
        self._prefilling.append(sequence)

    def _choose_slot(self, sequence: Sequence) -> tuple[int, int]:
        """(free slot, tokens reused in place).

        The slot that shares the longest prefix continues its own conversation. When most of what it
        keeps would be lost and a copy can fetch the shared part, another slot is given away: an
        empty one first, then the least recently used.
        """
        free = [slot for slot, owner in enumerate(self._owner) if owner is None]
        shared = {slot: self._shared(slot, sequence) for slot in free}
        best = max(free, key=lambda slot: (shared[slot], -len(self._kept[slot])))
        if shared[best] and (not self.can_copy or 2 * shared[best] >= len(self._kept[best])):
            return best, shared[best]
        others = [slot for slot in free if slot != best or not shared[best]] or free
        victim = min(others, key=lambda slot: (len(self._kept[slot]) > 0, self._used_at[slot]))
        return victim, shared[victim]

    def _shared(self, slot: int, sequence: Sequence) -> int:
        """Leading tokens of `sequence` whose KV the slot has and the sequence may use."""
        owner = self._owner[slot]
        rope_length = self._kept_rope[slot] if owner is None else owner.rope_length
        if rope_length != sequence.rope_length:
            return 0
        tokens = self._kept[slot] if owner is None else owner.tokens
        usable = self._pure(slot) if sequence.reproducible else self.kept_tokens(slot)
        # The last tokens are always computed: they give the logits.
        limit = min(usable, max(0, sequence.prefill_stop - _MIN_CHUNK_TOKENS))
        return common_prefix(tokens, sequence.tokens, limit)

    def _pure(self, slot: int) -> int:
        """Leading positions of a slot that a prefill wrote."""
        owner = self._owner[slot]
        return self._kept_pure[slot] if owner is None else min(owner.pure_tokens, owner.computed)

    # prefill

    def _plan_prefills(self, budget: int) -> tuple[PrefillChunk, ...]:
        sliver = budget // 2
        chunks: list[PrefillChunk] = []
        for _ in range(len(self._prefilling)):
            sequence = self._prefilling[0]
            copy = self._find_copy(sequence)
            start = sequence.computed if copy is None else copy.stop
            stop = min(sequence.prefill_stop, start + budget)
            if stop < sequence.prefill_stop and chunks and budget < sliver:
                break  # a sliver of a long prompt is dear: it starts the next step instead
            if stop == sequence.prefill_stop - 1 and stop - start > _MIN_CHUNK_TOKENS:
                stop -= 1
            self._prefilling.popleft()
            if copy is not None:
                if not sequence.completion_tokens:
                    sequence.cached += copy.stop - copy.start
                pure = max(self._pure(copy.source_slot), copy.start)
                if copy.stop > pure:
                    sequence.pure_tokens = min(sequence.pure_tokens, pure)
                self._used_at[copy.source_slot] = self._step
            sequence.computed = stop
            budget -= stop - start
            chunks.append(PrefillChunk(sequence, start, stop, copy))
            if chunks[-1].is_last:
                sequence.stage = Stage.DECODE
                self._decoding.append(sequence)
            else:
                self._prefilling.append(sequence)
            self._used_at[sequence.slot] = self._step
            if budget <= 0:
                break
        return tuple(chunks)

    def _restart_outgrown(self) -> None:
        """Send back to prefill what would decode past the length where RoPE's frequencies change.

        All it has so far is computed again in its slot, like a prompt of that length.
        """
        for sequence in [each for each in self._decoding if self.rope.outgrown(each)]:
            self._decoding.remove(sequence)
            sequence.stage = Stage.PREFILL
            sequence.computed = 0
            sequence.prefill_stop = sequence.pure_tokens = len(sequence.tokens)
            sequence.rope_length = self.rope.of_prompt(len(sequence.tokens))
            self._prefilling.append(sequence)

    def _find_copy(self, sequence: Sequence) -> PrefixCopy | None:
        """The copy worth making before the next chunk of `sequence`.

        Checked at every chunk: of two long prompts that start alike and take turns, each continues
        where the other one stopped, and the shared part is computed once.
        """
        if not self.can_copy:
            return None
        source, shared = -1, sequence.computed + _MIN_COPY_TOKENS - 1
        for slot in range(self.slots):
            if slot == sequence.slot or self.kept_tokens(slot) <= shared:
                continue
            length = self._shared(slot, sequence)
            if length > shared:
                source, shared = slot, length
        if source < 0:
            return None
        return PrefixCopy(source, sequence.slot, sequence.computed, shared)

    # leaving

    def _leave(self, sequence: Sequence, kept: int) -> None:
        if sequence.stage is Stage.WAITING and sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence.stage is Stage.PREFILL:
            self._prefilling.remove(sequence)
        elif sequence.stage is Stage.DECODE:
            self._decoding.remove(sequence)
        if sequence.slot >= 0:
            self._owner[sequence.slot] = None
            self._kept[sequence.slot] = sequence.tokens[:kept]
            self._kept_pure[sequence.slot] = min(sequence.pure_tokens, kept)
            self._kept_rope[sequence.slot] = sequence.rope_length
            sequence.slot = -1
        sequence.stage = Stage.FINISHED

    def check_integrity(self) -> None:
        """Raise AssertionError when the bookkeeping contradicts itself (a bug, not a bad input)."""
        running = [*self._prefilling, *self._decoding]
        assert self.running + self.waiting <= self.slots + self.max_queue
        assert len({id(sequence) for sequence in (*running, *self._waiting)}) == len(running) + len(
            self._waiting
        )
        owners = [sequence for sequence in self._owner if sequence is not None]
        assert {id(sequence) for sequence in owners} == {id(sequence) for sequence in running}
        assert len(owners) == len(running) <= self.slots
        for slot, owner in enumerate(self._owner):
            assert owner is None or (owner.slot == slot and not self._kept[slot])
        for sequence in self._waiting:
            assert sequence.stage is Stage.WAITING
            assert sequence.slot < 0
        for sequence in self._prefilling:
            assert sequence.stage is Stage.PREFILL
            assert 0 <= sequence.computed < sequence.prefill_stop <= len(sequence.tokens)
            assert 0 <= sequence.cached <= max(sequence.computed, sequence.prompt_tokens)
            assert 0 <= sequence.pure_tokens <= sequence.prefill_stop
        for sequence in self._decoding:
            assert sequence.stage is Stage.DECODE
            assert sequence.computed in (len(sequence.tokens) - 1, len(sequence.tokens))
            assert len(sequence.tokens) <= sequence.limit_tokens
            assert not (
                self.rope.outgrown(sequence) and sequence.computed > self.rope.switch_tokens
            )
