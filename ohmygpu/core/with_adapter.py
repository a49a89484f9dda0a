"""A model and the LoRA adapter to merge into it, as one `Provider`: both sets of files as one."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from .adapter_files import select_adapter
from .events import Event, EventSink
from .model_files import Select
from .provider import MergedAdapter, Provider, Resolved
from .records import Adapter, Artifact

if TYPE_CHECKING:
    from .refs import ModelRef
    from .repository import Repository


class AdapterProvider(Provider, Protocol):
    """A provider that can be told which files of a repository are meant."""

    def resolve(self, ref: ModelRef, select: Select = ...) -> Resolved:
        """What `ref` means now, its files chosen by `select`."""
        ...


class WithAdapter:
    """The models of `base`, each with the adapter that `adapter_ref` names at `provider`."""

    def __init__(self, base: Provider, provider: AdapterProvider, adapter_ref: ModelRef) -> None:
        self._base = base
        self._provider = provider
        self._ref = adapter_ref
        self._adapter: Resolved | None = None

    def resolve(self, ref: ModelRef) -> Resolved:
        """The base model that `ref` means, with the adapter's name and its files behind its own."""
        found = self._base.resolve(ref)
        self._adapter = adapter = self._provider.resolve(self._ref, select_adapter)
        return replace(
            found,
            display_name=adapter.display_name,
            files=(*found.files, *adapter.files),
            adapter=MergedAdapter(
                Adapter(adapter.ref.display, adapter.revision), adapter.config or {}
            ),
        )

    def fetch(
        self,
        resolved: Resolved,
        repository: Repository,
        sink: EventSink,
        cancel: threading.Event,
    ) -> tuple[Artifact, ...]:
        """The verified files of both, in the order of `resolved.files`; one count of bytes."""
        adapter = self._adapter
        if adapter is None:
            raise ValueError("fetch comes after resolve")
        own = resolved.files[: len(resolved.files) - len(adapter.files)]
        model = replace(resolved, files=own, adapter=None)
        total = resolved.total_bytes

        def counted(before: int) -> EventSink:
            def forward(event: Event) -> None:
                if event.phase == "download":
                    done = before + event.done_bytes
                    event = replace(event, done_bytes=done, total_bytes=total)
                sink(event)

            return forward

        merged = self._provider.fetch(adapter, repository, counted(0), cancel)
        artifacts = self._base.fetch(model, repository, counted(adapter.total_bytes), cancel)
        return (*artifacts, *merged)
