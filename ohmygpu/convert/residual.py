"""How the blocks of layers with layer norms are joined to the residual stream.

A norm is named by the path of its nodes, such as `model/layers.0/input_layernorm`; its weight and
bias are `model.layers.0.input_layernorm.weight` and `.bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .decoder import Emitter
from .layers import add
from .norms import layer_norm, skip_layer_norm

Block = Callable[[int, str], str]
"""(layer, normed hidden states) → what the block adds to the hidden states."""


@dataclass(frozen=True, slots=True)
class NormNames:
    """Where a model's norms are: `layers`.N/`first`, `layers`.N/`second`, `last`."""

    layers: str
    first: str
    second: str
    last: str

    def following(self, e: Emitter, layer: int) -> str:
        """The norm after layer `layer`: the next layer's first, or the last one."""
        last = layer + 1 == e.decoder.layers
        return self.last if last else f"{self.layers}.{layer + 1}/{self.first}"


def sequential_layers(e: Emitter, hidden: str, names: NormNames, attend: Block, feed: Block) -> str:
    """The last norm of `hidden` after all layers, each with a norm before either block:

    hidden += attend(first(hidden)), then hidden += feed(second(hidden)).
    """
    normed = norm(e, f"{names.layers}.0/{names.first}", hidden)
    for layer in range(e.decoder.layers):
        attended = attend(layer, normed)
        between = f"{names.layers}.{layer}/{names.second}"
        normed, hidden = residual_norm(e, between, attended, hidden)
        fed = feed(layer, normed)
        normed, hidden = residual_norm(e, names.following(e, layer), fed, hidden)
    return normed


def parallel_layers(e: Emitter, hidden: str, names: NormNames, attend: Block, feed: Block) -> str:
    """The last norm of `hidden` after all layers, each with one norm that both blocks read:

    hidden += attend(first(hidden)) + feed(first(hidden)).
    """
    normed = norm(e, f"{names.layers}.0/{names.first}", hidden)
    for layer in range(e.decoder.layers):
        both = add(e, f"/{names.layers}.{layer}", attend(layer, normed), feed(layer, normed))
        normed, hidden = residual_norm(e, names.following(e, layer), both, hidden)
    return normed


def twice_normed_parallel_layers(
    e: Emitter, hidden: str, names: NormNames, attend: Block, feed: Block
) -> str:
    """The last norm of `hidden` after all layers, each with a norm of its own for either block:

    hidden += attend(first(hidden)) + feed(second(hidden)).
    """
    normed = norm(e, f"{names.layers}.0/{names.first}", hidden)
    for layer in range(e.decoder.layers):
        attended = attend(layer, normed)
        fed = feed(layer, norm(e, f"{names.layers}.{layer}/{names.second}", hidden))
        both = add(e, f"/{names.layers}.{layer}", attended, fed)
        normed, hidden = residual_norm(e, names.following(e, layer), both, hidden)
    return normed


def norm(e: Emitter, name: str, x: str) -> str:
    """The layer norm called `name` of x."""
    tensor = name.replace("/", ".")
    return layer_norm(e, f"/{name}", x, f"{tensor}.weight", f"{tensor}.bias")


def residual_norm(e: Emitter, name: str, x: str, hidden: str) -> tuple[str, str]:
    """(the layer norm called `name` of x + hidden, x + hidden)."""
    tensor = name.replace("/", ".")
    return skip_layer_norm(e, f"/{name}", x, hidden, f"{tensor}.weight", f"{tensor}.bias")
