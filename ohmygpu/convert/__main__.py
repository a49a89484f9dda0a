"""`python -m ohmygpu.convert`: one compile in a process of its own.

The first line of standard input is the job:

    {"files": {name: path}, "output": folder, "recipe": name, "target": "cpu" | "cuda",
     "calibration": folder or absent, "show_inputs": true or absent, "exporter": command or absent}

Standard output carries JSON lines: {"done_bytes", "total_bytes"} as it goes, then exactly one of
{"compiled": CompiledModel} and {"error": OhMyGPUError}. The process ends, leaving its output
folder to whoever started it, as soon as standard input is closed: its parent is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ohmygpu.core.child import die_with_parent
from ohmygpu.core.errors import InvalidRequest, OhMyGPUError, OutOfMemory, RuntimeFailure

_PROGRESS_INTERVAL_S = 0.1
_NICENESS = 5  # a compile yields to the models being served


def main() -> int:
    """Read a job, compile, report. Returns 0, or 1 after an error line."""
    _settle_in()
    job = sys.stdin.buffer.readline()
    threading.Thread(target=_watch_stdin, daemon=True).start()
    output = _take_stdout()
    try:
        answer: dict[str, Any] = {"compiled": _compile(_parse(job), output)}
    except OhMyGPUError as error:
        answer = {"error": error.to_dict()}
    except MemoryError:
        shortage = OutOfMemory("not enough memory to compile; stop other programs and pull again")
        answer = {"error": shortage.to_dict()}
    except Exception as error:  # noqa: BLE001 (the parent needs an answer, whatever happened)
        traceback.print_exc()
        failure = RuntimeFailure(f"the compile failed: {type(error).__name__}: {error}")
        answer = {"error": failure.to_dict()}
    _write(output, answer)
    return 1 if "error" in answer else 0


def _parse(line: bytes) -> dict[str, Any]:
    try:
        job = json.loads(line)
        files = {str(name): Path(path) for name, path in job["files"].items()}
        return {
            "files": files,
            "output": Path(job["output"]),
            "recipe": str(job["recipe"]),
            "target": str(job["target"]),
            "calibration": Path(job["calibration"]) if job.get("calibration") else None,
            "show_inputs": bool(job.get("show_inputs")),
            "exporter": [str(word) for word in job.get("exporter") or ()],
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"not a compile job: {type(error).__name__}: {error}") from error


def _compile(job: Mapping[str, Any], output: TextIO) -> dict[str, Any]:
    from .compile import compile_model
    from .exported import compile_exported

    last = 0.0

    def report(done_bytes: int, total_bytes: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PROGRESS_INTERVAL_S or done_bytes == total_bytes:
            last = now
            _write(output, {"done_bytes": done_bytes, "total_bytes": total_bytes})

    plain = dict(job)
    exporter = plain.pop("exporter")
    if exporter:
        return asdict(compile_exported(job["files"], job["output"], exporter, report))
    return asdict(compile_model(progress=report, **plain))


def _write(output: TextIO, message: Mapping[str, Any]) -> None:
    output.write(json.dumps(message, separators=(",", ":")) + "\n")
    output.flush()


def _take_stdout() -> TextIO:
    """Standard output for messages alone: whatever else prints goes to standard error."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return messages


def _watch_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _settle_in() -> None:
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


if __name__ == "__main__":
    sys.exit(main())
