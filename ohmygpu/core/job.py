"""Runs one piece of work in a process of its own, told and heard by lines of JSON.

The process gets its memory back to the system when it ends, can be killed at any moment, and takes
nothing with it when it crashes. Its standard input stays open as long as we live: end of file
tells it that we are gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from .child import without_secrets
from .errors import Cancelled, OhMyGPUError, OutOfMemory

Progress = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes)."""

_MAX_LINE_BYTES = 1 << 20
_POLL_S = 0.1  # how long a cancel may wait
_EXIT_S = 10.0  # how long a process that has answered may take to end
_SHOWN_CHARACTERS = 300
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Words:
    """How messages speak of a job."""

    work: str  # "the compile"
    worker: str  # "the compiler"
    again: str  # what to do when it failed: "pull again"


def run_job(
    command: Sequence[str],
    job: Mapping[str, Any],
    result: str,
    progress: Progress,
    cancel: threading.Event,
    words: Words,
) -> Any:
    """Send `job` to the process and return what its last message has under `result`.

    Every line the process prints is a JSON object: {"done_bytes", "total_bytes"} as it goes, then
    one with `result` or with "error". The process is gone when this returns or raises. Raises the
    error it reports; Cancelled; OutOfMemory when the system killed it; OhMyGPUError when it ended
    without an answer.
    """
    with tempfile.TemporaryFile() as log, _process(command, log) as process:
        answer = _converse(process, job, result, progress, cancel, words)
        if answer is None:
            raise _ended(process, log, words)
        if result not in answer:
            raise OhMyGPUError.from_dict(answer["error"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_S)
    return answer[result]


@contextmanager
def _process(command: Sequence[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, running; killed and reaped at the end of the block, however that ends."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=without_secrets(os.environ),
        start_new_session=True,  # Ctrl-C is ours to handle
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            if process.stdin is not None:
                with contextlib.suppress(OSError):  # what it did not read is lost with it
                    process.stdin.close()


def _converse(
    process: subprocess.Popen[bytes],
    job: Mapping[str, Any],
    result: str,
    progress: Progress,
    cancel: threading.Event,
    words: Words,
) -> dict[str, Any] | None:
    """Send the job, report progress; the final message, or None when the process ended without."""
    assert process.stdin is not None
    assert process.stdout is not None
    messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process.stdout, messages), daemon=True)
    reader.start()
    with contextlib.suppress(BrokenPipeError):  # it died at once: its exit status says more
        process.stdin.write(json.dumps(job).encode("utf-8") + b"\n")
        process.stdin.flush()
    try:
        while True:
            if cancel.is_set():
                raise Cancelled(f"{words.work} was cancelled")
            try:
                message = messages.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if message is None or result in message or "error" in message:
                return message
            progress(int(message.get("done_bytes", 0)), int(message.get("total_bytes", 0)))
    finally:
        if sys.exc_info()[0] is not None:
            process.kill()
            reader.join()


def _read(stream: IO[bytes], messages: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Put each message of the process on the queue, then None."""
    with contextlib.suppress(ValueError, OSError):  # closed while we read: the end
        while line := stream.readline(_MAX_LINE_BYTES):
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if isinstance(message, dict):
                messages.put(message)
            else:
                _log.debug("a job printed %r", line[:_SHOWN_CHARACTERS])
    messages.put(None)


def _ended(process: subprocess.Popen[bytes], log: IO[bytes], words: Words) -> OhMyGPUError:
    """The error for a process that ended without an answer."""
    status = process.wait()
    if status == -signal.SIGKILL:
        return OutOfMemory(
            f"{words.work} was killed by the system, most likely for lack of memory; unload models "
            f"(omg stop) or close other programs, then {words.again}"
        )
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - 65536))
    text = log.read().decode("utf-8", "replace").strip()
    if text:
        _log.error("the last words of %s:\n%s", words.worker, text)
    last = "".join(char for char in text.rpartition("\n")[2] if char.isprintable())
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return OhMyGPUError(
        f"{words.worker} stopped unexpectedly ({how})"
        + (f": {last[:_SHOWN_CHARACTERS]}" if last else "")
        + f"; {words.again}, and report it if it stays"
    )
