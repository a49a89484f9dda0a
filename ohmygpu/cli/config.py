"""`omg config`: show and change settings."""

from __future__ import annotations

import difflib

import click

from ohmygpu.core.errors import ConfigError
from ohmygpu.core.settings import (
    CONFIG_FILE,
    describe,
    find_home,
    load_settings,
    set_setting,
    show_value,
)

from .options import json_option
from .output import line, note, table, write_json


@click.group(invoke_without_command=True)
@json_option("Print the settings as JSON.")
@click.pass_context
def config(ctx: click.Context, as_json: bool) -> None:
    """Show and change settings.

    Without a command: every setting, its value and where it came from: the default, config.toml,
    the environment (OHMYGPU_SECTION_KEY) or the command line, the later ones winning.
    """
    if ctx.invoked_subcommand is not None:
        return
    rows = describe(load_settings())
    if as_json:
        settings = [
            {"key": row.key, "value": row.value, "origin": row.origin, "help": row.help}
            for row in rows
        ]
        write_json({"settings": settings})
    else:
        table(
            ["SETTING", "VALUE", "FROM", "MEANING"],
            [(row.key, row.value or "(none)", row.origin, row.help) for row in rows],
        )


@config.command("get")
@click.argument("key")
def get_key(key: str) -> None:
    """Print one setting's value, as server.port."""
    rows = {row.key: row for row in describe(load_settings())}
    if key not in rows:
        near = difflib.get_close_matches(key, rows, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "`omg config` lists them all"
        raise ConfigError(f"there is no setting {key!r}; {hint}", key=key, suggestions=near)
    line(rows[key].value)


@config.command("set", context_settings={"ignore_unknown_options": True})  # VALUE may be -1
@click.argument("key")
@click.argument("value")
def set_key(key: str, value: str) -> None:
    """Write a setting to config.toml, keeping what else is there.

    The daemon reads its settings when it starts.
    """
    home, _ = find_home({})  # not load_settings: it would refuse the very file that this repairs
    line(f"{key} = {show_value(set_setting(home, key, value))}")
    origin = load_settings().origins.get(key, "")
    if origin.startswith("environment"):
        note(f"note: {origin} is set, and wins over config.toml")


@config.command("path")
def show_path() -> None:
    """Print where config.toml is, whether or not it exists yet."""
    home, _ = find_home({})
    line(str(home / CONFIG_FILE))
