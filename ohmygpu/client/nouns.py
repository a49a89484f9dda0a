"""What the daemon tells its clients: Address, Health, LoadedModel, ModelInfo; and ChatOptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ohmygpu.core.fidelity import Fidelity
from ohmygpu.core.records import CompiledModel, InstallRecord


@dataclass(frozen=True, slots=True)
class Address:
    """Where a daemon listens: a URL and, where it is reached through one, a Unix socket."""

    url: str
    socket: Path | None = None

    def __str__(self) -> str:
        return str(self.socket) if self.socket else self.url


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that the daemon holds in memory, or is loading."""

    name: str
    state: str  # loading | ready | error | unloaded
    running: int = 0  # requests being answered
    waiting: int = 0
    memory_bytes: int = 0
    expires_in_s: float | None = None  # None = loading, in use, or kept for ever
    kept_forever: bool = False
    execution_provider: str | None = None  # None until it is loaded
    context_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What `GET /health` says."""

    status: str
    version: str
    pid: int
    url: str
    socket: str | None
    home: str
    uptime_s: float
    models: tuple[LoadedModel, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Health:
        """Raises KeyError or TypeError when it is not a daemon's health."""
        models = tuple(LoadedModel(**_known(LoadedModel, entry)) for entry in data["models"])
        return Health(**{**_known(Health, data), "models": models})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """An installed model: its record, and what its compile says of it.

    What the compile says is None when the compiled files are damaged; `problem` then says how.
    """

    record: InstallRecord
    quantization: str | None = None
    parameters: int | None = None
    context_tokens: int | None = None  # the model's own
    target: str | None = None
    license: str | None = None
    has_template: bool = False
    prompt_graph: str = ""  # file of the graph that computes prompts; "" = there is one graph
    kind: str = "decoder"  # decoder: generates text | encoder: gives vectors
    embedding_length: int = 0  # numbers in a vector
    pooling: str = ""  # how an encoder makes one vector of many tokens
    fidelity: Mapping[str, Fidelity] = field(default_factory=dict)  # by graph, where measured
    location: str | None = None  # folder of the compiled model; not known over HTTP
    problem: str | None = None

    @property
    def embeds(self) -> bool:
        """Whether it makes vectors of texts, and cannot chat."""
        return self.kind == "encoder"

    @property
    def name(self) -> str:
        """What a user types: the bare name for the default variant, else `name:variant`."""
        return self.record.name if self.record.is_default else self.record.full_name

    @staticmethod
    def from_disk(
        record: InstallRecord,
        compiled: CompiledModel | None,
        *,
        has_template: bool,
        location: str,
        problem: str | None,
        fidelity: Mapping[str, Fidelity] | None = None,
    ) -> ModelInfo:
        """From the store."""
        return ModelInfo(
            record=record,
            quantization=compiled.quantization if compiled else None,
            parameters=compiled.parameters if compiled else None,
            context_tokens=compiled.context_length if compiled else None,
            target=compiled.target if compiled else None,
            license=compiled.license if compiled else None,
            has_template=has_template and not (compiled and compiled.kind == "encoder"),
            prompt_graph=compiled.prompt_graph if compiled else "",
            kind=compiled.kind if compiled else "decoder",
            embedding_length=compiled.embedding_length if compiled else 0,
            pooling=compiled.pooling if compiled else "",
            fidelity=fidelity or {},
            location=location,
            problem=problem,
        )

    @staticmethod
    def from_wire(model: Mapping[str, Any]) -> ModelInfo:
        """From an entry of `GET /v1/models`; KeyError, TypeError or CorruptFile when it is none."""
        data = model["ohmygpu"]
        return ModelInfo(
            record=InstallRecord.from_dict(data),
            quantization=data["quantization"],
            parameters=data["parameters"],
            context_tokens=data["context_length"],
            target=data["target"],
            license=data["license"],
            has_template=bool(data["chat"]),
            prompt_graph=str(data.get("prompt_graph", "")),
            kind=str(data.get("kind", "decoder")),
            embedding_length=int(data.get("embedding_length", 0)),
            pooling=str(data.get("pooling", "")),
            fidelity={
                graph: Fidelity.from_dict(found)
                for graph, found in (data.get("fidelity") or {}).items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How to answer; None leaves the choice to the model's own defaults."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields of a chat request, those that are set."""
        data = {key: value for key, value in asdict(self).items() if value is not None}
        data["stop"] = list(self.stop)
        return {key: value for key, value in data.items() if value != []}


def _known(cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version knows: a newer daemon may send more."""
    return {key: data[key] for key in cls.__dataclass_fields__ if key in data}
