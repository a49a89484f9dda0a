"""BERT: an encoder with learned positions, a norm after each block, GELU feed-forward.

all-MiniLM, BGE, E5, GTE and most other embedding models of before 2024; roberta, mpnet and
distilbert are the same network with other names or positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ohmygpu.convert import config as fields
from ohmygpu.convert.attention import projections, separate
from ohmygpu.convert.decoder import Decoder
from ohmygpu.convert.embedding import EmbeddingEmitter
from ohmygpu.convert.encoder import full_attention, learned_positions, token_type
from ohmygpu.convert.feed_forward import Activation, mlp, read_activation
from ohmygpu.convert.layers import Linear, add, embedding, linear
from ohmygpu.convert.norms import layer_norm, skip_layer_norm
from ohmygpu.convert.source import Source
from ohmygpu.core.errors import CorruptFile, UnsupportedModel


@dataclass(frozen=True, slots=True)
class Config:
    """What a BERT's `config.json` decides; every other key of it changes no vector."""

    decoder: Decoder  # kv_heads = heads
    activation: Activation
    type_vocab_size: int  # 0 = no token types
    first_position: int  # the row of the position embedding that the first token has

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        return read_config(config, first_position=0)


def read_config(config: Mapping[str, Any], first_position: int) -> Config:
    """`Config.read` where `first_position` rows of the position embedding are never used."""
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise UnsupportedModel(f"position embeddings of the type {positions!r} have no converter")
    for key in ("is_decoder", "add_cross_attention"):
        if fields.flag(config, key, False):
            raise UnsupportedModel(f"a {config.get('model_type')} with {key} has no converter")
    hidden_size = fields.integer(config, "hidden_size")
    heads = fields.integer(config, "num_attention_heads")
    if hidden_size % heads:
        raise CorruptFile(f"{heads} attention heads cannot share a hidden size of {hidden_size}")
    decoder = Decoder(
        vocab_size=fields.integer(config, "vocab_size"),
        hidden_size=hidden_size,
        layers=fields.integer(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden_size // heads,
        feed_forward_length=fields.integer(config, "intermediate_size"),
        norm_epsilon=fields.number(config, "layer_norm_eps", 1e-12),
        context_tokens=fields.integer(config, "max_position_embeddings", 512) - first_position,
    )
    return Config(
        decoder=decoder,
        activation=read_activation(config, "hidden_act", "gelu"),
        type_vocab_size=fields.integer(config, "type_vocab_size", 2),
        first_position=first_position,
    )


def without_types(config: Config) -> Config:
    """The same without token types."""
    return replace(config, type_vocab_size=0)


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    d = config.decoder
    hidden, feed_forward = d.hidden_size, d.feed_forward_length
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (d.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (
            d.context_tokens + config.first_position,
            hidden,
        ),
    }
    if config.type_vocab_size:
        found["embeddings.token_type_embeddings.weight"] = (config.type_vocab_size, hidden)
    parts: dict[str, tuple[int, ...]] = {"embeddings.LayerNorm": (hidden,)}
    for layer in range(d.layers):
        prefix = f"encoder.layer.{layer}"
        parts |= {f"{prefix}.attention.self.{name}": (hidden, hidden) for name in _QKV}
        parts |= {
            f"{prefix}.attention.output.dense": (hidden, hidden),
            f"{prefix}.attention.output.LayerNorm": (hidden,),
            f"{prefix}.intermediate.dense": (feed_forward, hidden),
            f"{prefix}.output.dense": (hidden, feed_forward),
            f"{prefix}.output.LayerNorm": (hidden,),
        }
    for name, shape in parts.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


_QKV = ("query", "key", "value")


def ignored(config: Config, name: str) -> bool:
    """The heads of pre-training, the pooler (no embedding is made of it) and a buffer."""
    return name.startswith(("cls.", "lm_head.", "pooler.")) or name.endswith(
        (".pooler.dense.weight", ".pooler.dense.bias", "embeddings.position_ids")
    )


def view(config: Config, source: Source) -> Source:
    """The files' own arrangement."""
    return source


def build(config: Config, e: EmbeddingEmitter) -> None:
    """Emit the graph, from token ids to the last hidden states."""
    hidden = embeddings(config, e)
    for layer in range(e.decoder.layers):
        path = f"/encoder/layer.{layer}"
        q, k, v = queries_keys_values(e, layer, hidden)
        attended = full_attention(e, f"{path}/attention", q, k, v)
        hidden = rest_of_layer(config, e, layer, attended, hidden)
    e.ends_at(hidden)


def embeddings(config: Config, e: EmbeddingEmitter) -> str:
    """norm(word + position + token type 0), (B, S, hidden)."""
    path = "/embeddings"
    words = embedding(e, "embeddings.word_embeddings.weight", path=f"{path}/word_embeddings")
    positions = learned_positions(
        e,
        f"{path}/position_embeddings",
        "embeddings.position_embeddings.weight",
        config.first_position,
    )
    if config.type_vocab_size:
        kind = token_type(
            e, f"{path}/token_type_embeddings", "embeddings.token_type_embeddings.weight"
        )
        positions = add(e, f"{path}/token_type", positions, kind)
    hidden = add(e, f"{path}/positions", words, positions)
    norm = "embeddings.LayerNorm"
    return layer_norm(e, f"{path}/LayerNorm", hidden, f"{norm}.weight", f"{norm}.bias")


def queries_keys_values(e: EmbeddingEmitter, layer: int, hidden: str) -> list[str]:
    """The three of a layer, (B, S, hidden) each."""
    path = f"/encoder/layer.{layer}/attention/self"
    parts = [_linear(f"encoder.layer.{layer}.attention.self.{name}") for name in _QKV]
    return separate(e, path, projections(e, path, hidden, parts))


def rest_of_layer(
    config: Config, e: EmbeddingEmitter, layer: int, attended: str, hidden: str
) -> str:
    """What follows the attention: its output layer, the feed-forward block, a norm after each."""
    path, prefix = f"/encoder/layer.{layer}", f"encoder.layer.{layer}"
    attended = linear(
        e, f"{path}/attention/output/dense", attended, [_linear(f"{prefix}.attention.output.dense")]
    )
    norm = f"{prefix}.attention.output.LayerNorm"
    hidden, _ = skip_layer_norm(
        e, f"{path}/attention/output", attended, hidden, f"{norm}.weight", f"{norm}.bias"
    )
    up, down = _linear(f"{prefix}.intermediate.dense"), _linear(f"{prefix}.output.dense")
    fed = mlp(e, f"{path}/mlp", hidden, up, down, config.activation)
    norm = f"{prefix}.output.LayerNorm"
    hidden, _ = skip_layer_norm(e, f"{path}/output", fed, hidden, f"{norm}.weight", f"{norm}.bias")
    return hidden


def _linear(name: str) -> Linear:
    return Linear(f"{name}.weight", f"{name}.bias")
