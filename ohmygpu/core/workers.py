"""A few threads that do jobs until they are stopped, and end even when one of them hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Job = Callable[[], None]

_JOIN_S = 0.5
_IDLE_S = 1.0


class Workers:
    """Threads that ask for jobs. The first error stops all and is kept in `error`.

    The last thread to end calls `at_end`, which may be after `end` has returned: a thread that
    waits for a silent server is not waited for.
    """

    def __init__(self, count: int, at_end: Callable[[], None]) -> None:
        self.count = count
        self.changed = threading.Condition()
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._alive = 0
        self._at_end = at_end
        self._threads: list[threading.Thread] = []

    def start(self, next_job: Callable[[], Job | None]) -> None:
        """Start. `next_job` is called with `changed` held; None means nothing to do for now."""
        self._alive = self.count
        for number in range(self.count):
            thread = threading.Thread(
                target=self._run, args=(next_job,), name=f"download-{number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def end(self) -> None:
        """Stop all; what a late thread still does must be without effect."""
        self.stop.set()
        with self.changed:
            self.changed.notify_all()
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not self._threads:
            self._at_end()

    def _run(self, next_job: Callable[[], Job | None]) -> None:
        try:
            while not self.stop.is_set():
                with self.changed:
                    job = next_job()
                    if job is None:
                        self.changed.wait(_IDLE_S)
                        continue
                job()
                with self.changed:
                    self.changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again on the calling thread
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()
            self.stop.set()
        finally:
            with self.changed:
                self._alive -= 1
                is_last = self._alive == 0
            if is_last:
                self._at_end()
