"""The root command and the list of all commands."""

from __future__ import annotations

from typing import Any

import click

from ohmygpu import __version__

from .lazy import Lazy, LazyGroup

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

_TALK, _MODELS, _DAEMON, _OTHER = "Talk", "Models", "Daemon", "More"

COMMANDS = {
    "run": Lazy(
        "ohmygpu.cli.chat:run", "Chat with a model; pull it first if it is missing.", _TALK
    ),
    "chat": Lazy("ohmygpu.cli.chat:chat", "Chat with an installed model.", _TALK),
    "pull": Lazy("ohmygpu.cli.model:pull", "Install a model.", _MODELS),
    "list": Lazy("ohmygpu.cli.model:list_models", "List the installed models.", _MODELS),
    "show": Lazy("ohmygpu.cli.model:info", "Describe an installed model.", _MODELS),
    "rm": Lazy("ohmygpu.cli.model:remove", "Remove installed models.", _MODELS),
    "search": Lazy("ohmygpu.cli.search:search", "Search the Hugging Face hub.", _MODELS),
    "model": Lazy("ohmygpu.cli.model:model", "All commands about models.", _MODELS),
    "serve": Lazy("ohmygpu.cli.serve:serve", "Start the daemon; see its state; stop it.", _DAEMON),
    "ps": Lazy("ohmygpu.cli.serve:list_loaded", "List the models in memory.", _DAEMON),
    "stop": Lazy("ohmygpu.cli.serve:unload", "Free the memory of a loaded model.", _DAEMON),
    "mcp": Lazy("ohmygpu.cli.mcp:serve_mcp", "Serve the Model Context Protocol on stdio.", _OTHER),
    "config": Lazy("ohmygpu.cli.config:config", "Show and change settings.", _OTHER),
}
ALIASES = {"ls": "list", "start": "serve", "info": "show", "remove": "rm"}


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    aliases=ALIASES,
    context_settings=CONTEXT,
    invoke_without_command=True,
)
@click.version_option(
    __version__, "--version", "-v", prog_name="omg", message="%(prog)s %(version)s"
)
@click.pass_context
def omg(ctx: click.Context) -> None:
    """Run language models on this machine.

    Pull a model from Hugging Face; it is compiled once for this machine and served behind
    OpenAI- and Ollama-compatible APIs.

    \b
      omg serve -d             start the daemon
      omg run smollm2          install a small model and talk to it
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
