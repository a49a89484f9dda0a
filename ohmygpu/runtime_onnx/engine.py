"""The engine: step() = schedule → forward → commit. One thread calls it; it knows no asyncio.

Requests come in as token ids, text goes out: one StepOutput a step for all sequences together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from ohmygpu.core.errors import Busy, OhMyGPUError, RuntimeFailure
from ohmygpu.runtime_api import Delta, FinishReason, GenerateRequest, Usage

from .model import Model
from .prompt import Prompt
from .sampler import SamplerState, sample_rows
from .scheduler import PrefillChunk, Scheduler, StepPlan
from .sequence import Sequence, new_sequence

if TYPE_CHECKING:
    from collections.abc import Sequence as Tokens

_logger = logging.getLogger(__name__)

_MAX_STALL_S = 0.25  # what a step's prompt chunks may add to the time between two tokens
_MIN_CHUNK_TOKENS = 64  # smaller chunks cost too much each
_MEMORY_CHECK_STEPS = 64
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 600.0


class TextRouter(Protocol):
    """Tokens in, text out: the part of TextStream the engine uses."""

    stopped: bool

    def push(self, token_id: int) -> str:
        """Text now safe to send."""
        ...

    def finish(self) -> str:
        """Text still held back."""
        ...


TextFactory = Callable[["Tokens[int]", tuple[str, ...]], TextRouter]  # prompt ids, stop strings


@dataclass(slots=True)
class StepOutput:
    """What a step gives its requests, by request id."""

    deltas: list[tuple[int, Delta]] = field(default_factory=list)
    errors: list[tuple[int, OhMyGPUError]] = field(default_factory=list)

    def ended(self) -> list[int]:
        """The requests that get nothing after this."""
        done = [request_id for request_id, delta in self.deltas if delta.finish_reason]
        return done + [request_id for request_id, _ in self.errors]


@dataclass(slots=True, eq=False)
class _Generation:
    """A request in the engine: its sequence, how it samples, where its text stands, its times."""

    sequence: Sequence
    sampler: SamplerState
    text: TextRouter
    return_context: bool
    dropped_messages: int
    submitted_s: float
    started_s: float | None = None
    first_token_s: float | None = None
    unsent_tokens: int = 0  # tokens whose text is still held back


class Engine:
    """Runs many sequences through one model.

    `new_text` makes the text stream of a sequence; `memory_is_short` is asked now and then: while
    it says so, slots nobody runs in give their memory back; `clock` counts seconds.
    """

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        new_text: TextFactory,
        *,
        context_tokens: int,
        eos_token_ids: Tokens[int],
        memory_is_short: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.context_tokens = context_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.steps = 0
        self.retry_after_s = _MIN_RETRY_S  # what a refused request should wait, as of this step
        self._new_text = new_text
        self._memory_is_short = memory_is_short
        self._clock = clock
        self._generations: dict[int, _Generation] = {}
        self._ended_at_once: list[tuple[int, Delta]] = []
        self._step_s = 0.0  # smoothed duration of a step
        self._prefill_rate = 0.0  # smoothed prompt tokens per second

    @property
    def has_work(self) -> bool:
        """True when `step` has something to do."""
        return self.scheduler.has_work or bool(self._ended_at_once)

    def submit(
        self, request_id: int, prompt: Prompt, request: GenerateRequest, submitted_s: float = 0.0
    ) -> None:
        """Take a request; `submitted_s` is when it arrived, by the engine's clock (0 = now).

        Raises ContextLengthExceeded when the prompt does not fit, Busy when the queue is full.
        """
        params = request.sampling
        sequence = new_sequence(
            request_id,
            prompt.token_ids,
            self.context_limit(request),
            params.max_tokens,
            reproducible=params.seed is not None or params.temperature == 0,
        )
        if sequence.is_full:  # max_tokens = 0
            usage = Usage(
                prompt_tokens=sequence.prompt_tokens,
                completion_tokens=0,
                dropped_messages=prompt.dropped_messages,
            )
            context = tuple(sequence.tokens) if request.return_context else None
            delta = Delta(finish_reason=FinishReason.LENGTH, usage=usage, context=context)
            self._ended_at_once.append((request_id, delta))
            return
        generation = _Generation(
            sequence=sequence,
            sampler=SamplerState(params, self.model.vocab_size, prompt.token_ids),
            text=self._new_text(prompt.token_ids, params.stop),
            return_context=request.return_context,
            dropped_messages=prompt.dropped_messages,
            submitted_s=submitted_s or self._clock(),
        )
        try:
            self.scheduler.submit(sequence)
        except Busy as error:
            raise Busy(error.message, retry_after_s=self.retry_after_s) from None
        self._generations[request_id] = generation

    def context_limit(self, request: GenerateRequest) -> int:
        """The context of a request in tokens: the engine's, or less where it asks for less."""
        if request.context_limit is None:
            return self.context_tokens
        return min(self.context_tokens, request.context_limit)

    def abort(self, request_id: int) -> None:
        """End a request without output; its slot is free at the next step. Unknown ids are fine."""
        generation = self._generations.pop(request_id, None)
        if generation is not None:
            self.scheduler.finish(generation.sequence)
        self._ended_at_once = [entry for entry in self._ended_at_once if entry[0] != request_id]

    def abort_all(self) -> StepOutput:
        """End every request with FinishReason.ABORT."""
        output = StepOutput(deltas=self._ended_at_once)
        self._ended_at_once = []
        for generation in list(self._generations.values()):
            self._finish(generation, FinishReason.ABORT, "", output)
        return output

    def step(self) -> StepOutput:
        """Compute one step and return what it gives each request.

        Never raises for what happens inside the model or one sequence: those requests get an error.
        """
        started_s = self._clock()
        output = StepOutput(deltas=self._ended_at_once)
        self._ended_at_once = []
        plan = self.scheduler.schedule(self._prefill_budget())
        if plan:
            if self._forward(plan, started_s, output):
                self._commit(plan, output)
            self.steps += 1
            if self.steps % _MEMORY_CHECK_STEPS == 0 and self._memory_is_short():
                self._release_free_slots()
            self._time_step(self._clock() - started_s)
        return output

    # forward

    def _prefill_budget(self) -> int | None:
        """Prompt tokens of the next step: as many as run in _MAX_STALL_S while others decode."""
        if not self.scheduler.decoding or not self._prefill_rate:
            return None
        return max(_MIN_CHUNK_TOKENS, int(self._prefill_rate * _MAX_STALL_S))

    def _forward(self, plan: StepPlan, started_s: float, output: StepOutput) -> bool:
        """Run the plan; False when the model failed and all its requests were told so."""
        for chunk in plan.prefills:
            generation = self._generations[chunk.sequence.sequence_id]
            if generation.started_s is None:
                generation.started_s = started_s
        try:
            if plan.decodes:
                self.model.decode(
                    [sequence.slot for sequence in plan.decodes],
                    [sequence.tokens[-1] for sequence in plan.decodes],
                    [sequence.computed - 1 for sequence in plan.decodes],
                )
            row = len(plan.decodes)
            for chunk in plan.prefills:
                self._prefill(chunk, row)
                row += chunk.is_last
        except Exception as error:
            _logger.exception("a step of %d decodes failed", len(plan.decodes))
            failure = _failure("the model failed to run", error)
            sequences = (*plan.decodes, *(chunk.sequence for chunk in plan.prefills))
            for sequence in sequences:
                self._fail(self._generations[sequence.sequence_id], failure, output)
            return False
        return True

    def _prefill(self, chunk: PrefillChunk, row: int) -> None:
        sequence, cache = chunk.sequence, self.model.cache
        if chunk.copy is not None:
            copy = chunk.copy
            cache.copy(copy.source_slot, copy.slot, copy.start, copy.stop)
        if cache.extent[sequence.slot] > sequence.prefill_stop:
            cache.release(sequence.slot, sequence.prefill_stop)  # a longer predecessor's rest
        tokens = sequence.tokens[chunk.start : chunk.stop]
        started_s = self._clock()
        logits_row = row if chunk.is_last else None
        self.model.prefill(sequence.slot, tokens, chunk.start, logits_row, sequence.rope_length)
        if len(tokens) >= _MIN_CHUNK_TOKENS:
            rate = len(tokens) / max(self._clock() - started_s, 1e-6)
            self._prefill_rate += (rate - self._prefill_rate) * (0.3 if self._prefill_rate else 1.0)

    # commit

    def _commit(self, plan: StepPlan, output: StepOutput) -> None:
        """Sample a token for every sequence that got logits and route it into text."""
        generations = [self._generations[sequence.sequence_id] for sequence in plan.sampled]
        if not generations:
            return
        tokens = self._sample(generations, output)
        now_s = self._clock()
        for generation, token in zip(generations, tokens, strict=True):
            if token is None:
                continue
            try:
                self._accept(generation, token, now_s, output)
            except Exception as error:
                _logger.exception("request %d failed", generation.sequence.sequence_id)
                self._fail(generation, _failure("the answer cannot be written", error), output)

    def _sample(self, generations: list[_Generation], output: StepOutput) -> list[int | None]:
        """A token for each row of logits; None for a row whose request had to be ended."""
        logits = self.model.logits(len(generations))
        try:
            states = [generation.sampler for generation in generations]
            return [int(token) for token in sample_rows(logits, states)]
        except Exception:
            if len(generations) > 1:
                _logger.exception("sampling %d rows failed; one by one now", len(generations))
        tokens: list[int | None] = []
        for row, generation in enumerate(generations):  # so that only the guilty row ends
            try:
                tokens.append(int(sample_rows(logits[row : row + 1], [generation.sampler])[0]))
            except Exception as error:
                _logger.exception("sampling request %d failed", generation.sequence.sequence_id)
                self._fail(generation, _failure("no next token can be chosen", error), output)
                tokens.append(None)
        return tokens

    def _accept(
        self, generation: _Generation, token: int, now_s: float, output: StepOutput
    ) -> None:
        sequence = generation.sequence
        if generation.first_token_s is None:
            generation.first_token_s = now_s
        self.scheduler.append(sequence, token)
        generation.sampler.accept(token)
        generation.unsent_tokens += 1
        if token in self.eos_token_ids:
            self._finish(generation, FinishReason.STOP, generation.text.finish(), output)
            return
        text = generation.text.push(token)
        if generation.text.stopped:
            self._finish(generation, FinishReason.STOP, text, output)
        elif sequence.is_full:
            text += generation.text.finish()
            self._finish(generation, FinishReason.LENGTH, text, output)
        elif text:
            delta = Delta(text=text, completion_tokens=generation.unsent_tokens)
            generation.unsent_tokens = 0
            output.deltas.append((sequence.sequence_id, delta))

    def _finish(
        self, generation: _Generation, reason: FinishReason, text: str, output: StepOutput
    ) -> None:
        sequence = generation.sequence
        delta = Delta(
            text=text,
            completion_tokens=generation.unsent_tokens,
            finish_reason=reason,
            usage=self._usage(generation),
            context=tuple(sequence.tokens) if generation.return_context else None,
        )
        output.deltas.append((sequence.sequence_id, delta))
        self.scheduler.finish(sequence)
        del self._generations[sequence.sequence_id]

    def _fail(self, generation: _Generation, error: OhMyGPUError, output: StepOutput) -> None:
        sequence = generation.sequence
        output.errors.append((sequence.sequence_id, error))
        self.scheduler.discard(sequence)
        del self._generations[sequence.sequence_id]

    def _usage(self, generation: _Generation) -> Usage:
        sequence, now_s = generation.sequence, self._clock()
        started_s = now_s if generation.started_s is None else generation.started_s
        first_s = now_s if generation.first_token_s is None else generation.first_token_s
        return Usage(
            prompt_tokens=sequence.prompt_tokens,
            completion_tokens=sequence.completion_tokens,
            cached_tokens=sequence.cached,
            dropped_messages=generation.dropped_messages,
            queue_s=started_s - generation.submitted_s,
            prefill_s=first_s - started_s,
            decode_s=now_s - first_s,
        )

    def _release_free_slots(self) -> None:
        """Give back the memory of slots kept only for prompts that may start alike."""
        for slot in self.scheduler.forget():
            self.model.cache.release(slot, 0)

    def _time_step(self, seconds: float) -> None:
        self._step_s += (seconds - self._step_s) * (0.1 if self._step_s else 1.0)
        if self.scheduler.waiting:
            wait_s = self._step_s * self.scheduler.steps_until_free()
            self.retry_after_s = min(max(wait_s, _MIN_RETRY_S), _MAX_RETRY_S)


def _failure(what: str, error: Exception) -> OhMyGPUError:
    """`error` itself where it is one of ours, else a RuntimeFailure that begins with `what`."""
    if isinstance(error, OhMyGPUError):
        return error
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return RuntimeFailure(f"{what}: {reason}")
