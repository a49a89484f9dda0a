"""`omg search`: find models on the hub, and say which of them can be compiled."""

from __future__ import annotations

import click

from ohmygpu.core.hub import Hub, SearchHit
from ohmygpu.core.settings import load_settings
from ohmygpu.core.sizes import human_bytes, human_count
from ohmygpu.install import supported_model_types

from .options import json_option
from .output import note, table, write_json

_MAX_LIMIT = 100


@click.command("search")
@click.argument("query", nargs=-1, required=True)
@click.option(
    "--limit",
    type=click.IntRange(1, _MAX_LIMIT),
    default=20,
    show_default=True,
    metavar="N",
    help="Show at most N models.",
)
@json_option("Print the models as JSON.")
def search(query: tuple[str, ...], limit: int, as_json: bool) -> None:
    """Search the Hugging Face hub for models to pull.

    CONVERTER says whether the architecture can be compiled: yes, no, or ? where the hub does not
    tell the architecture.
    """
    settings = load_settings()
    hub = Hub(settings.hub.endpoint, settings.hub.token)
    hits = hub.search(" ".join(query), limit)
    supported = frozenset(supported_model_types())
    if as_json:
        write_json(
            {"models": [hit.to_dict() | {"converter": _converter(hit, supported)} for hit in hits]}
        )
        return
    if not hits:
        note("nothing found; try fewer or other words")
        return
    rows = [
        (
            hit.id,
            human_count(hit.downloads),
            human_count(hit.likes),
            human_bytes(hit.size_bytes) if hit.size_bytes is not None else "?",
            {True: "yes", False: "no", None: "?"}[_converter(hit, supported)]
            + (f" ({hit.model_type})" if hit.model_type else ""),
            "gated" if hit.gated else "",
        )
        for hit in hits
    ]
    table(["NAME", "DOWNLOADS", "LIKES", "SIZE", "CONVERTER", "ACCESS"], rows)


def _converter(hit: SearchHit, supported: frozenset[str]) -> bool | None:
    """Whether a converter exists; None where the hub does not tell the architecture."""
    if not (hit.has_gguf or hit.has_safetensors):
        return False  # no weights in a format that is read
    return None if hit.model_type is None else hit.model_type in supported
