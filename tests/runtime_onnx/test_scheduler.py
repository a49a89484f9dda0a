"""The scheduler alone: integers in, plans out."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

import pytest

from ohmygpu.core.errors import Busy, ContextLengthExceeded
from ohmygpu.runtime_onnx.scheduler import PrefixCopy, Scheduler, StepPlan
from ohmygpu.runtime_onnx.sequence import (
    SAME_ROPE,
    RopeLengths,
    Sequence,
    Stage,
    common_prefix,
    new_sequence,
)

NEW_TOKEN = 7


def scheduler(
    slots: int = 2,
    max_queue: int = 4,
    prefill_tokens: int = 8,
    can_copy: bool = True,
    rope: RopeLengths = SAME_ROPE,
) -> Scheduler:
    return Scheduler(
        slots=slots,
        max_queue=max_queue,
        prefill_tokens=prefill_tokens,
        can_copy=can_copy,
        rope=rope,
    )


def sequence(
    prompt: Tokens[int] | int, max_tokens: int | None = 4, *, name: int = 0, context: int = 1000
) -> Sequence:
    """A sequence with the given prompt; a number stands for that many tokens of its own."""
    tokens = [1000 * (name + 1) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return new_sequence(name, tokens, context, max_tokens)


def commit(target: Scheduler, plan: StepPlan, token: int = NEW_TOKEN) -> None:
    """What the engine does with a plan: a token for all that got logits, then finish the full."""
    for each in plan.sampled:
        target.append(each, token)
        if each.is_full:
            target.finish(each)
    target.check_integrity()


def run_to_end(target: Scheduler) -> None:
    while target.has_work:
        commit(target, target.schedule())


def test_a_prompt_is_prefilled_in_one_chunk_and_then_decodes_one_token_a_step() -> None:
    target = scheduler()
    only = sequence(5, max_tokens=3)
    target.submit(only)
    plan = target.schedule()
    assert plan.decodes == ()
    (chunk,) = plan.prefills
    assert (chunk.start, chunk.stop, chunk.is_last, chunk.copy) == (0, 5, True, None)
    assert plan.sampled == (only,)
    commit(target, plan)
    plan = target.schedule()
    assert plan.decodes == (only,)
    assert plan.prefills == ()
    assert only.computed == 6
    commit(target, plan)
    commit(target, target.schedule())
    assert only.stage is Stage.FINISHED
    assert only.completion_tokens == 3
    assert not target.has_work
    assert not target.schedule()


def test_a_long_prompt_is_cut_into_chunks_of_the_budget() -> None:
    target = scheduler(prefill_tokens=8)
    only = sequence(20)
    target.submit(only)
    chunks = []
    while only.stage is not Stage.DECODE:
        plan = target.schedule()
        chunks += [(chunk.start, chunk.stop, chunk.is_last) for chunk in plan.prefills]
        assert [chunk.sequence for chunk in plan.prefills if chunk.is_last] == [*plan.sampled]
        commit(target, plan)
    assert chunks == [(0, 8, False), (8, 16, False), (16, 20, True)]


@pytest.mark.parametrize("prompt", range(2, 40))
def test_no_chunk_of_a_longer_prompt_is_a_single_token(prompt: int) -> None:
    target = scheduler(prefill_tokens=8)
    only = sequence(prompt)
    target.submit(only)
    sizes = []
    while only.stage is not Stage.DECODE:
        plan = target.schedule()
        sizes += [chunk.stop - chunk.start for chunk in plan.prefills]
        commit(target, plan)
    assert sum(sizes) == prompt
    assert 2 <= min(sizes) <= max(sizes) <= 8


def test_decodes_run_in_every_step_while_a_long_prompt_is_prefilled() -> None:
    target = scheduler(prefill_tokens=8)
    short, long = sequence(3, max_tokens=50, name=0), sequence(40, name=1)
    target.submit(short)
    commit(target, target.schedule())
    target.submit(long)
    while long.stage is not Stage.DECODE:
        plan = target.schedule()
        assert plan.decodes == (short,)
        assert sum(chunk.stop - chunk.start for chunk in plan.prefills) <= 8
        commit(target, plan)


def test_a_step_may_be_given_a_smaller_budget_but_no_larger_one() -> None:
    target = scheduler(prefill_tokens=8)
    target.submit(sequence(40))
    sizes = [target.schedule(budget).prefills[0].stop for budget in (5, None, 100)]
    assert sizes == [5, 13, 21]


def test_short_prompts_share_the_budget_of_one_step() -> None:
    target = scheduler(slots=4, prefill_tokens=8)
    for name in range(4):
        target.submit(sequence(3, name=name))
    plan = target.schedule()
    assert [(chunk.sequence.sequence_id, chunk.start, chunk.stop) for chunk in plan.prefills] == [
        (0, 0, 3),
        (1, 0, 3),
    ]  # two tokens of budget are left: too few to begin the third
    commit(target, plan)
    assert [chunk.sequence.sequence_id for chunk in target.schedule().prefills] == [2, 3]


def test_a_short_prompt_passes_a_long_one_after_one_chunk() -> None:
    target = scheduler(prefill_tokens=8)
    target.submit(sequence(80, name=0))
    target.submit(sequence(4, name=1))
    assert [chunk.sequence.sequence_id for chunk in target.schedule().prefills] == [0]
    plan = target.schedule()
    assert [chunk.sequence.sequence_id for chunk in plan.prefills] == [1, 0]
    assert [each.sequence_id for each in plan.sampled] == [1]


def test_sequences_get_slots_in_the_order_they_came() -> None:
    target = scheduler(slots=1, max_queue=9)
    order: list[int] = []
    all_of_them = [sequence(2, max_tokens=1, name=name) for name in range(5)]
    for each in all_of_them:
        target.submit(each)
    while target.has_work:
        plan = target.schedule()
        order += [chunk.sequence.sequence_id for chunk in plan.prefills]
        commit(target, plan)
    assert order == [0, 1, 2, 3, 4]


def test_a_full_queue_refuses_and_takes_again_when_one_leaves() -> None:
    target = scheduler(slots=1, max_queue=2)
    queued = [sequence(2, name=name) for name in range(3)]
    for each in queued:
        target.submit(each)
    with pytest.raises(Busy, match="try again"):
        target.submit(sequence(2, name=9))
    target.finish(queued[1])
    target.submit(sequence(2, name=9))
    target.check_integrity()


def test_a_prompt_must_leave_room_for_one_token() -> None:
    assert sequence(9, None, context=10).limit_tokens == 10
    with pytest.raises(ContextLengthExceeded, match=r"10 tokens.*holds 10") as caught:
        sequence(10, None, context=10)
    assert caught.value.details == {"prompt_tokens": 10, "context_tokens": 10}


def test_max_tokens_and_the_context_bound_a_sequence() -> None:
    assert sequence(4, 3, context=10).limit_tokens == 7
    assert sequence(4, 30, context=10).limit_tokens == 10
    assert sequence(4, 0, context=10).is_full


def test_abort_frees_the_slot_before_the_next_step_at_every_stage() -> None:
    target = scheduler(slots=1, prefill_tokens=4)
    waiting, prefilling, decoding = (sequence(n, 9, name=n) for n in (3, 9, 2))
    target.submit(prefilling)
    target.submit(waiting)
    target.schedule()
    assert (prefilling.stage, waiting.stage) == (Stage.PREFILL, Stage.WAITING)
    target.finish(waiting)
    target.finish(prefilling)
    assert target.free_slots == 1
    target.submit(decoding)
    commit(target, target.schedule())
    assert decoding.stage is Stage.DECODE
    target.finish(decoding)
    assert (target.free_slots, target.has_work) == (1, False)
    target.check_integrity()


def test_a_finished_slot_is_reused_by_the_prompt_that_continues_it() -> None:
    target = scheduler(slots=2, prefill_tokens=100)
    first = sequence(10, max_tokens=3)
    target.submit(first)
    run_to_end(target)
    # The last sampled token was never fed back, so its KV does not exist.
    assert target.kept_tokens(0) == 12
    again = sequence([*first.tokens, 1, 2], name=1)
    target.submit(again)
    (chunk,) = target.schedule().prefills
    assert again.slot == 0
    assert (chunk.start, chunk.stop, chunk.copy) == (12, 15, None)
    assert again.cached == 12


def test_the_same_prompt_still_computes_its_last_two_tokens() -> None:
    target = scheduler(prefill_tokens=100)
    first = sequence(30, max_tokens=1)
    target.submit(first)
    run_to_end(target)
    again = sequence(first.tokens[:30], name=1)
    target.submit(again)
    (chunk,) = target.schedule().prefills
    assert (chunk.start, chunk.stop, chunk.is_last) == (28, 30, True)


def test_a_slot_that_would_lose_most_of_what_it_keeps_is_copied_from_instead() -> None:
    target = scheduler(slots=2, prefill_tokens=100)
    long = sequence(90, max_tokens=1)
    target.submit(long)
    run_to_end(target)
    branch = sequence([*long.tokens[:20], 5, 6, 7], name=1)
    target.submit(branch)
    (chunk,) = target.schedule().prefills
    assert branch.slot == 1
    assert chunk.copy == PrefixCopy(source_slot=0, slot=1, start=0, stop=20)
    assert (chunk.start, branch.cached) == (20, 20)
    assert target.kept_tokens(0) == 90


def test_without_copies_the_longest_prefix_is_reused_in_place() -> None:
    target = scheduler(slots=2, prefill_tokens=100, can_copy=False)
    long = sequence(90, max_tokens=1)
    target.submit(long)
    run_to_end(target)
    branch = sequence([*long.tokens[:20], 5, 6, 7], name=1)
    target.submit(branch)
    (chunk,) = target.schedule().prefills
    assert (branch.slot, chunk.copy, chunk.start) == (0, None, 20)


def test_a_running_sequence_gives_its_prefix_to_a_new_one() -> None:
    target = scheduler(slots=2, prefill_tokens=100)
    running = sequence(40, max_tokens=50)
    target.submit(running)
    commit(target, target.schedule())
    twin = sequence(running.tokens[:40], name=1)
    target.submit(twin)
    plan = target.schedule()
    assert plan.decodes == (running,)
    assert plan.prefills[0].copy == PrefixCopy(source_slot=0, slot=1, start=0, stop=38)
    assert (plan.prefills[0].start, plan.prefills[0].stop) == (38, 40)


def test_a_reproducible_sequence_reuses_prompts_but_not_what_was_decoded() -> None:
    target = scheduler(slots=2, prefill_tokens=100)
    first = sequence(20, max_tokens=6)
    target.submit(first)
    run_to_end(target)
    conversation = [*first.tokens, 1, 2, 3]

    def reused(name: int, *, reproducible: bool) -> int:
        each = new_sequence(name, conversation, 1000, 1, reproducible=reproducible)
        target.submit(each)
        run_to_end(target)
        return each.cached

    assert reused(1, reproducible=True) == 20
    assert reused(2, reproducible=True) == len(conversation) - 2  # now a prefill wrote it all


def test_a_prefix_keeps_the_memory_of_decoded_positions_through_copies() -> None:
    target = scheduler(slots=3, prefill_tokens=100)
    first = sequence(20, max_tokens=21)
    target.submit(first)
    run_to_end(target)
    free = new_sequence(1, [*first.tokens[:30], 5, 6, 7], 1000, 50)
    target.submit(free)
    commit(target, target.schedule())
    assert (free.slot, free.cached, free.pure_tokens) == (0, 30, 20)
    strict = new_sequence(2, free.tokens[:33], 1000, 50, reproducible=True)
    target.submit(strict)
    (chunk,) = target.schedule().prefills
    assert chunk.copy is not None
    assert (chunk.copy.stop, strict.cached, strict.pure_tokens) == (20, 20, 33)


def test_equal_prompts_arriving_together_are_computed_once() -> None:
    target = scheduler(slots=4, prefill_tokens=16)
    prompt = list(range(100))
    all_of_them = [sequence(prompt, name=name) for name in range(4)]
    for each in all_of_them:
        target.submit(each)
    computed = 0
    while any(each.stage is not Stage.DECODE for each in all_of_them):
        plan = target.schedule()
        computed += sum(chunk.stop - chunk.start for chunk in plan.prefills)
        target.check_integrity()
        for each in plan.sampled:
            target.append(each, NEW_TOKEN)
            target.finish(each)
            each.stage = Stage.DECODE
    assert 100 <= computed <= 100 + 3 * 16


def test_a_new_conversation_takes_an_empty_slot_first_then_the_least_recently_used() -> None:
    target = scheduler(slots=3, prefill_tokens=100)
    used: list[int] = []
    for name in range(5):
        each = sequence(10, max_tokens=1, name=name)
        target.submit(each)
        plan = target.schedule()
        used.append(each.slot)
        commit(target, plan)
    assert used == [0, 1, 2, 0, 1]


def test_a_discarded_sequence_leaves_nothing_to_reuse() -> None:
    target = scheduler(prefill_tokens=100)
    failed = sequence(30)
    target.submit(failed)
    target.schedule()
    target.discard(failed)
    assert target.kept_tokens(0) == 0
    again = sequence(failed.tokens, name=1)
    target.submit(again)
    assert target.schedule().prefills[0].start == 0


def test_a_sequence_that_outgrows_the_length_of_its_rope_is_prefilled_again() -> None:
    target = scheduler(prefill_tokens=4, rope=RopeLengths(6))
    only, other = sequence(4, max_tokens=5), sequence(2, max_tokens=9, name=1)
    target.submit(only)
    target.submit(other)
    for _ in range(3):  # the prompt, then decodes up to 6 tokens
        commit(target, target.schedule())
    assert (only.stage, len(only.tokens), only.computed) == (Stage.DECODE, 7, 6)
    plan = target.schedule()  # its seventh token is the first with the other frequencies
    assert plan.decodes == (other,)
    assert [(chunk.start, chunk.stop, chunk.is_last) for chunk in plan.prefills] == [(0, 4, False)]
    assert only.rope_length == 7
    commit(target, plan)
    plan = target.schedule()
    assert [(chunk.start, chunk.stop, chunk.is_last) for chunk in plan.prefills] == [(4, 7, True)]
    assert other in plan.decodes
    assert plan.sampled == (*plan.decodes, only)
    commit(target, plan)
    plan = target.schedule()
    assert only in plan.decodes  # once is enough
    commit(target, plan)
    assert only.stage is Stage.FINISHED
    assert only.completion_tokens == 5
    assert only.cached == 0


def test_where_every_length_has_its_own_rope_decoding_goes_on() -> None:
    target = scheduler(rope=RopeLengths(6, grows=True))
    only = sequence(5, max_tokens=4)
    target.submit(only)
    commit(target, target.schedule())
    for _ in range(3):
        plan = target.schedule()
        assert plan.decodes == (only,)
        commit(target, plan)
    assert only.stage is Stage.FINISHED


@pytest.mark.parametrize(
    ("rope", "reused"),
    [
        (SAME_ROPE, [18, 20, 24]),
        (RopeLengths(20), [0, 0, 24]),
        (RopeLengths(20, grows=True), [0, 0, 0]),
    ],
)
def test_only_kv_made_with_the_same_rope_is_reused(rope: RopeLengths, reused: list[int]) -> None:
    target, found = scheduler(slots=3, prefill_tokens=100, rope=rope), []
    text = list(range(40))
    for first, then in ((30, 20), (20, 30), (25, 26)):  # only the last are alike
        target.forget()
        for length in (first, then):
            each = sequence(text[:length], max_tokens=1)
            target.submit(each)
            commit(target, target.schedule())
        found.append(each.cached)
    assert found == reused


def test_the_wait_is_estimated_from_what_running_sequences_have_left() -> None:
    target = scheduler(slots=1, prefill_tokens=10)
    assert target.steps_until_free() == 1
    only = sequence(25, max_tokens=5)
    target.submit(only)
    target.schedule()
    assert target.steps_until_free() == 2 + 5
    endless = scheduler(slots=1, prefill_tokens=10)
    endless.submit(sequence(10, max_tokens=None))
    commit(endless, endless.schedule())
    assert 1 <= endless.steps_until_free() <= 128


def test_common_prefix_finds_the_first_difference_anywhere() -> None:
    base = list(range(2000))
    for position in (0, 1, 511, 512, 513, 1023, 1999):
        other = [*base]
        other[position] = -1
        assert common_prefix(base, other, 2000) == position
    assert common_prefix(base, base, 2000) == 2000
    assert common_prefix(base, base[:700], 2000) == 700
    assert common_prefix(base, base, 5) == 5
