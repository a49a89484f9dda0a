"""EmbedLoop: an embedding model on a thread of its own, fed from other threads.

Texts of all requests wait together and run in batches of about one length; a request ends when
the last of its texts has run. Tokenising happens on a small pool.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ohmygpu.core.errors import Busy, InvalidRequest, OhMyGPUError, RuntimeFailure
from ohmygpu.runtime_api import EmbedRequest, EmbedResult

from .batches import Pending
from .embed_input import check_dimensions, finish, framing, prepare_inputs
from .embedder import LoadedEmbedder

_logger = logging.getLogger(__name__)

_PREPARE_THREADS = 2

Outcome = EmbedResult | OhMyGPUError
Publish = Callable[[int, Outcome], None]


@dataclass(slots=True)
class _Job:
    """A request whose texts wait or run."""

    request: EmbedRequest
    rows: list[list[int]]
    vectors: list[bytes] = field(default_factory=list)
    missing: int = 0


class EmbedLoop:
    """Runs an embedding model until closed.

    `publish` gets what became of each request, once, from any of the loop's threads. Should the
    loop itself break, all requests are told, then `fail` is called.
    """

    def __init__(
        self,
        loaded: LoadedEmbedder,
        publish: Publish,
        fail: Callable[[OhMyGPUError], None] = lambda error: None,
    ) -> None:
        self.loaded = loaded
        self.error: OhMyGPUError | None = None  # what broke the loop
        self.steps = 0  # runs of the model since load
        self._around = framing(loaded.tokenizer)
        self._publish = publish
        self._fail = fail
        self._wake = threading.Condition()
        self._pending = Pending()
        self._jobs: dict[int, _Job | None] = {}  # None: being tokenised
        self._closing = False
        self._pool = ThreadPoolExecutor(_PREPARE_THREADS, thread_name_prefix="prompt")
        self._thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the loop's thread (or call `run` on a thread of your own)."""
        self._thread.start()

    def close(self) -> None:
        """Fail all requests and stop; idempotent, returns when it has."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def submit(self, request_id: int, request: EmbedRequest) -> None:
        """Take a request; what becomes of it is published.

        Raises Busy at once when the queue is full, InvalidRequest for dimensions the model does
        not have, RuntimeFailure when the loop is closing.
        """
        caps = self.loaded.caps
        check_dimensions(request, caps.embedding_length)
        with self._wake:
            if self._closing:
                raise self.error or RuntimeFailure("the model is being unloaded")
            if len(self._jobs) >= caps.slots + caps.max_queue:
                raise Busy(
                    f"{len(self._jobs)} requests are running or waiting, as many as this model "
                    "takes; try again later",
                    retry_after_s=1,
                )
            self._jobs[request_id] = None
        self._pool.submit(self._prepare, request_id, request)

    def abort(self, request_id: int) -> None:
        """Drop a request; nothing of it is published any more."""
        with self._wake:
            if self._jobs.pop(request_id, None) is not None:
                self._pending.drop(request_id)

    @property
    def running(self) -> int:
        """Requests of which something waits or runs."""
        return sum(job is not None for job in self._jobs.copy().values())

    @property
    def waiting(self) -> int:
        """Requests being tokenised."""
        return sum(job is None for job in self._jobs.copy().values())

    @property
    def free_slots(self) -> int:
        """Requests that could start now without waiting for the queue."""
        return max(0, self.loaded.caps.slots - len(self._jobs))

    def run(self) -> None:
        """The loop's thread: one batch after the other, until closed."""
        try:
            while self._run_batch():
                pass
            self._end_all(RuntimeFailure("the model was unloaded; send the request again"))
        except Exception as error:
            _logger.exception("the embedding loop broke")
            self.error = RuntimeFailure(f"the embedding loop broke: {error}")
            with self._wake:
                self._closing = True
            self._end_all(self.error)
            self._fail(self.error)

    def _run_batch(self) -> bool:
        """Wait for texts and run some of them; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or len(self._pending))
            if self._closing:
                return False
            batch = self._pending.take(self.loaded.batch_tokens)
            jobs = [(self._jobs.get(item.request_id), item) for item in batch]
        live = [(job, item) for job, item in jobs if job is not None]
        try:
            vectors = self.loaded.model.run([job.rows[item.index] for job, item in live])
        except OhMyGPUError as error:
            for request_id in dict.fromkeys(item.request_id for _, item in live):
                self._end(request_id, error)
            return True
        self.steps += 1
        for (job, item), vector in zip(live, vectors, strict=True):
            job.vectors[item.index] = finish(vector[None], job.request).tobytes()
            job.missing -= 1
            if not job.missing:
                lengths = tuple(len(row) for row in job.rows)
                result = EmbedResult(vectors=tuple(job.vectors), prompt_tokens=lengths)
                self._end(item.request_id, result)
        return True

    def _prepare(self, request_id: int, request: EmbedRequest) -> None:
        """Tokenise on a pool thread and put the texts among the others."""
        loaded = self.loaded
        try:
            rows = prepare_inputs(
                request,
                loaded.tokenizer,
                self._around,
                loaded.caps.context_tokens,
                loaded.lower_case,
            )
        except OhMyGPUError as error:
            self._end(request_id, error)
            return
        except Exception as error:
            _logger.exception("preparing request %d failed", request_id)
            self._end(request_id, InvalidRequest(f"the texts cannot be tokenised: {error}"))
            return
        with self._wake:
            if request_id not in self._jobs or self._closing:  # aborted meanwhile, or ended soon
                return
            self._jobs[request_id] = _Job(request, rows, [b""] * len(rows), len(rows))
            self._pending.add(request_id, [len(row) for row in rows])
            self._wake.notify_all()

    def _end(self, request_id: int, outcome: Outcome) -> None:
        """Publish what became of a request, unless somebody aborted it."""
        with self._wake:
            if request_id not in self._jobs:
                return
            del self._jobs[request_id]
            if isinstance(outcome, OhMyGPUError):
                self._pending.drop(request_id)
        self._publish(request_id, outcome)

    def _end_all(self, error: OhMyGPUError) -> None:
        for request_id in sorted(self._jobs.copy()):
            self._end(request_id, error)
