"""ModernBERT: an encoder with RoPE, a norm before each block, GeGLU, and local attention.

Most layers attend to the tokens near by only; each kind of layer has its own RoPE.
https://arxiv.org/abs/2412.13663
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Decoder
from ohmygpu.convert.embedding import EmbeddingEmitter
from ohmygpu.convert.encoder import full_attention, local_attention, turned_by_columns
from ohmygpu.convert.feed_forward import Activation, gated_mlp, read_activation
from ohmygpu.convert.layers import Linear, embedding, linear
from ohmygpu.convert.norms import layer_norm, skip_layer_norm
from ohmygpu.convert.rope import Rope, read_rope
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import View, ViewedSource
from ohmygpu.core.errors import CorruptFile

_FULL, _LOCAL = "full_attention", "sliding_attention"
_THETAS = {_FULL: ("global_rope_theta", 160000.0), _LOCAL: ("local_rope_theta", 10000.0)}


@dataclass(frozen=True, slots=True)
class Config:
    """What a ModernBERT's `config.json` decides; every other key of it changes no vector."""

    decoder: Decoder  # kv_heads = heads
    activation: Activation
    layer_types: tuple[str, ...]
    reach: int  # tokens seen on each side by local attention
    ropes: dict[str, Rope]  # by layer type
    attention_bias: bool
    mlp_bias: bool
    norm_bias: bool

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        hidden_size = fields.integer(config, "hidden_size")
        heads = fields.integer(config, "num_attention_heads")
        if hidden_size % heads:
            raise CorruptFile(f"{heads} attention heads cannot share {hidden_size} elements")
        layers = fields.integer(config, "num_hidden_layers")
        decoder = Decoder(
            vocab_size=fields.integer(config, "vocab_size"),
            hidden_size=hidden_size,
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head_dim=hidden_size // heads,
            feed_forward_length=fields.integer(config, "intermediate_size"),
            norm_epsilon=fields.number(config, "norm_eps", 1e-5),
            context_tokens=fields.integer(config, "max_position_embeddings", 8192),
        )
        return Config(
            decoder=decoder,
            activation=read_activation(config, "hidden_activation", "gelu"),
            layer_types=_layer_types(config, layers),
            reach=max(fields.integer(config, "local_attention", 128) // 2, 1),
            ropes={kind: _rope(config, kind, decoder.head_dim) for kind in _THETAS},
            attention_bias=fields.flag(config, "attention_bias", False),
            mlp_bias=fields.flag(config, "mlp_bias", False),
            norm_bias=fields.flag(config, "norm_bias", False),
        )


def _layer_types(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    found = config.get("layer_types")
    if found is None:
        every = fields.integer(config, "global_attn_every_n_layers", 3)
        return tuple(_LOCAL if layer % every else _FULL for layer in range(layers))
    if not isinstance(found, list) or len(found) != layers or not set(found) <= set(_THETAS):
        raise CorruptFile(f"the model's config has layer_types = {str(found)[:80]}")
    return tuple(found)


def _rope(config: Mapping[str, Any], kind: str, head_dim: int) -> Rope:
    key, theta = _THETAS[kind]
    parameters = config.get("rope_parameters")
    own = parameters.get(kind) if isinstance(parameters, Mapping) else None
    found = {"rope_theta": fields.number(config, key, theta)} | dict(own or {})
    if own is None and isinstance(config.get("rope_scaling"), Mapping):
        found |= config["rope_scaling"]
    positions = fields.integer(config, "max_position_embeddings", 8192)
    return read_rope({"rope_parameters": found, "max_position_embeddings": positions}, head_dim)


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    found: dict[str, tuple[int, ...]] = {"embeddings.tok_embeddings.weight": (d.vocab_size, hidden)}
    norms = ["embeddings.norm", "final_norm"]
    for layer in range(d.layers):
        prefix = f"layers.{layer}"
        norms += [f"{prefix}.mlp_norm", *([f"{prefix}.attn_norm"] if layer else [])]
        for name, shape, bias in (
            ("attn.Wqkv", (3 * hidden, hidden), config.attention_bias),
            ("attn.Wo", (hidden, hidden), config.attention_bias),
            ("mlp.Wi", (2 * feed_forward, hidden), config.mlp_bias),
            ("mlp.Wo", (hidden, feed_forward), config.mlp_bias),
        ):
            found[f"{prefix}.{name}.weight"] = shape
            if bias:
                found[f"{prefix}.{name}.bias"] = shape[:1]
    for norm in norms:
        found[f"{norm}.weight"] = (hidden,)
        if config.norm_bias:
            found[f"{norm}.bias"] = (hidden,)
    return found


def ignored(config: Config, name: str) -> bool:
    """The heads of pre-training and classification."""
    return name.startswith(("head.", "decoder.", "classifier."))


def view(config: Config, source: Source) -> Source:
    """Each matrix that holds several, as several."""
    d = config.decoder
    parts = {
        "attn.Wqkv": [(f"attn.{name}", d.hidden_size) for name in ("q", "k", "v")],
        "mlp.Wi": [("mlp.gate", d.feed_forward_length), ("mlp.up", d.feed_forward_length)],
    }
    views = {name: View(name) for name in weights(config)}
    for layer in range(d.layers):
        for stacked, pieces in parts.items():
            for kind in ("weight", "bias"):
                whole = views.pop(f"layers.{layer}.{stacked}.{kind}", None)
                start = 0
                for name, rows in pieces if whole else ():
                    place = f"layers.{layer}.{name}.{kind}"
                    views[place] = View(
                        f"layers.{layer}.{stacked}.{kind}", range(start, start + rows)
                    )
                    start += rows
    return ViewedSource(source, views)


def build(config: Config, e: EmbeddingEmitter) -> None:
    """Emit the graph, from token ids to the last hidden states."""

    def norm(name: str) -> tuple[str, str | None]:
        return f"{name}.weight", f"{name}.bias" if config.norm_bias else None

    turns = {
        kind: turned_by_columns(e, rope, kind)
        for kind, rope in config.ropes.items()
        if kind in config.layer_types
    }
    words = embedding(e, "embeddings.tok_embeddings.weight", path="/embeddings/tok_embeddings")
    hidden = layer_norm(e, "/embeddings/norm", words, *norm("embeddings.norm"))
    normed = hidden  # the first layer has no norm of its own
    for layer, kind in enumerate(config.layer_types):
        path, prefix = f"/layers.{layer}", f"layers.{layer}"

        def part(name: str, bias: bool, prefix: str = prefix) -> Linear:
            return Linear(f"{prefix}.{name}.weight", f"{prefix}.{name}.bias" if bias else None)

        q, k, v = (
            linear(e, f"{path}/attn/{name}", normed, [part(f"attn.{name}", config.attention_bias)])
            for name in "qkv"
        )
        q, k = (turns[kind](f"{path}/attn/{name}", x) for name, x in (("q", q), ("k", k)))
        if kind == _FULL:
            attended = full_attention(e, f"{path}/attn", q, k, v)
        else:
            attended = local_attention(e, f"{path}/attn", q, k, v, config.reach)
        attended = linear(e, f"{path}/attn/Wo", attended, [part("attn.Wo", config.attention_bias)])
        normed, hidden = skip_layer_norm(
            e, f"{path}/mlp_norm", attended, hidden, *norm(f"{prefix}.mlp_norm")
        )
        gate, up, down = (part(f"mlp.{name}", config.mlp_bias) for name in ("gate", "up", "Wo"))
        fed = gated_mlp(e, f"{path}/mlp", normed, gate, up, down, config.activation)
        last = layer + 1 == e.decoder.layers
        name = "final_norm" if last else f"layers.{layer + 1}.attn_norm"
        normed, hidden = skip_layer_norm(
            e, f"/{name.replace('.attn', '/attn')}", fed, hidden, *norm(name)
        )
    e.ends_at(normed)
