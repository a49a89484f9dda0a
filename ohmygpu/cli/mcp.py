"""`omg mcp`: the MCP server on stdio."""

from __future__ import annotations

import click

from ohmygpu.core.settings import load_settings


@click.command("mcp")
def serve_mcp() -> None:
    """Serve the Model Context Protocol on stdio, for assistants and editors.

    Offers the tools chat, list_models and status. It talks to the daemon, which `omg serve`
    starts; end of input ends it.
    """
    settings = load_settings()
    from ohmygpu.mcp.server import serve

    serve(settings)
