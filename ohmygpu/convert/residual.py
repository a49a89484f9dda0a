"""How the blocks of layers are joined to the residual stream, with the norms around them.

First layers with RMSNorms, whose names are Llama's; then layers with layer norms, each named by the
path of its nodes, such as `model/layers.0/input_layernorm`; its weight and bias are
`model.layers.0.input_layernorm.weight` and `.bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .decoder import Emitter
from .layers import add, name_of
from .norms import layer_norm, rms_norm, skip_layer_norm, skip_rms_norm

Block = Callable[[int, str], str]
"""(layer, normed hidden states) → what the layer's attention or feed-forward adds to them."""


def pre_norm_layers(
    e: Emitter,
    hidden: str,
    attend: Block,
    feed: Block,
    norm_before_feed: str = "post_attention_layernorm",
) -> str:
    """The last norm of `hidden` after all layers, each with a norm before either block:

    hidden += attend(norm(hidden)), then hidden += feed(norm(hidden)).
    """
    first = "layers.0.input_layernorm"
    normed = rms_norm(e, "/model/layers.0/input_layernorm", hidden, f"model.{first}.weight")
    for layer in range(e.decoder.layers):
        attended = attend(layer, normed)
        following = f"layers.{layer}/{norm_before_feed}"
        normed, hidden = _residual_norm(e, following, attended, hidden)
        fed = feed(layer, normed)
        last = layer + 1 == e.decoder.layers
        following = "norm" if last else f"layers.{layer + 1}/input_layernorm"
        normed, hidden = _residual_norm(e, following, fed, hidden)
    return normed


def _residual_norm(e: Emitter, name: str, x: str, hidden: str) -> tuple[str, str]:
    """(the norm called `name` of x + hidden, x + hidden)."""
    weight = f"model.{name.replace('/', '.')}.weight"
    return skip_rms_norm(e, f"/model/{name}", x, hidden, weight)


def post_norm_layers(e: Emitter, hidden: str, attend: Block, feed: Block) -> str:
    """The last norm of `hidden` after all layers, each with a norm behind either block:

    hidden += norm(attend(hidden)), then hidden += norm(feed(hidden)).
    """
    for layer in range(e.decoder.layers):
        path = f"/model/layers.{layer}"
        hidden = _add_normed(e, f"{path}/post_attention_layernorm", attend(layer, hidden), hidden)
        hidden = _add_normed(e, f"{path}/post_feedforward_layernorm", feed(layer, hidden), hidden)
    return rms_norm(e, "/model/norm", hidden, "model.norm.weight")


def _add_normed(e: Emitter, path: str, x: str, hidden: str) -> str:
    """hidden + norm(x), with the norm called `path`."""
    normed = rms_norm(e, path, x, f"{name_of(path)}.weight")
    return add(e, f"{path}/residual", hidden, normed)


def sandwich_layers(
    e: Emitter,
    hidden: str,
    attend: Block,
    feed: Block,
    before_feed: str,
    after_attend: str,
    after_feed: str,
) -> str:
    """The last norm of `hidden` after all layers, with norms on both sides of either block:

    hidden += norm(attend(norm(hidden))), then hidden += norm(feed(norm(hidden))). The three names
    are those of the norms that are not `input_layernorm`.
    """

    def attend_normed(layer: int, x: str) -> str:
        path = f"/model/layers.{layer}/{after_attend}"
        return rms_norm(e, path, attend(layer, x), f"{name_of(path)}.weight")

    def feed_normed(layer: int, x: str) -> str:
        path = f"/model/layers.{layer}/{after_feed}"
        return rms_norm(e, path, feed(layer, x), f"{name_of(path)}.weight")

    return pre_norm_layers(e, hidden, attend_normed, feed_normed, before_feed)


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
