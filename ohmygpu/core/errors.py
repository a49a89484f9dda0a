"""Every error a user can meet, in one tree.

Domain code raises these; only the edges translate them: `daemon/errors.py` to HTTP bodies,
`cli/errors.py` to a sentence and an exit code, the worker's wire to a frame and back.

    OhMyGPUError
    ├── InvalidRequest              a request or argument that can never succeed as sent
    │   ├── InvalidName             not a model name we can parse
    │   ├── ContextLengthExceeded   prompt longer than the context
    │   ├── ConsentNeeded           it would download or take much more than was asked for
    │   └── ConfigError             config.toml, environment or flag: which key, which value
    ├── NotFound
    │   ├── ModelNotFound           not installed (suggests near names) or absent at its provider
    │   └── RevisionNotFound        the repository exists, that branch, tag or commit does not
    ├── AccessDenied                private or gated repository, wrong or missing token
    ├── Conflict                    the name is taken, or another process is changing the model
    ├── UnsupportedModel            architecture, file format or block type without a converter
    ├── CorruptFile                 bytes that do not match their size, hash or format
    ├── DiskFull                    refused before or during a write; nothing half-written remains
    ├── NetworkError                the provider cannot be reached or keeps failing
    │   └── RateLimited             the provider asks to wait (retry_after_s)
    ├── Busy                        the queue is full (retry_after_s)
    ├── OutOfMemory                 the model does not fit beside what is loaded
    ├── RuntimeFailure              the worker could not load the model, or died
    ├── DaemonError
    │   ├── DaemonNotRunning        nothing answers at the daemon's address
    │   ├── NotTheDaemon            another program answers at the daemon's address
    │   ├── DaemonAlreadyRunning    another daemon owns this home folder
    │   └── PortInUse               another program listens at the daemon's port
    └── Cancelled                   the user or the client stopped it
"""

from __future__ import annotations

from typing import Any, ClassVar


class OhMyGPUError(Exception):
    """Base of all errors shown to users.

    `message` is one sentence that names what is wrong and, where there is something to do, what to
    do. `details` holds machine-readable facts (numbers, names); they survive the worker's wire and
    the HTTP body.
    """

    code: ClassVar[str] = "internal_error"
    _registry: ClassVar[dict[str, type[OhMyGPUError]]] = {}

    def __init_subclass__(cls) -> None:
        OhMyGPUError._registry[cls.code] = cls

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: code, message and details."""
        return {"code": self.code, "message": self.message, "details": self.details}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> OhMyGPUError:
        """Inverse of `to_dict`; an unknown code becomes a plain OhMyGPUError."""
        cls = OhMyGPUError._registry.get(str(data.get("code")), OhMyGPUError)
        return cls(str(data.get("message", "unknown error")), **dict(data.get("details") or {}))

    @property
    def retry_after_s(self) -> float | None:
        """Seconds to wait before a retry can succeed, where that is known."""
        value = self.details.get("retry_after_s")
        return float(value) if value is not None else None


class InvalidRequest(OhMyGPUError):
    """A request or argument that can never succeed as sent; `details["param"]` names the field."""

    code = "invalid_request"


class InvalidName(InvalidRequest):
    """Not a model name we can parse."""

    code = "invalid_name"


class ContextLengthExceeded(InvalidRequest):
    """The prompt is longer than the context; details: prompt_tokens, context_tokens."""

    code = "context_length_exceeded"


class ConsentNeeded(InvalidRequest):
    """What was asked for needs a large download that nobody agreed to; details: param, sizes."""

    code = "consent_needed"


class ConfigError(InvalidRequest):
    """A setting with an unknown key or a bad value; details: key, value, origin."""

    code = "config_error"


class NotFound(OhMyGPUError):
    """Something named does not exist."""

    code = "not_found"


class ModelNotFound(NotFound):
    """No such model, installed or at its provider; details: name, suggestions."""

    code = "model_not_found"


class RevisionNotFound(NotFound):
    """The repository exists; that branch, tag or commit does not."""

    code = "revision_not_found"


class AccessDenied(OhMyGPUError):
    """A private or gated repository, or a wrong or missing token."""

    code = "access_denied"


class Conflict(OhMyGPUError):
    """The name is taken, or another process is changing the model."""

    code = "conflict"


class UnsupportedModel(OhMyGPUError):
    """An architecture, file format or block type without a converter."""

    code = "unsupported_model"


class CorruptFile(OhMyGPUError):
    """Bytes that do not match their size, their hash or their format."""

    code = "corrupt_file"


class DiskFull(OhMyGPUError):
    """Not enough disk space; details: needed_bytes, free_bytes."""

    code = "disk_full"


class NetworkError(OhMyGPUError):
    """The provider cannot be reached, or keeps failing after retries."""

    code = "network_error"


class RateLimited(NetworkError):
    """The provider asks us to wait; details: retry_after_s."""

    code = "rate_limited"


class Busy(OhMyGPUError):
    """The queue is full; details: retry_after_s."""

    code = "busy"


class OutOfMemory(OhMyGPUError):
    """The model does not fit in memory; details: needed_bytes, free_bytes."""

    code = "out_of_memory"


class RuntimeFailure(OhMyGPUError):
    """The worker could not load or run the model, or died while it did."""

    code = "runtime_failure"


class DaemonError(OhMyGPUError):
    """Something about the daemon process itself."""

    code = "daemon_error"


class DaemonNotRunning(DaemonError):
    """Nothing answers at the daemon's address."""

    code = "daemon_not_running"


class NotTheDaemon(DaemonError):
    """Another program answers at the daemon's address."""

    code = "not_the_daemon"


class DaemonAlreadyRunning(DaemonError):
    """Another daemon owns this home folder."""

    code = "daemon_already_running"


class PortInUse(DaemonError):
    """Another program listens at the daemon's port."""

    code = "port_in_use"


class Cancelled(OhMyGPUError):
    """The user or the client stopped it."""

    code = "cancelled"
