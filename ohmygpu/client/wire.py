"""Requests and replies of the daemon's HTTP API, without any HTTP: the same for both clients."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

import httpx2

from ohmygpu.core.errors import (
    CorruptFile,
    DaemonError,
    DaemonNotRunning,
    InvalidName,
    NotTheDaemon,
    OhMyGPUError,
)
from ohmygpu.core.events import Event
from ohmygpu.runtime_api import Delta, FinishReason, Message, Usage

from .nouns import Address, ChatOptions, Health, ModelInfo


def model_path(name: str) -> str:
    """`/v1/models/<name>`, quoted. Raises InvalidName when it is empty."""
    if not name.strip():
        raise InvalidName("a model name is missing; `omg list` shows the installed models")
    return "/v1/models/" + quote(name, safe="")


def chat_body(
    model: str, messages: Sequence[Message], options: ChatOptions | None
) -> dict[str, Any]:
    """A streaming request of the OpenAI chat API."""
    return {
        "model": model,
        "messages": [_set_fields(message) for message in messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **(options or ChatOptions()).to_dict(),
    }


def completion_body(model: str, prompt: str, options: ChatOptions | None) -> dict[str, Any]:
    """A streaming request of Ollama's generate API: `prompt` goes on as it is."""
    given = (options or ChatOptions()).to_dict()
    if "max_tokens" in given:
        given["num_predict"] = given.pop("max_tokens")
    return {"model": model, "prompt": prompt, "raw": True, "stream": True, "options": given}


def _set_fields(message: Message) -> dict[str, Any]:
    return {key: value for key, value in asdict(message).items() if value not in (None, ())}


def read_reply(address: Address, status: int, content: bytes) -> dict[str, Any]:
    """The JSON object of a reply; raises the error that it reports."""
    try:
        data = json.loads(content) if content else {}
    except ValueError:
        data = None
    if status < 400 and isinstance(data, dict):
        return data
    if isinstance(data, dict) and isinstance(data.get("error"), dict):
        raise error_from_wire(data["error"])
    if isinstance(data, dict) and isinstance(data.get("error"), str):  # as Ollama's API has it
        raise OhMyGPUError(data["error"])
    raise NotTheDaemon(
        f"what listens at {address} answered {status} in a way that the daemon never does;"
        " is another program using its port?",
        status=status,
    )


def read_health(address: Address, status: int, content: bytes) -> Health:
    """Health from a reply; DaemonError when something else than the daemon answered."""
    try:
        return Health.from_dict(json.loads(content))  # also with a 503, while it shuts down
    except (ValueError, KeyError, TypeError) as error:
        with contextlib.suppress(ValueError):
            data = json.loads(content)
            if status >= 400 and isinstance(data, dict) and isinstance(data.get("error"), dict):
                raise error_from_wire(data["error"]) from error
        raise NotTheDaemon(
            f"another program listens at {address}; choose another port for the daemon with"
            " `omg config set server.port PORT`"
        ) from error


def read_models(address: Address, reply: Mapping[str, Any]) -> list[ModelInfo]:
    """From the reply of `GET /v1/models`. Raises DaemonError when it cannot be read."""
    try:
        return [ModelInfo.from_wire(model) for model in reply["data"]]
    except (KeyError, TypeError, CorruptFile) as error:
        raise garbled(address) from error


def read_model(address: Address, reply: Mapping[str, Any]) -> ModelInfo:
    """From the reply of `GET /v1/models/<name>`. Raises DaemonError when it cannot be read."""
    return read_models(address, {"data": [reply]})[0]


def error_from_wire(data: Mapping[str, Any]) -> OhMyGPUError:
    """OpenAI's error object → the error that the daemon meant."""
    details = dict(data.get("details") or {})
    if data.get("param") is not None:
        details.setdefault("param", data["param"])
    reserved = {"message", "self", "cls"}  # names that the constructor has of its own
    details = {key: value for key, value in details.items() if key not in reserved}
    return OhMyGPUError.from_dict(
        {"code": data.get("code"), "message": data.get("message"), "details": details}
    )


