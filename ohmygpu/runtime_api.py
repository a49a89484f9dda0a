"""The Runtime protocol and the nouns it speaks. Knows no HTTP, no ONNX Runtime, no wire format.

A runtime serves one model. `runtime_onnx.OnnxRuntime` implements the protocol inside the worker
process; `daemon.worker.WorkerRuntime` implements it by talking to that process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

from .core.errors import InvalidRequest

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_EMBED_INPUTS = 2048  # as OpenAI's API


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the client went away or the runtime is shutting down


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn; `role` is system, user, assistant or tool.

    The optional fields reach the chat template, which may or may not use them.
    """

    role: str
    content: str
    name: str | None = None  # who speaks, or the tool that answered
    tool_call_id: str | None = None  # the call that a tool's answer belongs to
    reasoning: str | None = None  # what the assistant thought before it answered
    # functions the assistant called, each as the OpenAI API writes it; arguments may be an object
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; concrete values, defaults already applied.

    Raises InvalidRequest, with `details["param"]`, on a value outside its range. Names and ranges
    are those of the OpenAI API where it has the parameter, else of llama.cpp's server.
    """

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    typical_p: float = 1.0  # 1 = off
    repetition_penalty: float = 1.0  # 1 = off
    repetition_window: int = 64  # tokens looked back by all three penalties; -1 = the whole context
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id → added to its logit
    seed: int | None = None  # None = a fresh random seed
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None  # None = until the context is full

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, 2**31 - 1)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("typical_p", self.typical_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check("repetition_window", self.repetition_window, -1, 2**31 - 1)
        _check("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _check("max_tokens", self.max_tokens, 0, 2**31 - 1)
        if self.seed is not None:
            _check("seed", self.seed, -(2**63), 2**64 - 1)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings", param="stop")
        for text in self.stop:
            if not text or len(text) > MAX_STOP_CHARACTERS:
                raise InvalidRequest(
                    f"stop strings must have 1 to {MAX_STOP_CHARACTERS} characters", param="stop"
                )
        for token_id, bias in self.logit_bias.items():
            _check("logit_bias", token_id, 0, 2**31 - 1)
            _check("logit_bias", bias, -100.0, 100.0)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise InvalidRequest(
            f"{name} must be between {low:g} and {high:g}, not {value:g}", param=name
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What to generate from: a conversation (`messages`) or plain text (`prompt`), exactly one.

    Messages go through the model's chat template; `prompt` is tokenised as it stands. Either
    continues `context_tokens`, the tokens an earlier reply returned. `context_limit` lowers the
    context of this request only. With `truncate`, whole oldest messages that are not system
    messages are dropped until the prompt fits, and Usage says how many; without it a prompt that
    does not fit raises ContextLengthExceeded.
    """

    sampling: SamplingParams
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    context_tokens: tuple[int, ...] = ()
    context_limit: int | None = None
    truncate: bool = False
    return_context: bool = False  # the last Delta carries prompt + completion token ids

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise InvalidRequest("give either messages or a prompt", param="messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a finished request cost. Times are seconds of monotonic clock."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # prompt tokens whose KV was reused
    dropped_messages: int = 0  # messages left out by `truncate`
    queue_s: float = 0.0  # submitted → first prefill
    prefill_s: float = 0.0  # first prefill → first token
    decode_s: float = 0.0  # first token → last token


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A streamed piece. The last one has `finish_reason` and `usage`, and may have text too."""

    text: str = ""
    completion_tokens: int = 0  # tokens this piece stands for (text may lag behind tokens)
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    context: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedRequest:
    """Texts, or token ids used as they stand, to make one vector each of.

    With `truncate`, what lies beyond the context is left out; without it a text that does not fit
    raises ContextLengthExceeded. `context_limit` lowers the context of this request only.
    `dimensions` keeps that many numbers of each vector and gives it length 1 again (models trained
    for it, by Matryoshka representation learning, lose little; arXiv 2205.13147). `normalize`
    gives vectors length 1 whatever the model does; otherwise they are as the model makes them.
    """

    inputs: tuple[str | tuple[int, ...], ...]
    truncate: bool = False
    dimensions: int | None = None
    normalize: bool = False
    context_limit: int | None = None

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InvalidRequest("there is nothing to embed; send at least one text", param="input")
        if len(self.inputs) > MAX_EMBED_INPUTS:
            raise InvalidRequest(
                f"input has {len(self.inputs)} texts; {MAX_EMBED_INPUTS} is the most",
                param="input",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult:
    """One vector for each input, in their order, and how many tokens each input had."""

    vectors: tuple[bytes, ...]  # little-endian float32
    prompt_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeCaps:
    """What the loaded model can do."""

    context_tokens: int  # longest prompt + completion of one request
    vocab_size: int
    slots: int  # sequences that run at once
    max_queue: int  # sequences that may wait beyond those
    chat: bool  # has a chat template
    execution_provider: str  # "CPU", "CUDA", …
    weights_bytes: int
    kv_bytes_per_token: int
    embedding_length: int = 0  # numbers in a vector; 0 = it generates text


RuntimeState = Literal["loading", "ready", "error", "unloaded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeStatus:
    """A snapshot for health checks and `omg ps`."""

    state: RuntimeState
    detail: str = ""
    running: int = 0
    waiting: int = 0
    free_slots: int = 0
    steps: int = 0  # engine steps since load
    memory_bytes: int = 0  # resident memory of the process that holds the model


class Runtime(Protocol):
    """One model, ready to generate or to embed. All methods are called on one asyncio loop."""

    async def load(self) -> RuntimeCaps:
        """Load the model; idempotent. Raises RuntimeFailure, OutOfMemory or CorruptFile."""
        ...

    async def unload(self) -> None:
        """End running requests with FinishReason.ABORT and free everything; idempotent."""
        ...

    async def health(self) -> RuntimeStatus:
        """A snapshot; never blocks on the engine and never raises."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Stream the answer; closing the generator aborts, and the slot is free at the next step.

        Raises, at the first `__anext__`: InvalidRequest, ContextLengthExceeded, Busy (queue full);
        at any: RuntimeFailure when the model dies.
        """
        ...

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """A vector for each input; cancelling it drops what is not computed yet.

        Raises InvalidRequest when the model generates text, ContextLengthExceeded, Busy, or
        RuntimeFailure when the model dies.
        """
        ...


def to_plain(value: Any) -> dict[str, Any]:
    """Dataclass of this module → JSON-ready dict, without the fields left at their default."""
    data: dict[str, Any] = {}
    for name, spec in value.__dataclass_fields__.items():
        item = getattr(value, name)
        if spec.default is item or (spec.default == item and type(spec.default) is type(item)):
            continue
        data[name] = _plain(item)
    return data


def _plain(item: Any) -> Any:
    if hasattr(item, "__dataclass_fields__"):
        return to_plain(item)
    if isinstance(item, Mapping):
        return {str(key): _plain(entry) for key, entry in item.items()}
    if isinstance(item, (tuple, list)):
        return [_plain(entry) for entry in item]
    return item


def request_from_plain(data: dict[str, Any]) -> GenerateRequest:
    """Inverse of `to_plain` for a GenerateRequest."""
    fields = dict(data)
    sampling = dict(fields.pop("sampling", {}))
    sampling["logit_bias"] = {int(k): v for k, v in sampling.get("logit_bias", {}).items()}
    sampling["stop"] = tuple(sampling.get("stop", ()))
    messages = fields.pop("messages", None)
    return GenerateRequest(
        sampling=SamplingParams(**sampling),
        messages=None if messages is None else tuple(map(_message, messages)),
        context_tokens=tuple(fields.pop("context_tokens", ())),
        **fields,
    )


def embed_request_from_plain(data: dict[str, Any]) -> EmbedRequest:
    """Inverse of `to_plain` for an EmbedRequest."""
    fields = dict(data)
    inputs = fields.pop("inputs", ())
    return EmbedRequest(
        inputs=tuple(entry if isinstance(entry, str) else tuple(entry) for entry in inputs),
        **fields,
    )


def _message(entry: dict[str, Any]) -> Message:
    return Message(**entry | {"tool_calls": tuple(entry.get("tool_calls", ()))})


def delta_from_plain(data: dict[str, Any]) -> Delta:
    """Inverse of `to_plain` for a Delta."""
    usage = data.get("usage")
    finish_reason = data.get("finish_reason")
    context = data.get("context")
    return Delta(
        text=data.get("text", ""),
        completion_tokens=data.get("completion_tokens", 0),
        finish_reason=FinishReason(finish_reason) if finish_reason else None,
        usage=Usage(**usage) if usage else None,
        context=tuple(context) if context is not None else None,
    )
