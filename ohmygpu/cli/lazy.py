"""A click group that imports a command only when it runs, and knows near names of misspelt ones."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True, slots=True)
class Lazy:
    """A command not yet imported: where it is, and its line in the group's help."""

    target: str  # "module:attribute"
    summary: str
    section: str = "Commands"

    def load(self) -> click.Command:
        """Import the command."""
        module, _, attribute = self.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.target} is not a command")
        return command


class LazyGroup(click.Group):
    """A group with commands that are imported on use; `aliases` are names that help leaves out."""

    def __init__(
        self,
        *args: Any,
        lazy: Mapping[str, Lazy] | None = None,
        aliases: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = dict(lazy or {})
        self.aliases = dict(aliases or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which they were declared."""
        return [*self.lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name or alias, imported; None when there is none."""
        name = self.aliases.get(cmd_name, cmd_name)
        if name in self.lazy:
            return self.lazy[name].load()
        return super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command to run. Raises UsageError with the nearest names."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            known = [*self.list_commands(ctx), *self.aliases]
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
            near = list(dict.fromkeys(self.aliases.get(entry, entry) for entry in near))
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"there is no command {name!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, from the declared summaries alone."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, lazy in self.lazy.items():
            sections.setdefault(lazy.section, []).append((name, lazy.summary))
        for name in super().list_commands(ctx):
            command = self.commands[name]
            sections.setdefault("Commands", []).append((name, command.get_short_help_str(80)))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
