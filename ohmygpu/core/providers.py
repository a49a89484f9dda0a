"""The providers there are, by the name that a reference gives; each is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import InvalidName

if TYPE_CHECKING:
    from .provider import Provider
    from .refs import ModelRef
    from .settings import Settings


def with_adapter(base: Provider, adapter: ModelRef, settings: Settings) -> Provider:
    """`base` with the LoRA adapter that `adapter` names. Raises InvalidName."""
    from .with_adapter import WithAdapter

    if adapter.provider == "hub":
        from .hub import HubProvider

        return WithAdapter(base, HubProvider(settings), adapter)
    if adapter.provider == "file":
        from .local import LocalProvider

        return WithAdapter(base, LocalProvider(), adapter)
    raise InvalidName(
        f"an adapter comes from the hub or from a folder, not from {adapter.display}; write "
        "org/name or ./folder",
        name=adapter.display,
    )


def provider_for(ref: ModelRef, settings: Settings) -> Provider:
    """The provider that `ref` names."""
    if ref.provider == "hub":
        from .hub import HubProvider

        return HubProvider(settings)
    if ref.provider == "file":
        from .local import LocalProvider

        return LocalProvider()
    if ref.provider == "pypi":
        from .pypi import PyPIProvider

        return PyPIProvider(settings)
    raise InvalidName(
        f"unknown provider {ref.provider!r} in {ref.repo!r}; known: hub, file, pypi",
        name=ref.repo,
    )
