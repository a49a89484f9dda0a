"""The process that runs models: `serve`; `probe`, `bench`, `verify`, `calibrate` for install.

    python -m ohmygpu.runtime_onnx.worker serve --fd N '<RunSpec as JSON>'
    python -m ohmygpu.runtime_onnx.worker probe
    python -m ohmygpu.runtime_onnx.worker bench '<RunSpec as JSON>'
    python -m ohmygpu.runtime_onnx.worker verify '<VerifyJob as JSON>' | -
    python -m ohmygpu.runtime_onnx.worker calibrate '<CalibrateJob as JSON>' | -

`serve` speaks runtime_wire over the inherited socket N. The main thread reads frames, prompts are
tokenised on a pool, the engine's thread writes one frame a step. Writing blocks: a parent that does
not read holds the engine up, and memory does not grow. The parent's end is ours: at end of file,
and on Linux at its death, the process exits at once.

`verify` prints JSON lines: {"done_bytes", "total_bytes"} of the text as it goes, then exactly one
of {"fidelity": Fidelity} and {"error"}. With `-` the job is the first line of standard input, and
the process ends when that is closed.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ohmygpu.core.child import die_with_parent
from ohmygpu.core.errors import InvalidRequest, OhMyGPUError, RuntimeFailure
from ohmygpu.core.records import RunSpec
from ohmygpu.runtime_api import (
    RuntimeState,
    embed_request_from_plain,
    request_from_plain,
    to_plain,
)
from ohmygpu.runtime_wire import HEADER, decode_frame, encode_frame, frame_length

from .embed_loop import Outcome
from .engine import StepOutput
from .serving import Loop, load_loop, status_of, submit_to

_logger = logging.getLogger(__name__)

_VECTORS_FRAME_BYTES = 4 << 20
_EXIT_BROKEN = 70  # sysexits: internal software error


class Connection:
    """Frames over a stream socket; `send` may be called from any thread."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream
        self._reader = stream.makefile("rb", buffering=1 << 16)
        self._sending = threading.Lock()

    def send(self, frame: dict[str, Any]) -> None:
        """Send a frame; blocks while the other side does not read. OSError when it is gone."""
        data = encode_frame(frame)
        with self._sending:
            self._socket.sendall(data)

    def receive(self) -> dict[str, Any] | None:
        """The next frame; None at end of file. ValueError when it is not one."""
        header = self._reader.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        length = frame_length(header)
        body = self._reader.read(length)
        return decode_frame(body) if len(body) == length else None


