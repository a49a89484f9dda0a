"""EngineLoop: the engine on a thread of its own, fed from other threads.

Tokenising happens on a small pool, so that a long prompt does not hold up the tokens of others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

from ohmygpu.core.errors import Busy, OhMyGPUError, RuntimeFailure
from ohmygpu.runtime_api import Delta, FinishReason, GenerateRequest, Usage

from .engine import Engine, StepOutput
from .prompt import Encoder, prepare_prompt

_logger = logging.getLogger(__name__)

_PREPARE_THREADS = 2

Publish = Callable[[StepOutput], None]


class EngineLoop:
    """Runs an engine until closed.

    `publish` gets each step's output on the engine's thread (errors of a single request may come
    from another); it may block, which holds the engine and nothing else. Should the engine itself
    break, its requests are told, then `fail` is called.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        publish: Publish,
        fail: Callable[[OhMyGPUError], None] = lambda error: None,
    ) -> None:
        self.engine = engine
        self.error: OhMyGPUError | None = None  # what broke the engine
        self._encoder = encoder
        self._publish = publish
        self._fail = fail
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], StepOutput | None]] = []
        self._active: set[int] = set()  # submitted and not ended, prompts in preparation included
        self._closing = False
        self._pool = ThreadPoolExecutor(_PREPARE_THREADS, thread_name_prefix="prompt")
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread (or call `run` on a thread of your own)."""
        self._thread.start()

    def close(self) -> None:
        """End all requests with FinishReason.ABORT and stop; idempotent, returns when it has."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, request_id: int, request: GenerateRequest) -> None:
        """Take a request; all that becomes of it is published.

        Raises Busy at once when the queue is full, RuntimeFailure when the loop is closing.
        """
        scheduler = self.engine.scheduler
        with self._wake:
            if self._closing:
                raise self.error or RuntimeFailure("the model is being unloaded")
            if len(self._active) >= scheduler.slots + scheduler.max_queue:
                raise Busy(
                    f"{len(self._active)} requests are running or waiting, as many as this model "
                    "takes; try again later",
                    retry_after_s=self.engine.retry_after_s,
                )
            self._active.add(request_id)
        self._pool.submit(self._prepare, request_id, request, monotonic())

    def abort(self, request_id: int) -> None:
        """End a request; nothing more of it is published once the running step is over."""
        with self._wake:
            if request_id not in self._active:
                return
            self._active.discard(request_id)
            self._inbox.append(lambda: self.engine.abort(request_id))
            self._wake.notify()

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self.engine.scheduler.running

    @property
    def waiting(self) -> int:
        """Requests without a slot, those being tokenised included."""
        return max(0, len(self._active) - self.running)

    @property
    def free_slots(self) -> int:
        """Sequences that could start now."""
        return self.engine.scheduler.free_slots

    @property
    def steps(self) -> int:
        """Engine steps since load."""
        return self.engine.steps

    def run(self) -> None:
        """The engine's thread: commands, then a step, until closed."""
        try:
            while self._next_turn():
                if self.engine.has_work:
                    self._emit(self.engine.step())
            self._end_all()
        except Exception as error:
            _logger.exception("the engine broke")
            self._break(RuntimeFailure(f"the engine broke: {error}"))

    def _next_turn(self) -> bool:
        """Wait for work and carry out commands; False when closing."""
        with self._wake:
            if not (self._inbox or self._closing or self.engine.has_work):
                self.engine.scheduler.check_integrity()
                self._wake.wait_for(lambda: self._inbox or self._closing)
            if self._closing:
                return False
            commands, self._inbox = self._inbox, []
        for command in commands:
            output = command()
            if output is not None:
                self._emit(output)
        return True

    def _prepare(self, request_id: int, request: GenerateRequest, submitted_s: float) -> None:
        """Tokenise on a pool thread and hand over to the engine."""
        try:
            limit = self.engine.context_limit(request)
            prompt = prepare_prompt(request, self._encoder, limit)
        except OhMyGPUError as error:
            self._emit(StepOutput(errors=[(request_id, error)]))
            return
        except Exception as error:
            _logger.exception("preparing request %d failed", request_id)
            failure = RuntimeFailure(f"the prompt cannot be prepared: {error}")
            self._emit(StepOutput(errors=[(request_id, failure)]))
            return

        def submit() -> StepOutput | None:
            if request_id not in self._active:  # aborted while it was being prepared
                return None
            try:
                self.engine.submit(request_id, prompt, request, submitted_s)
            except OhMyGPUError as error:
                return StepOutput(errors=[(request_id, error)])
            return None

        with self._wake:
            self._inbox.append(submit)
            self._wake.notify()

    def _emit(self, output: StepOutput) -> None:
        """Publish what belongs to requests nobody aborted meanwhile."""
        with self._wake:
            active = self._active
            deltas = [entry for entry in output.deltas if entry[0] in active]
            errors = [entry for entry in output.errors if entry[0] in active]
            active.difference_update(output.ended())
        if deltas or errors:
            self._publish(StepOutput(deltas, errors))

    def _end_all(self) -> None:
        """FinishReason.ABORT for all, those whose prompt is still being prepared included."""
        self._emit(self.engine.abort_all())
        with self._wake:
            ids = sorted(self._active)
        usage = Usage(prompt_tokens=0, completion_tokens=0)
        ended = Delta(finish_reason=FinishReason.ABORT, usage=usage)
        self._emit(StepOutput(deltas=[(request_id, ended) for request_id in ids]))

    def _break(self, error: OhMyGPUError) -> None:
        self.error = error
        with self._wake:
            self._closing = True
            ids = sorted(self._active)
        self._emit(StepOutput(errors=[(request_id, error) for request_id in ids]))
        self._fail(error)
