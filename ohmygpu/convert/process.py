"""Runs a compile in a process of its own: `python -m ohmygpu.convert`, told and heard by JSON.

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
from pathlib import Path
from typing import IO, Any

from ohmygpu.core.child import python_module, without_secrets
from ohmygpu.core.errors import Cancelled, OhMyGPUError, OutOfMemory
from ohmygpu.core.records import CompiledModel

COMPILER = python_module("ohmygpu.convert")

_MAX_LINE_BYTES = 1 << 20
_POLL_S = 0.1  # how long a cancel may wait
_EXIT_S = 10.0  # how long a compiler that has answered may take to end
_SHOWN_CHARACTERS = 300
_log = logging.getLogger(__name__)


def compile_in_subprocess(
    files: Mapping[str, Path],
    output: Path,
    recipe: str,
    target: str,
    progress: Callable[[int, int], None],
    cancel: threading.Event,
    command: Sequence[str] | None = None,
) -> CompiledModel:
    """`compile_model` in a subprocess, which is gone when this returns or raises.

    Raises what the compile raises; Cancelled; OutOfMemory when the system killed it; OhMyGPUError
    when it ended without an answer.
    """
    job = {
        "files": {name: str(path) for name, path in files.items()},
        "output": str(output),
        "recipe": recipe,
        "target": target,
    }
    with tempfile.TemporaryFile() as log, _process(command or COMPILER, log) as process:
        answer = _converse(process, job, progress, cancel)
        if answer is None or "compiled" not in answer:
            if answer is not None:
                raise OhMyGPUError.from_dict(answer["error"])
            raise _ended(process, log)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_S)
    return CompiledModel.load(output)


@contextmanager
def _process(command: Sequence[str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The compiler, running; killed and reaped at the end of the block, however that ends."""
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
    job: dict[str, Any],
    progress: Callable[[int, int], None],
    cancel: threading.Event,
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
                raise Cancelled("the compile was cancelled")
            try:
                message = messages.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if message is None or "compiled" in message or "error" in message:
                return message
            progress(int(message.get("done_bytes", 0)), int(message.get("total_bytes", 0)))
    finally:
        if sys.exc_info()[0] is not None:
            process.kill()
            reader.join()


def _read(stream: IO[bytes], messages: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Put each message of the compiler on the queue, then None."""
    with contextlib.suppress(ValueError, OSError):  # closed while we read: the end
        while line := stream.readline(_MAX_LINE_BYTES):
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if isinstance(message, dict):
                messages.put(message)
            else:
                _log.debug("the compiler printed %r", line[:_SHOWN_CHARACTERS])
    messages.put(None)


def _ended(process: subprocess.Popen[bytes], log: IO[bytes]) -> OhMyGPUError:
    """The error for a compiler that ended without an answer."""
    status = process.wait()
    if status == -signal.SIGKILL:
        return OutOfMemory(
            "the compile was killed by the system, most likely for lack of memory; unload models "
            "(omg stop) or close other programs, then pull again"
        )
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - 65536))
    text = log.read().decode("utf-8", "replace").strip()
    if text:
        _log.error("the compiler's last words:\n%s", text)
    last = "".join(char for char in text.rpartition("\n")[2] if char.isprintable())
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return OhMyGPUError(
        f"the compiler stopped unexpectedly ({how})"
        + (f": {last[:_SHOWN_CHARACTERS]}" if last else "")
        + "; pull again, and report it if it stays"
    )
