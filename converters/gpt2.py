"""GPT-2: learned positions, layer norms, multi-head attention, biases everywhere, a tied head.

Files store its linear layers as (in, out), `Conv1D`, except GGUF's, whose config says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import Scores, attention
from ohmygpu.convert.decoder import Decoder, Emitter
from ohmygpu.convert.feed_forward import Activation, mlp, read_activation
from ohmygpu.convert.layers import Linear, embedding, lm_head
from ohmygpu.convert.learned_positions import learned_positions
from ohmygpu.convert.residual import NormNames, sequential_layers
from ohmygpu.convert.source import Source
from ohmygpu.convert.transposed import TransposedSource
from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .llama import part

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "conv1d": True,
    }
)
"""What a key that the config lacks means."""

OTHER_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
)
"""Names of today's configs that mean GPT-2's own."""

_NORMS = NormNames("transformer/h", "ln_1", "ln_2", "transformer/ln_f")
_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True, slots=True)
class Config:
    """What a GPT-2's `config.json` decides; every other key of it changes no logits."""

    decoder: Decoder
    activation: Activation
    scales: tuple[float, ...]  # of each layer's attention scores
    tie_word_embeddings: bool
    conv1d: bool  # linear layers are stored as (in, out)

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        own = {OTHER_KEYS.get(key, key): value for key, value in config.items()}
        filled = {**DEFAULTS, **own}
        if fields.flag(filled, "add_cross_attention", False):
            raise UnsupportedModel(
                "a gpt2 with cross-attention is the decoder of a translator and has no converter"
            )
        decoder = _read_decoder(filled)
        scale = decoder.head_dim**-0.5 if fields.flag(filled, "scale_attn_weights", True) else 1.0
        by_layer = fields.flag(filled, "scale_attn_by_inverse_layer_idx", False)
        return Config(
            decoder=decoder,
            activation=read_activation(filled, "activation_function", "gelu_new"),
            scales=tuple(scale / (i + 1 if by_layer else 1) for i in range(decoder.layers)),
            tie_word_embeddings=fields.flag(filled, "tie_word_embeddings", True),
            conv1d=fields.flag(filled, "conv1d", True),
        )


def _read_decoder(config: Mapping[str, Any]) -> Decoder:
    hidden_size, heads = fields.integer(config, "n_embd"), fields.integer(config, "n_head")
    if hidden_size % heads:
        raise CorruptFile(f"n_embd = {hidden_size} cannot be cut into {heads} heads")
    return Decoder(
        vocab_size=fields.integer(config, "vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer(config, "n_layer"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden_size // heads,
        feed_forward_length=fields.integer(config, "n_inner", 4 * hidden_size),
        norm_epsilon=fields.number(config, "layer_norm_epsilon"),
        context_tokens=fields.integer(config, "n_positions"),
    )


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (d.vocab_size, hidden),
        "transformer.wpe.weight": (d.context_tokens, hidden),
        "transformer.ln_f.weight": (hidden,),
        "transformer.ln_f.bias": (hidden,),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = (d.vocab_size, hidden)
    sizes = ((3 * hidden, hidden), (hidden, hidden), (feed_forward, hidden), (hidden, feed_forward))
    for layer in range(d.layers):
        prefix = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            found |= {f"{prefix}.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
        for name, shape in zip(_LINEARS, sizes, strict=True):
            found[f"{prefix}.{name}.weight"] = shape[::-1] if config.conv1d else shape
            found[f"{prefix}.{name}.bias"] = shape[:1]
    return found


def ignored(config: Config, name: str) -> bool:
    """Tensors some files carry that say nothing new: causal masks, a copy of a tied embedding."""
    tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_copy or name.endswith((".attn.bias", ".attn.masked_bias"))


def view(config: Config, source: Source) -> Source:
    """The files with linear layers as (out, in)."""
    if not config.conv1d:
        return source
    names = [
        f"transformer.h.{layer}.{name}.weight"
        for layer in range(config.decoder.layers)
        for name in _LINEARS
    ]
    return TransposedSource(source, names)


def build(config: Config, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""

    def attend(layer: int, x: str) -> str:
        prefix, scores = f"transformer.h.{layer}.attn", Scores(scale=config.scales[layer])
        c_attn, c_proj = part(prefix, "c_attn", True), part(prefix, "c_proj", True)
        path = f"/transformer/h.{layer}/attn"
        return attention(e, path, x, layer, None, [c_attn], c_proj, scores)

    def feed(layer: int, x: str) -> str:
        prefix = f"transformer.h.{layer}.mlp"
        c_fc, c_proj = part(prefix, "c_fc", True), part(prefix, "c_proj", True)
        return mlp(e, f"/transformer/h.{layer}/mlp", x, c_fc, c_proj, config.activation)

    hidden = embedding(e, "transformer.wte.weight", path="/transformer/wte")
    hidden = learned_positions(e, hidden, "transformer.wpe.weight", "/transformer/wpe")
    hidden = sequential_layers(e, hidden, _NORMS, attend, feed)
    lm_head(
        e,
        hidden,
        Linear("transformer.wte.weight" if config.tie_word_embeddings else "lm_head.weight"),
    )
