"""The scheduler under random traffic, against a model of what every slot holds."""

from __future__ import annotations

import random

import pytest

from ohmygpu.core.errors import Busy
from ohmygpu.runtime_onnx.scheduler import Scheduler
from ohmygpu.runtime_onnx.sequence import SAME_ROPE, RopeLengths, Sequence, new_sequence


class Simulation:
    """Random traffic with a model of every slot's contents, checked at each step."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.scheduler = Scheduler(
            slots=self.random.randint(1, 5),
            max_queue=self.random.randint(0, 6),
            prefill_tokens=self.random.choice([1, 3, 8, 32, 64]),
            can_copy=self.random.random() < 0.7,
            rope=self.random.choice([SAME_ROPE, RopeLengths(25), RopeLengths(25, grows=True)]),
        )
        self.contents: list[list[int]] = [[] for _ in range(self.scheduler.slots)]
        self.decoded: list[list[bool]] = [[] for _ in range(self.scheduler.slots)]  # by position
        self.ropes: list[list[int]] = [[] for _ in range(self.scheduler.slots)]  # by position
        self.live: list[Sequence] = []
        self.prompts: list[list[int]] = []
        self.names = 0
        self.finished = 0

    def arrive(self) -> None:
        prompt = [self.random.randrange(3) for _ in range(self.random.randint(1, 60))]
        if self.prompts and self.random.random() < 0.6:  # share a prefix with an earlier one
            earlier = self.random.choice(self.prompts)
            prompt = earlier[: self.random.randint(1, len(earlier))] + prompt[:20]
        new = new_sequence(
            self.names,
            prompt,
            120,
            self.random.randint(1, 12),
            reproducible=self.random.random() < 0.4,
        )
        self.names += 1
        before = (self.scheduler.running, self.scheduler.waiting)
        try:
            self.scheduler.submit(new)
        except Busy:
            assert sum(before) == self.scheduler.slots + self.scheduler.max_queue
            return
        self.live.append(new)

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert bool(plan) == bool(self.live)  # whoever is there makes progress
        budget = sum(chunk.stop - chunk.start for chunk in plan.prefills)
        assert budget <= self.scheduler.prefill_tokens
        slots = [each.slot for each in plan.decodes]
        assert len(set(slots)) == len(slots)
        for each in plan.decodes:
            self.write(each, each.computed - 1, each.computed, decoded=True)
        for chunk in plan.prefills:
            if chunk.copy is not None:
                assert self.scheduler.can_copy
                copy = chunk.copy
                source = self.contents[copy.source_slot]
                assert len(source) >= copy.stop
                self.contents[copy.slot][copy.start :] = source[copy.start : copy.stop]
                decoded = self.decoded[copy.source_slot]
                self.decoded[copy.slot][copy.start :] = decoded[copy.start : copy.stop]
                ropes = self.ropes[copy.source_slot]
                self.ropes[copy.slot][copy.start :] = ropes[copy.start : copy.stop]
            self.write(chunk.sequence, chunk.start, chunk.stop)
        for each in plan.sampled:
            assert self.contents[each.slot][: each.computed] == each.tokens
            self.check_rope(each)
            self.scheduler.append(each, self.random.randrange(3))
            if each.is_full:
                self.end(each)

    def write(self, owner: Sequence, start: int, stop: int, *, decoded: bool = False) -> None:
        """KV of [start, stop) is written: what lies before must be that of the same tokens."""
        content = self.contents[owner.slot]
        assert content[:start] == owner.tokens[:start]
        content[start:] = owner.tokens[start:stop]
        self.decoded[owner.slot][start:] = [decoded] * (stop - start)
        length = stop if decoded else owner.prefill_stop
        self.ropes[owner.slot][start:] = [self.scheduler.rope.of_prompt(length)] * (stop - start)
        pure = self.decoded[owner.slot][: owner.pure_tokens]
        assert not any(pure)
        if owner.reproducible:
            assert not any(self.decoded[owner.slot][: min(owner.prompt_tokens, stop)])

    def check_rope(self, owner: Sequence) -> None:
        """Keys have the frequencies transformers gives them: a prompt's, or each its own."""
        rope, found = self.scheduler.rope, self.ropes[owner.slot][: owner.computed]
        if not rope.grows:
            assert set(found) == {rope.of_prompt(owner.computed)}
            return
        prompt = owner.prompt_tokens
        assert set(found[:prompt]) == {rope.of_prompt(prompt)}
        later = range(prompt + 1, owner.computed + 1)
        assert found[prompt:] == [rope.of_prompt(length) for length in later]

    def end(self, each: Sequence) -> None:
        self.prompts.append(list(each.tokens))
        self.live.remove(each)
        if self.random.random() < 0.1:
            self.scheduler.discard(each)
        else:
            self.scheduler.finish(each)
        self.finished += 1


@pytest.mark.parametrize("seed", range(60))
def test_random_traffic_never_contradicts_itself_and_everyone_ends(seed: int) -> None:
    simulation = Simulation(seed)
    for _ in range(120):
        if simulation.random.random() < 0.4:
            simulation.arrive()
        if simulation.live and simulation.random.random() < 0.05:
            simulation.end(simulation.random.choice(simulation.live))
        simulation.step()
        simulation.scheduler.check_integrity()
    for _ in range(2000):
        if not simulation.live:
            break
        simulation.step()
        simulation.scheduler.check_integrity()
    assert simulation.live == []
    assert simulation.finished > 0
    assert simulation.scheduler.free_slots == simulation.scheduler.slots
