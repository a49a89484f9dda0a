"""MPNet: BERT with a bias for the distance between tokens, one for all layers, and no token types.

all-mpnet-base-v2, multi-qa-mpnet and others. The distances are T5's (arXiv 1910.10683, §2.1):
small ones exact, larger ones in steps that grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ohmygpu.convert import config as fields
from ohmygpu.convert.decoder import Decoder
from ohmygpu.convert.embedding import EmbeddingEmitter
from ohmygpu.convert.encoder import distance_bias, full_attention
from ohmygpu.convert.source import Source
from ohmygpu.convert.views import View, ViewedSource

from . import bert

_MAX_DISTANCE = 128
_RELATIVE = "encoder.relative_attention_bias.weight"
_NAMES = (  # part of a tensor's name in BERT → in MPNet
    ("attention.self.query.", "attention.attn.q."),
    ("attention.self.key.", "attention.attn.k."),
    ("attention.self.value.", "attention.attn.v."),
    ("attention.output.dense.", "attention.attn.o."),
    ("attention.output.LayerNorm.", "attention.LayerNorm."),
)


@dataclass(frozen=True, slots=True)
class Config:
    """What an MPNet's `config.json` decides."""

    bert: bert.Config
    buckets: int  # distances that are told apart

    @property
    def decoder(self) -> Decoder:
        """Sizes of the model."""
        return self.bert.decoder

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        padding = fields.integer(config, "pad_token_id", 1)
        named = {"layer_norm_eps": 1e-12, "type_vocab_size": 1} | dict(config)
        read = bert.read_config(named, first_position=padding + 1)
        buckets = fields.integer(config, "relative_attention_num_buckets", 32)
        return Config(bert.without_types(read), buckets)


def weights(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    found = {_own_name(name): shape for name, shape in bert.weights(config.bert).items()}
    return found | {_RELATIVE: (config.buckets, config.decoder.heads)}


def ignored(config: Config, name: str) -> bool:
    """What BERT's files may have beside the encoder, too."""
    return bert.ignored(config.bert, name)


def view(config: Config, source: Source) -> Source:
    """The tensors under BERT's names."""
    views = {name: View(_own_name(name)) for name in bert.weights(config.bert)}
    return ViewedSource(source, views | {_RELATIVE: View(_RELATIVE)})


def build(config: Config, e: EmbeddingEmitter) -> None:
    """Emit the graph, from token ids to the last hidden states."""
    distances = np.arange(1 - e.decoder.context_tokens, e.decoder.context_tokens)
    buckets = np.array([bucket(int(distance), config.buckets) for distance in distances])
    bias = distance_bias(e, "/encoder/relative_attention_bias", _RELATIVE, buckets)
    hidden = bert.embeddings(config.bert, e)
    for layer in range(e.decoder.layers):
        q, k, v = bert.queries_keys_values(e, layer, hidden)
        attended = full_attention(e, f"/encoder/layer.{layer}/attention", q, k, v, bias)
        hidden = bert.rest_of_layer(config.bert, e, layer, attended, hidden)
    e.ends_at(hidden)


def bucket(distance: int, buckets: int) -> int:
    """The row of the bias for a key `distance` tokens behind its query (negative: before it)."""
    half = buckets // 2
    first = half if distance > 0 else 0
    exact, far = half // 2, abs(distance)
    if far < exact:
        return first + far
    # float32, as the model was trained: at powers of two a float64 falls on the other side
    share = np.log(np.float32(far) / np.float32(exact)) / np.float32(
        math.log(_MAX_DISTANCE / exact)
    )
    return first + min(half - 1, exact + int(share * np.float32(half - exact)))


def _own_name(name: str) -> str:
    for part, own in _NAMES:
        name = name.replace(part, own)
    return name
