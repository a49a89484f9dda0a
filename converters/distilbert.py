"""DistilBERT: BERT without token types, under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ohmygpu.convert.source import Source
from ohmygpu.convert.views import View, ViewedSource

from . import bert
from .bert import build

__all__ = ["Config", "build", "ignored", "view", "weights"]

_KEYS = {  # BERT's name of a config key → DistilBERT's
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "hidden_act": "activation",
}
_NAMES = (  # part of a tensor's name in BERT → in DistilBERT
    ("encoder.layer.", "transformer.layer."),
    ("attention.self.query.", "attention.q_lin."),
    ("attention.self.key.", "attention.k_lin."),
    ("attention.self.value.", "attention.v_lin."),
    ("attention.output.dense.", "attention.out_lin."),
    ("attention.output.LayerNorm.", "sa_layer_norm."),
    ("intermediate.dense.", "ffn.lin1."),
    ("output.dense.", "ffn.lin2."),
    ("output.LayerNorm.", "output_layer_norm."),
)


class Config:
    """Reads a DistilBERT's `config.json` into BERT's Config."""

    @staticmethod
    def read(config: Mapping[str, Any]) -> bert.Config:
        """Raises CorruptFile for bad fields, UnsupportedModel for what is not built here."""
        named = dict(config) | {key: config.get(own) for key, own in _KEYS.items()}
        return bert.without_types(bert.read_config(named, first_position=0))


def weights(config: bert.Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the files and its shape."""
    return {_own_name(name): shape for name, shape in bert.weights(config).items()}


def ignored(config: bert.Config, name: str) -> bool:
    """The head of pre-training."""
    return name.startswith("vocab_")


def view(config: bert.Config, source: Source) -> Source:
    """The tensors under BERT's names."""
    return ViewedSource(source, {name: View(_own_name(name)) for name in bert.weights(config)})


def _own_name(name: str) -> str:
    for part, own in _NAMES:
        name = name.replace(part, own)
    return name