class LineBuffer:
    """Bytes in, whole lines out. Splits on line feeds only: text may hold any other separator."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Lines completed by `data`, without their ends; empty ones are left out."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line for line in (line.strip(b"\r") for line in lines) if line]


@dataclass
class _Decoder:
    address: Address
    finished: bool = False
    _lines: LineBuffer = field(default_factory=LineBuffer)

    def broken_off(self) -> DaemonError:
        """The error for a stream that ended before its end."""
        return connection_lost(self.address)

    def _json(self, line: bytes) -> dict[str, Any]:
        try:
            data = json.loads(line)
        except ValueError as error:
            raise garbled(self.address) from error
        if not isinstance(data, dict):
            raise garbled(self.address)
        return data


class EventDecoder(_Decoder):
    """NDJSON of a pull or a measurement → Events."""

    def feed(self, data: bytes) -> Iterable[Event]:
        """Events completed by `data`; raises what an `error` event carries."""
        for line in self._lines.feed(data):
            entry = self._json(line)
            if "phase" not in entry:
                error = entry.get("error")
                raise error_from_wire(error) if isinstance(error, dict) else garbled(self.address)
            event = Event.from_dict(entry)
            if event.phase == "error":
                raise event.error or OhMyGPUError(event.message or "the pull failed")
            self.finished = event.phase == "done"
            yield event


class ChatDecoder(_Decoder):
    """Server-sent events of a streamed chat completion → Deltas."""

    _finish: FinishReason | None = None

    def feed(self, data: bytes) -> Iterable[Delta]:
        """Deltas completed by `data`; raises the error that the daemon reports in the stream."""
        for line in self._lines.feed(data):
            field_name, _, value = line.partition(b":")
            if field_name != b"data":  # comments keep the connection alive
                continue
            if value.strip() == b"[DONE]":
                self.finished = True
                return
            chunk = self._json(value)
            if "error" in chunk:
                raise error_from_wire(chunk["error"])
            delta = self._delta(chunk)
            if delta is not None:
                yield delta

    def _delta(self, chunk: dict[str, Any]) -> Delta | None:
        text = ""
        finish = None
        for choice in chunk.get("choices") or ():
            text += (choice.get("delta") or {}).get("content") or ""
            if choice.get("finish_reason"):
                try:
                    finish = FinishReason(choice["finish_reason"])
                except ValueError as error:
                    raise garbled(self.address) from error
        usage = chunk.get("usage")
        if usage:  # a chunk of its own, after the one with the finish reason
            return Delta(text=text, finish_reason=self._finish or finish, usage=_usage(usage))
        if finish is not None:
            self._finish = finish
        return Delta(text=text) if text else None


class CompletionDecoder(_Decoder):
    """NDJSON of a streamed /api/generate → Deltas."""

    def feed(self, data: bytes) -> Iterable[Delta]:
        """Deltas completed by `data`; raises the error that the daemon reports in the stream."""
        for line in self._lines.feed(data):
            entry = self._json(line)
            if "error" in entry:
                raise OhMyGPUError(str(entry["error"]))
            text, self.finished = str(entry.get("response") or ""), bool(entry.get("done"))
            if not self.finished:
                yield Delta(text=text)
                continue
            try:
                reason = FinishReason(entry["done_reason"])
            except (KeyError, ValueError) as error:
                raise garbled(self.address) from error
            usage = Usage(
                prompt_tokens=int(entry.get("prompt_eval_count", 0)),
                completion_tokens=int(entry.get("eval_count", 0)),
                cached_tokens=int(entry.get("prompt_eval_cached_count", 0)),
            )
            yield Delta(text=text, finish_reason=reason, usage=usage)


def _usage(data: Mapping[str, Any]) -> Usage:
    cached = (data.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(
        prompt_tokens=int(data.get("prompt_tokens", 0)),
        completion_tokens=int(data.get("completion_tokens", 0)),
        cached_tokens=int(cached),
    )


@contextlib.contextmanager
def translated(address: Address) -> Iterator[None]:
    """Transport failures → errors of ours."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise not_running(address) from error
    except httpx2.TimeoutException as error:
        raise DaemonError(
            f"the daemon at {address} accepts connections but does not answer;"
            " restart it with `omg serve stop` and `omg serve -d`"
        ) from error
    except httpx2.UnsupportedProtocol as error:
        raise DaemonError(f"{address} is not a URL that a daemon can have") from error
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise connection_lost(address) from error


def not_running(address: Address) -> DaemonNotRunning:
    """The error for an address at which nothing answers."""
    return DaemonNotRunning(
        f"the daemon is not running (nothing answers at {address}); start it with `omg serve -d`",
        url=address.url,
    )


def connection_lost(address: Address) -> DaemonError:
    """The error for a connection that ended before the reply did."""
    return DaemonError(
        f"the daemon at {address} went away before it had finished; `omg serve status` says"
        " whether it still runs, and its log is daemon.log in the home folder"
    )


def garbled(address: Address) -> DaemonError:
    """The error for a reply that is none of those this version knows."""
    return DaemonError(
        f"the daemon at {address} sent a reply that this version of omg cannot read;"
        " `omg serve status` shows its version"
    )
