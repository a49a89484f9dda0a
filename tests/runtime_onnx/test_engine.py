"""The engine: many sequences through one model, each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ohmygpu.core.errors import Busy, ContextLengthExceeded, RuntimeFailure
from ohmygpu.core.records import RunSpec
from ohmygpu.runtime_api import Delta, FinishReason, GenerateRequest, SamplingParams
from ohmygpu.runtime_onnx.engine import Engine, StepOutput
from ohmygpu.runtime_onnx.loading import load_model
from ohmygpu.runtime_onnx.prompt import Prompt
from ohmygpu.runtime_onnx.scheduler import Scheduler

from .tiny_graph import EOS, write_tiny_model

CONTEXT = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, context=CONTEXT)
    return path


@pytest.fixture
def new_engine(folder: Path) -> Callable[..., Engine]:
    def build(**spec: Any) -> Engine:
        options = {"slots": 4, "max_queue": 8, "prefill_tokens": 16, "threads": 1, **spec}
        return load_model(RunSpec(model="tiny", folder=str(folder), **options)).engine

    return build


def request(max_tokens: int | None = 8, temperature: float = 0.0, **fields: Any) -> GenerateRequest:
    sampling = {"stop": fields.pop("stop", ()), "seed": fields.pop("seed", None)}
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, **sampling)
    return GenerateRequest(prompt="", sampling=params, **fields)


def prompt(text: str) -> Prompt:
    return Prompt(list(text.encode()))


class Replies:
    """Collects what an engine says, by request."""

    def __init__(self) -> None:
        self.text: dict[int, str] = {}
        self.last: dict[int, Delta] = {}
        self.tokens: dict[int, int] = {}
        self.errors: dict[int, Exception] = {}

    def take(self, output: StepOutput) -> None:
        for number, delta in output.deltas:
            assert number not in self.last, "a delta after the last one"
            self.text[number] = self.text.get(number, "") + delta.text
            self.tokens[number] = self.tokens.get(number, 0) + delta.completion_tokens
            if delta.finish_reason is not None:
                assert delta.usage is not None
                assert self.tokens[number] == delta.usage.completion_tokens
                self.last[number] = delta
        for number, error in output.errors:
            assert number not in self.errors
            self.errors[number] = error


def drain(engine: Engine, replies: Replies | None = None) -> Replies:
    replies = replies or Replies()
    while engine.has_work:
        replies.take(engine.step())
        engine.scheduler.check_integrity()
    return replies


def answer(engine: Engine, text: str, **fields: Any) -> tuple[str, Delta]:
    engine.submit(1, prompt(text), request(**fields))
    replies = drain(engine)
    assert replies.errors == {}
    return replies.text[1], replies.last[1]


TEXTS = [f"{'once upon a time ' * (number % 3)}there was number {number}" for number in range(8)]


def test_eight_sequences_together_say_what_each_says_alone(
    new_engine: Callable[..., Engine],
) -> None:
    lengths = [5, 20, 11, 30, 7, 16, 25, 9]
    alone = [
        answer(new_engine(), text, max_tokens=length)[0]
        for text, length in zip(TEXTS, lengths, strict=True)
    ]
    engine = new_engine()
    for number, text in enumerate(TEXTS):
        engine.submit(number, prompt(text), request(max_tokens=lengths[number]))
    replies = drain(engine)
    assert [replies.text[number] for number in range(8)] == alone
    assert len(set(alone)) == 8
    assert {delta.finish_reason for delta in replies.last.values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_prefill_budget_does_not_change_the_answer(
    new_engine: Callable[..., Engine], temperature: float
) -> None:
    answers = {
        answer(new_engine(prefill_tokens=budget), "a long prompt " * 6, seed=3,
               temperature=temperature, max_tokens=20)[0]
        for budget in (3, 7, 16, 512)
    }  # fmt: skip
    assert len(answers) == 1


def test_prompt_chunks_shrink_while_others_decode_on_a_slow_machine(folder: Path) -> None:
    spec = RunSpec(model="tiny", folder=str(folder), prefill_tokens=100, threads=1)
    engine = load_model(spec).engine
    now = [0.0]
    engine._clock = lambda: now[0]
    sizes: list[int] = []
    prefill = engine.model.prefill

    def slow(slot: int, tokens: Sequence[int], past: int, *rest: Any) -> None:
        sizes.append(len(tokens))
        now[0] += len(tokens) / 300  # 300 tokens a second: 75 in a quarter of a second
        prefill(slot, tokens, past, *rest)

    engine.model.prefill = slow  # type: ignore[method-assign,assignment]
    engine.submit(1, prompt("x" * 90), request(max_tokens=30))
    replies = Replies()
    replies.take(engine.step())
    engine.submit(2, prompt("y" * 120), request(max_tokens=2))
    drain(engine, replies)
    assert sizes == [90, 75, 45]


def test_a_repeated_prompt_is_reused_and_says_the_same(
    new_engine: Callable[..., Engine],
) -> None:
    engine = new_engine()
    first, cold = answer(engine, "tell me about the sea", max_tokens=20)
    second, warm = answer(engine, "tell me about the sea", max_tokens=20)
    assert second == first
    assert cold.usage is not None
    assert warm.usage is not None
    assert (cold.usage.cached_tokens, warm.usage.cached_tokens) == (0, 19)
    assert warm.usage.prompt_tokens == 21


def test_a_conversation_reuses_what_it_said_before(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    opening = "hello there, how are you"
    said, first = answer(engine, opening, max_tokens=10, temperature=1.0)
    assert first.usage is not None
    _, second = answer(engine, f"{opening}{said} and then", max_tokens=5, temperature=1.0)
    assert second.usage is not None
    assert second.usage.cached_tokens == len(opening) + 9
    _, greedy = answer(engine, f"{opening}{said} and so", max_tokens=5)
    assert greedy.usage is not None
    assert greedy.usage.cached_tokens == len(opening)  # only what no decode wrote


def test_a_greedy_answer_is_the_same_whatever_the_slots_hold(
    new_engine: Callable[..., Engine],
) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    cold, _ = answer(new_engine(), text, max_tokens=30)
    engine = new_engine()
    for number, start in enumerate((5, 17, 30, 40)):
        engine.submit(number, prompt(text[:start] + "xyz"), request(12, temperature=1.0))
    drain(engine)
    warm, last = answer(engine, text, max_tokens=30)
    assert warm == cold
    assert last.usage is not None
    assert last.usage.cached_tokens >= 30


def test_a_twin_of_a_running_sequence_copies_its_prompt(
    new_engine: Callable[..., Engine],
) -> None:
    text = "a prompt long enough to be worth copying between slots"
    alone, _ = answer(new_engine(), text, max_tokens=20)
    engine = new_engine()
    engine.submit(1, prompt(text), request(max_tokens=20))
    replies = Replies()
    for _ in range(6):
        replies.take(engine.step())
    engine.submit(2, prompt(text), request(max_tokens=20))
    while engine.has_work:
        replies.take(engine.step())
    assert replies.text == {1: alone, 2: alone}
    usage = replies.last[2].usage
    assert usage is not None
    assert usage.cached_tokens == len(text) - 2


def test_abort_frees_the_slot_before_the_next_step(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine(slots=1)
    engine.submit(1, prompt("going on forever"), request(max_tokens=None))
    engine.submit(2, prompt("waiting"), request(max_tokens=2))
    for _ in range(3):
        engine.step()
    assert (engine.scheduler.running, engine.scheduler.waiting) == (1, 1)
    engine.abort(1)
    assert engine.scheduler.free_slots == 1
    replies = Replies()
    replies.take(engine.step())  # the very next step runs the other one
    assert (engine.scheduler.running, engine.scheduler.waiting) == (1, 0)
    drain(engine, replies)
    assert set(replies.last) == set(replies.text) == {2}
    engine.abort(1)
    engine.abort(99)


def test_an_end_of_sequence_token_stops_and_is_not_text(
    new_engine: Callable[..., Engine],
) -> None:
    engine = new_engine()
    text, _ = answer(engine, "some words", max_tokens=12)
    stop_at = text[6]
    engine.eos_token_ids = frozenset([ord(stop_at)])
    stopped, last = answer(engine, "some words", max_tokens=12)
    assert stopped == text[: text.index(stop_at)]
    assert last.finish_reason is FinishReason.STOP
    assert last.usage is not None
    assert last.usage.completion_tokens == len(stopped) + 1
    assert EOS not in engine.eos_token_ids


def test_a_stop_string_ends_the_text_before_itself(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    text, _ = answer(engine, "some words", max_tokens=12)
    stop = text[6:9]
    stopped, last = answer(engine, "some words", max_tokens=12, stop=(stop,))
    assert stopped == text[: text.index(stop)]
    assert last.finish_reason is FinishReason.STOP
    held, last = answer(engine, "some words", max_tokens=12, stop=(text[-2:] + "never",))
    assert (held, last.finish_reason) == (text, FinishReason.LENGTH)


def test_a_full_context_ends_with_length(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    text, last = answer(engine, "x" * 100, max_tokens=None)
    assert last.finish_reason is FinishReason.LENGTH
    assert len(text) == CONTEXT - 100
    text, last = answer(engine, "x" * 10, max_tokens=None, context_limit=16)
    assert (len(text), last.finish_reason) == (6, FinishReason.LENGTH)
    again, _ = answer(engine, "x" * 100, max_tokens=None)
    assert len(again) == CONTEXT - 100


def test_no_tokens_asked_for_is_an_immediate_end(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    text, last = answer(engine, "hello", max_tokens=0, return_context=True)
    assert (text, last.finish_reason) == ("", FinishReason.LENGTH)
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 0)
    assert last.context == tuple(b"hello")
    assert engine.steps == 0


def test_the_context_returned_is_prompt_and_completion(new_engine: Callable[..., Engine]) -> None:
    text, last = answer(new_engine(), "hello", max_tokens=4, return_context=True)
    assert last.context == tuple(f"hello{text}".encode())


def test_a_prompt_too_long_is_refused_with_both_numbers(
    new_engine: Callable[..., Engine],
) -> None:
    engine = new_engine()
    with pytest.raises(ContextLengthExceeded) as caught:
        engine.submit(1, prompt("x" * 128), request())
    assert caught.value.details == {"prompt_tokens": 128, "context_tokens": CONTEXT}
    with pytest.raises(ContextLengthExceeded, match="the context holds 8"):
        engine.submit(1, prompt("x" * 8), request(context_limit=8))
    assert not engine.has_work


def test_a_full_queue_says_when_to_come_back(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine(slots=1, max_queue=1)
    replies = Replies()
    for number in (1, 2):
        engine.submit(number, prompt("hello"), request())
        replies.take(engine.step())
    with pytest.raises(Busy) as caught:
        engine.submit(3, prompt("three"), request())
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    assert set(drain(engine, replies).last) == {1, 2}


def test_times_add_up_from_submit_to_last_token(folder: Path) -> None:
    loaded = load_model(RunSpec(model="tiny", folder=str(folder), slots=1, threads=1))
    now = iter(range(1, 1000))
    engine = loaded.engine
    engine._clock = lambda: float(next(now))
    engine.submit(1, prompt("hello"), request(max_tokens=3))
    usage = drain(engine).last[1].usage
    assert usage is not None
    assert min(usage.queue_s, usage.prefill_s, usage.decode_s) > 0


def test_closing_ends_everyone_with_abort(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine(slots=1)
    for number in range(3):
        engine.submit(number, prompt("hello"), request(max_tokens=None))
    engine.step()
    output = engine.abort_all()
    assert [(number, delta.finish_reason) for number, delta in output.deltas] == [
        (number, FinishReason.ABORT) for number in range(3)
    ]
    assert not engine.has_work
    engine.scheduler.check_integrity()


class BrokenText:
    """A text stream that fails at the third token."""

    stopped = False

    def __init__(self) -> None:
        self.pushed = 0

    def push(self, token_id: int) -> str:
        self.pushed += 1
        if self.pushed == 3:
            raise KeyError("no such token")
        return "."

    def finish(self) -> str:
        return ""


def test_a_sequence_whose_text_fails_ends_alone(new_engine: Callable[..., Engine]) -> None:
    engine = new_engine()
    alone, _ = answer(engine, "good", max_tokens=9)
    engine.submit(1, prompt("good"), request(max_tokens=9))
    good_text = engine._new_text
    engine._new_text = lambda prompt_ids, stop: BrokenText()
    engine.submit(2, prompt("bad"), request(max_tokens=9))
    engine._new_text = good_text
    replies = drain(engine)
    assert replies.text[1] == alone
    assert isinstance(replies.errors[2], RuntimeFailure)
    assert engine.scheduler.free_slots == 4


def test_a_row_of_invalid_numbers_ends_only_its_sequence(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine()
    alone, _ = answer(engine, "good", max_tokens=9)
    engine.submit(1, prompt("good"), request(max_tokens=9))
    engine.submit(2, prompt("bad one"), request(max_tokens=9))
    replies = Replies()
    replies.take(engine.step())
    logits = engine.model.logits

    def poisoned(rows: int) -> NDArray[np.float32]:
        result = logits(rows)
        if rows == 2:
            result[1] = np.nan
        return result

    monkeypatch.setattr(engine.model, "logits", poisoned)
    drain(engine, replies)
    assert (replies.text[1], replies.last[1].finish_reason) == (alone, FinishReason.LENGTH)
    assert isinstance(replies.errors[2], RuntimeFailure)


def test_a_failing_model_fails_its_requests_and_serves_the_next(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(slots=2)
    before, _ = answer(engine, "good prompt", max_tokens=9)
    for number in range(3):
        engine.submit(number, prompt("good prompt"), request(max_tokens=9))
    engine.step()

    def fail(*arguments: Any) -> None:
        raise RuntimeError("Non-zero status code returned\nwhile running node 7")

    monkeypatch.setattr(engine.model, "decode", fail)
    output = engine.step()
    assert [number for number, _ in output.errors] == [0, 1]
    assert all("Non-zero status code returned" in error.message for _, error in output.errors)
    monkeypatch.undo()
    assert drain(engine).text[2] == before
    after, _ = answer(engine, "good prompt", max_tokens=9)
    assert after == before
    engine.scheduler.check_integrity()


def test_short_memory_frees_what_idle_slots_keep(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(slots=2)
    text = "a conversation worth keeping"
    answer(engine, text)
    engine._memory_is_short = lambda: engine.scheduler.running > 0
    engine.submit(2, prompt("z" * 30), request(max_tokens=80))
    drain(engine)
    assert engine.steps > 64
    assert engine.model.cache.extent[0] == 0
    _, last = answer(engine, text)
    assert last.usage is not None
    assert last.usage.cached_tokens == 0


def test_the_scheduler_and_the_engine_agree_on_what_runs(
    new_engine: Callable[..., Engine],
) -> None:
    engine = new_engine(slots=2, max_queue=8)
    assert isinstance(engine.scheduler, Scheduler)
    for number in range(6):
        engine.submit(number, prompt("hello " * (1 + number)), request(max_tokens=3 + number))
    seen = 0
    while engine.has_work:
        seen = max(seen, engine.scheduler.running)
        engine.step()
        assert len(engine._generations) == engine.scheduler.running + engine.scheduler.waiting
    assert seen == 2
