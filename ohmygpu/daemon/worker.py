"""A model in a process of its own: the Runtime protocol, spoken over a private socket.

The daemon starts `python -m ohmygpu.runtime_onnx.worker serve`, hands it one end of a socket pair
and exchanges frames (runtime_wire). A crash or an out-of-memory kill in native code ends that
process only: its requests fail with a sentence, the daemon and other models carry on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import signal
import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from ohmygpu import runtime_wire as wire
from ohmygpu.core.child import python_module, without_secrets
from ohmygpu.core.errors import InvalidRequest, OhMyGPUError, RuntimeFailure
from ohmygpu.core.records import RunSpec
from ohmygpu.runtime_api import (
    Delta,
    EmbedRequest,
    EmbedResult,
    FinishReason,
    GenerateRequest,
    RuntimeCaps,
    RuntimeState,
    RuntimeStatus,
    delta_from_plain,
    to_plain,
)

from .mailbox import Mailbox, Vectors

LOAD_TIMEOUT_S = 600.0
HEALTH_TIMEOUT_S = 1.0
EXIT_TIMEOUT_S = 5.0  # after "unload", before SIGTERM
TERM_TIMEOUT_S = 2.0  # after SIGTERM, before SIGKILL
_LOG_READ_BYTES = 8192
_LOG_LINE_BYTES = 4096
_HUGE_PAGES = "glibc.malloc.hugetlb=1"  # weights in huge pages: 5 to 8 % faster decode

_logger = logging.getLogger("ohmygpu.worker")


class WorkerRuntime:
    """Runtime of one compiled model in a worker process. All methods run on one asyncio loop.

    After the process has died, `load` starts a fresh one. `command` replaces the program to run
    (`serve --fd N <RunSpec json>` is appended).
    """

    def __init__(self, spec: RunSpec, command: Sequence[str] | None = None) -> None:
        self.spec = spec
        self._command = tuple(command or python_module("ohmygpu.runtime_onnx.worker"))
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._caps: RuntimeCaps | None = None
        self._ready: asyncio.Future[RuntimeCaps] | None = None
        self._ended: asyncio.Event | None = None
        self._load_lock = asyncio.Lock()
        self._unloading = False
        self._state_detail = ""
        self._next_id = 0
        self._running: dict[int, Mailbox] = {}
        self._embedding: dict[int, Vectors] = {}
        self._health: dict[int, asyncio.Future[RuntimeStatus]] = {}
        self._last_status = RuntimeStatus(state="unloaded")

    @property
    def pid(self) -> int | None:
        """The worker's process id while there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        """Whether the model is loaded and its process, as far as we know, lives."""
        return self._caps is not None

    async def load(self) -> RuntimeCaps:
        """Start the worker and wait until the model is loaded; idempotent.

        Raises what the worker reports (RuntimeFailure, OutOfMemory, CorruptFile), or RuntimeFailure
        when it dies or does not answer.
        """
        async with self._load_lock:
            if self._caps is not None:
                return self._caps
            await self._start()
            assert self._ready is not None
            try:
                async with asyncio.timeout(LOAD_TIMEOUT_S):
                    self._caps = await self._ready
            except TimeoutError:
                await self._stop()
                raise RuntimeFailure(
                    f"{self.spec.model} was not loaded within {LOAD_TIMEOUT_S:.0f} seconds"
                ) from None
            except BaseException:
                await self._stop()
                raise
            return self._caps

    async def unload(self) -> None:
        """End running requests with FinishReason.ABORT and the process with them; idempotent."""
        self._unloading = True  # until the next start
        await self._stop()

    async def health(self) -> RuntimeStatus:
        """The worker's own snapshot, or the last known one when it does not answer in a second."""
        if self._caps is None:
            if self._process is not None:
                return RuntimeStatus(state="loading")
            state: RuntimeState = "error" if self._state_detail else "unloaded"
            return RuntimeStatus(state=state, detail=self._state_detail)
        request_id = self._new_id()
        answer: asyncio.Future[RuntimeStatus] = asyncio.get_running_loop().create_future()
        self._health[request_id] = answer
        try:
            self._send({"op": "health", "id": request_id})
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                self._last_status = await answer
        except (TimeoutError, OhMyGPUError):
            pass
        finally:
            self._health.pop(request_id, None)
        return self._last_status

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Stream the answer; closing the generator frees the slot at the engine's next step."""
        if self._caps is None:
            raise RuntimeFailure(
                f"{self.spec.model} is not loaded; send the request again", retry_after_s=1
            )
        request_id = self._new_id()
        mailbox = self._running[request_id] = Mailbox()
        try:
            self._send({"op": "generate", "id": request_id, "request": to_plain(request)})
            await self._drain()
            while True:
                delta = await mailbox.get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            del self._running[request_id]
            if not mailbox.finished:
                with contextlib.suppress(OhMyGPUError):
                    self._send({"op": "abort", "id": request_id})

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """A vector for each input; cancelling it drops what is not computed yet."""
        if self._caps is None:
            raise RuntimeFailure(
                f"{self.spec.model} is not loaded; send the request again", retry_after_s=1
            )
        request_id = self._new_id()
        vectors = self._embedding[request_id] = Vectors()
        try:
            self._send({"op": "embed", "id": request_id, "request": to_plain(request)})
            await self._drain()
            return await vectors.result
        finally:
            del self._embedding[request_id]
            if not vectors.result.done() or vectors.result.cancelled():
                with contextlib.suppress(OhMyGPUError):
                    self._send({"op": "abort", "id": request_id})

    # the process

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            ours.setblocking(False)
            process = await asyncio.create_subprocess_exec(
                *self._command,
                "serve",
                "--fd",
                str(theirs.fileno()),
                self.spec.to_json(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env=worker_environment(os.environ),
                start_new_session=True,  # Ctrl-C in the daemon's terminal must not end it mid-drain
            )
            reader, writer = await asyncio.open_connection(sock=ours)
        except OSError as error:
            ours.close()
            raise RuntimeFailure(f"the worker process cannot be started: {error}") from error
        finally:
            theirs.close()
        self._process, self._writer = process, writer
        self._state_detail = ""
        self._unloading = False
        self._ended = asyncio.Event()
        self._ready = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(_retrieve)
        _logger.info("%s: worker %d started", self.spec.model, process.pid)
        nobody = contextvars.Context()  # what they log later is not about the request that loads
        self._tasks = [
            asyncio.create_task(self._read_frames(reader, process), context=nobody),
            asyncio.create_task(self._copy_log(process), context=nobody),
        ]

    async def _stop(self) -> None:
        """End the process: ask, then SIGTERM, then SIGKILL; wait until it is gone."""
        process, ended = self._process, self._ended
        if process is None or ended is None:
            return
        with contextlib.suppress(OhMyGPUError):
            self._send({"op": "unload"})
        escalation = [(EXIT_TIMEOUT_S, signal.SIGTERM), (TERM_TIMEOUT_S, signal.SIGKILL)]
        if self._caps is None:
            del escalation[0]  # nothing to finish: it is still loading
            _signal(process, signal.SIGTERM)
        try:
            for patience_s, sign in escalation:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await ended.wait()
                        return
                _signal(process, sign)
            await ended.wait()
        except asyncio.CancelledError:
            _signal(process, signal.SIGKILL)  # the daemon is in a hurry, and must leave no orphan
            raise

    async def _read_frames(
        self, reader: asyncio.StreamReader, process: asyncio.subprocess.Process
    ) -> None:
        try:
            while True:
                header = await reader.readexactly(wire.HEADER.size)
                body = await reader.readexactly(wire.frame_length(header))
                self._receive(wire.decode_frame(body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:
            _logger.exception("%s: the worker sent a broken frame", self.spec.model)
        finally:
            await self._bury(process)

    async def _bury(self, process: asyncio.subprocess.Process) -> None:
        """The socket closed: reap the process, then end everything that still waits for it."""
        assert self._writer is not None
        assert self._ended is not None
        self._caps = None  # from now on a request starts a fresh worker
        self._writer.close()
        try:
            async with asyncio.timeout(TERM_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            _signal(process, signal.SIGKILL)
            code = await process.wait()
        for vectors in self._embedding.values():
            vectors.fail(self._death(code))
        if self._unloading:
            _logger.info("%s: worker %d ended", self.spec.model, process.pid)
            for mailbox in self._running.values():
                mailbox.put(Delta(finish_reason=FinishReason.ABORT))
        else:
            self._state_detail = f"the worker {obituary(code)}"
            _logger.error("%s: worker %d %s", self.spec.model, process.pid, obituary(code))
            for mailbox in self._running.values():
                mailbox.fail(self._death(code))
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(self._death(code))
        for answer in self._health.values():
            if not answer.done():
                answer.set_exception(self._death(code))
        self._process = self._writer = None
        self._last_status = RuntimeStatus(state="error", detail=self._state_detail)
        self._ended.set()

    def _death(self, code: int) -> RuntimeFailure:
        doing = "loading" if self._ready is not None and not self._ready.done() else "running"
        return RuntimeFailure(
            f"the process {doing} {self.spec.model} {obituary(code)}",
            exit_code=code,
            retry_after_s=None if doing == "loading" else 1,
        )

    async def _copy_log(self, process: asyncio.subprocess.Process) -> None:
        """The worker's stderr, line by line, into the daemon's log."""
        assert process.stderr is not None
        rest = b""
        while piece := await process.stderr.read(_LOG_READ_BYTES):
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > _LOG_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                _logger.info("%s: %s", self.spec.model, line.decode("utf-8", "replace"))
        if rest:
            _logger.info("%s: %s", self.spec.model, rest.decode("utf-8", "replace"))

    # frames

    def _receive(self, frame: dict[str, Any]) -> None:
        match frame.get("op"):
            case "step":
                for request_id, delta in frame.get("deltas", ()):
                    if (mailbox := self._running.get(request_id)) is not None:
                        mailbox.put(delta_from_plain(delta))
                for request_id, error in frame.get("errors", ()):
                    self._fail(request_id, OhMyGPUError.from_dict(error))
            case "embedded":
                if (vectors := self._embedding.get(frame["id"])) is not None:
                    vectors.add(frame["vectors"], frame["prompt_tokens"], last=frame["last"])
            case "health":
                answer = self._health.get(frame["id"])
                if answer is not None and not answer.done():
                    answer.set_result(RuntimeStatus(**frame["status"]))
            case "ready" if self._ready is not None and not self._ready.done():
                self._ready.set_result(RuntimeCaps(**frame["caps"]))
            case "failed" if self._ready is not None and not self._ready.done():
                self._ready.set_exception(OhMyGPUError.from_dict(frame["error"]))
            case operation:
                _logger.warning("%s: unexpected frame %r", self.spec.model, operation)

    def _fail(self, request_id: int, error: OhMyGPUError) -> None:
        if (mailbox := self._running.get(request_id)) is not None:
            mailbox.fail(error)
        elif (vectors := self._embedding.get(request_id)) is not None:
            vectors.fail(error)

    def _send(self, frame: dict[str, Any]) -> None:
        if self._writer is None or self._writer.is_closing():
            raise RuntimeFailure(
                f"the process running {self.spec.model} has ended; send the request again",
                retry_after_s=1,
            )
        try:
            self._writer.write(wire.encode_frame(frame))
        except ValueError:
            raise InvalidRequest("the request is too large to process") from None

    async def _drain(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(ConnectionError):  # the reader sees it too, and says why
                await self._writer.drain()

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The daemon's environment for a worker: without tokens, with huge pages for the weights."""
    result = without_secrets(environment)
    tunables = result.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" not in tunables:
        result["GLIBC_TUNABLES"] = f"{tunables}:{_HUGE_PAGES}" if tunables else _HUGE_PAGES
    return result


def obituary(code: int) -> str:
    """How a process ended, as the end of a sentence; negative codes are signals."""
    if code == -signal.SIGKILL:
        return (
            "was killed (SIGKILL), most likely because the system ran out of memory; "
            "try a smaller model or recipe, or fewer engine.slots"
        )
    if code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}; daemon.log has its last words"
        except ValueError:
            return f"was ended by signal {-code}; daemon.log has its last words"
    return f"ended with exit code {code}; daemon.log has its last words"


def _signal(process: asyncio.subprocess.Process, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(sign)


def _retrieve(future: asyncio.Future[RuntimeCaps]) -> None:
    if not future.cancelled():
        future.exception()  # marks it as seen: nobody waits when the load was given up
