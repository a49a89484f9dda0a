"""Options and arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ohmygpu.core.errors import OhMyGPUError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def json_option(help_text: str) -> Callable[[_Function], _Function]:
    """`--json`, as the parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)


def model_name(parameter: str, **kwargs: Any) -> Callable[[_Function], _Function]:
    """An argument MODEL that the shell completes with the installed models' names."""
    kwargs.setdefault("metavar", "MODEL..." if kwargs.get("nargs") == -1 else "MODEL")
    return click.argument(parameter, shell_complete=_complete, **kwargs)


def _complete(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    from ohmygpu.core.repository import Repository
    from ohmygpu.core.settings import load_settings

    try:  # from disk: a completion must not wait for a daemon
        records = Repository(load_settings().home).records()
    except OhMyGPUError:
        return []
    names = (record.name if record.is_default else record.full_name for record in records)
    return [CompletionItem(name) for name in names if name.lower().startswith(incomplete.lower())]