class Worker:
    """Serves one model over a connection."""

    def __init__(self, spec: RunSpec, connection: Connection) -> None:
        self._spec = spec
        self._connection = connection
        self._loop: Loop | None = None
        self._state: RuntimeState = "loading"
        self._detail = ""

    def run(self) -> int:
        """Read frames until the end of file or `unload`; returns the exit status."""
        engine = threading.Thread(target=self._load_and_run, name="engine", daemon=True)
        engine.start()
        while True:
            frame = self._connection.receive()
            if frame is None:
                return 0
            if frame.get("op") == "unload":
                if self._loop is not None:
                    self._loop.close()
                    engine.join()
                return 0
            self._handle(frame)

    def _handle(self, frame: dict[str, Any]) -> None:
        op, request_id = frame.get("op"), frame.get("id")
        if not isinstance(request_id, int):
            raise ValueError(f"a frame {op!r} without an id")
        if op in ("generate", "embed"):
            try:
                self._submit(request_id, op, frame["request"])
            except OhMyGPUError as error:
                self._send_step(StepOutput(errors=[(request_id, error)]))
        elif op == "abort":
            if self._loop is not None:
                self._loop.abort(request_id)
        elif op == "health":
            status: dict[str, Any] = {"state": self._state, "detail": self._detail}
            if self._loop is not None:
                status = to_plain(status_of(self._loop, self._state, self._detail))
            self._connection.send({"op": "health", "id": request_id, "status": status})
        else:
            raise ValueError(f"unknown frame {op!r}")

    def _submit(self, request_id: int, op: str, data: dict[str, Any]) -> None:
        if self._loop is None:
            raise RuntimeFailure(f"{self._spec.model} is not loaded yet")
        read = request_from_plain if op == "generate" else embed_request_from_plain
        try:
            request = read(data)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"not a request: {error}") from error
        submit_to(self._loop, self._spec.model, request_id, request)

    def _load_and_run(self) -> None:
        """The engine's thread: load, say so, run until closed."""
        try:
            loop, caps, note = load_loop(
                self._spec, self._send_step, self._send_embeddings, self._engine_broke
            )
        except OhMyGPUError as error:
            self._load_failed(error)
        except Exception as error:
            _logger.exception("loading %s failed", self._spec.model)
            self._load_failed(RuntimeFailure(f"{self._spec.model} cannot be loaded: {error}"))
        self._detail, self._state = note, "ready"
        self._loop = loop
        self._send_or_exit({"op": "ready", "caps": to_plain(caps)})
        loop.run()

    def _load_failed(self, error: OhMyGPUError) -> NoReturn:
        self._send_or_exit({"op": "failed", "error": error.to_dict()})
        _exit(_EXIT_BROKEN)

    def _send_step(self, output: StepOutput) -> None:
        frame: dict[str, Any] = {
            "op": "step",
            "deltas": [[request_id, to_plain(delta)] for request_id, delta in output.deltas],
        }
        if output.errors:
            frame["errors"] = [[request_id, error.to_dict()] for request_id, error in output.errors]
        self._send_or_exit(frame)

    def _send_embeddings(self, request_id: int, outcome: Outcome) -> None:
        if isinstance(outcome, OhMyGPUError):
            self._send_step(StepOutput(errors=[(request_id, outcome)]))
            return
        vectors, counts = outcome.vectors, outcome.prompt_tokens
        many = max(1, _VECTORS_FRAME_BYTES // len(vectors[0]))
        for start in range(0, len(vectors), many):
            stop = min(start + many, len(vectors))
            data = base64.b64encode(b"".join(vectors[start:stop])).decode("ascii")
            self._send_or_exit(
                {
                    "op": "embedded",
                    "id": request_id,
                    "vectors": data,
                    "prompt_tokens": list(counts[start:stop]),
                    "last": stop == len(vectors),
                }
            )

    def _send_or_exit(self, frame: dict[str, Any]) -> None:
        try:
            self._connection.send(frame)
        except OSError:  # the parent is gone
            _exit(0)

    def _engine_broke(self, error: OhMyGPUError) -> None:
        _logger.critical("%s", error.message)
        _exit(_EXIT_BROKEN)


def serve(fd: int, spec: RunSpec) -> NoReturn:
    """Serve a model over the socket `fd`, then exit."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the daemon's to handle
    signal.signal(signal.SIGTERM, lambda *_: _exit(0))
    worker = Worker(spec, Connection(socket.socket(fileno=fd)))
    try:
        status = worker.run()
    except (OSError, ValueError) as error:
        _logger.critical("the connection to the daemon broke: %s", error)
        status = _EXIT_BROKEN
    _exit(status)


def verify(text: str) -> int:
    """Measure the VerifyJob `text` and print it; the exit status."""
    from .verify import VerifyJob, measure

    def run(job: dict[str, Any], report: Report) -> dict[str, Any]:
        return {"fidelity": to_plain(measure(VerifyJob.from_dict(job), report))}

    return _work(text, run)


def calibrate(text: str) -> int:
    """Do the CalibrateJob `text` and print how many inputs were measured; the exit status."""
    from .calibrate import CalibrateJob
    from .calibrate import calibrate as gather

    def run(job: dict[str, Any], report: Report) -> dict[str, Any]:
        return {"inputs": gather(CalibrateJob.from_dict(job), report)}

    return _work(text, run)


Report = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes)."""


def _work(text: str, run: Callable[[dict[str, Any], Report], dict[str, Any]]) -> int:
    """Run the job `text`, or the one on standard input, with JSON lines for all it has to say."""
    if text == "-":
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        text = sys.stdin.readline()
        threading.Thread(target=_exit_with_stdin, daemon=True).start()

    def write(message: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(message, separators=(",", ":")) + "\n")
        sys.stdout.flush()

    try:
        try:
            job = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"not a job: {error}") from error
        answer = run(job, lambda done, total: write({"done_bytes": done, "total_bytes": total}))
    except OhMyGPUError as error:
        write({"error": error.to_dict()})
        return 1
    write(answer)
    return 0


def _exit_with_stdin() -> None:
    """End when whoever sent the job is gone, whatever the process is doing."""
    while os.read(0, 4096):
        pass
    _exit(_EXIT_BROKEN)


def _exit(status: int) -> NoReturn:
    """End now: no thread inside a model run can hold the process back."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ohmygpu.runtime_onnx.worker")
    commands = parser.add_subparsers(dest="command", required=True)
    serve_parser = commands.add_parser("serve", help="serve a model over an inherited socket")
    serve_parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket")
    serve_parser.add_argument("spec", help="RunSpec as JSON")
    commands.add_parser("probe", help="what this machine can run on, as JSON")
    bench_parser = commands.add_parser("bench", help="measure the engine, as JSON")
    bench_parser.add_argument("spec", help="RunSpec as JSON")
    verify_parser = commands.add_parser("verify", help="compare a graph with float32, as JSON")
    verify_parser.add_argument("job", help="VerifyJob as JSON, or - for a line of standard input")
    calibrate_parser = commands.add_parser("calibrate", help="look into a float32 graph's layers")
    calibrate_parser.add_argument("job", help="CalibrateJob as JSON, or - for standard input")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    if options.command == "serve":
        serve(options.fd, RunSpec.from_json(options.spec))
    if options.command == "verify":
        return verify(options.job)
    if options.command == "calibrate":
        return calibrate(options.job)
    from .bench import measure, probe

    try:
        result = probe() if options.command == "probe" else measure(RunSpec.from_json(options.spec))
    except OhMyGPUError as error:
        result = {"error": error.to_dict()}
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
