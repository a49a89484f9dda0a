"""Positions told by a learned table that is added to the token embeddings."""

from __future__ import annotations

from .decoder import Emitter
from .layers import add, name_of
from .rotary import positions


def learned_positions(
    e: Emitter, hidden: str, weight: str, path: str = "/model/embed_positions"
) -> str:
    """hidden + the rows of `weight`, (context, hidden), for the positions of the new tokens."""
    table = e.weights.floats(weight, name_of(path))
    rows = e.graph.node(f"{path}/Gather", [table.data, positions(e)])
    return add(e, path, hidden, rows)
