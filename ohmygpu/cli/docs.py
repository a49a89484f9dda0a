"""docs/cli.md, written from the commands' own help: `python -m ohmygpu.cli.docs docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from . import errors
from .lazy import LazyGroup
from .root import CONTEXT, omg

_WIDTH = 100
_INTRODUCTION = """\
# Commands

Written by `python -m ohmygpu.cli.docs docs/cli.md` from the commands' own help; a test keeps it up
to date. `omg` and `ohmygpu` are the same command.

Data goes to standard output, progress and remarks to standard error, so every command can stand in
a pipe. `--json` gives a stable form of whatever lists or describes. Shell completion: put
`eval "$(_OMG_COMPLETE=bash_source omg)"` into `~/.bashrc` (`zsh_source` and `fish_source` for the
other shells).
"""


def render() -> str:
    """The page: introduction, exit codes, and the help of every command."""
    codes = (errors.__doc__ or "").partition("\n")[2].strip("\n")
    parts = [_INTRODUCTION, "## Exit codes\n\n" + codes + "\n"]
    for path, text, aliases in _helps(omg, "omg"):
        also = f"\nAlso: {', '.join(f'`{name}`' for name in aliases)}\n" if aliases else ""
        parts.append(f"## {path}\n{also}\n```text\n{text}\n```\n")
    return "\n".join(parts)


def _helps(
    command: click.Command, path: str, parent: click.Context | None = None
) -> Iterator[tuple[str, str, list[str]]]:
    """(command line, help text, other names of it) of a command and all below it."""
    name = path if parent is None else path.rpartition(" ")[2]
    settings = {**CONTEXT, "terminal_width": _WIDTH}
    with click.Context(command, info_name=name, parent=parent, **settings) as ctx:
        text = "\n".join(line.rstrip() for line in command.get_help(ctx).splitlines())
        aliases = [
            f"omg {alias}"
            for alias, target in omg.aliases.items()
            if isinstance(omg, LazyGroup) and path == f"omg {target}"
        ]
        yield path, text, aliases
        if isinstance(command, click.Group):
            for child in command.list_commands(ctx):
                below = command.get_command(ctx, child)
                if below is not None:
                    yield from _helps(below, f"{path} {child}", ctx)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
