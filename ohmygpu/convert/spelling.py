"""One spelling of what repositories say in several, before a family reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .source import Source, row_chunks
from .views import View, ViewedSource

# How newer files of multimodal models name parts → how older ones do, and families here.
_NEWER_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")


class SpelledSource(ViewedSource):
    """A source under other names, and with another config."""

    def __init__(self, source: Source, names: Mapping[str, str], config: dict[str, Any]) -> None:
        """`names`: name here → name in the source."""
        super().__init__(source, {name: View(of) for name, of in names.items()})
        self._config = config

    @property
    def config(self) -> dict[str, Any]:
        """The config in place of the source's."""
        return self._config


def spelled(source: Source) -> Source:
    """The source with tensors and config in the spelling that families know.

    Tensors of multimodal models begin with `language_model.`, as in most repositories; releases of
    transformers have also written them the other way round. And a config that ties the LM head to
    the embedding, by its default or by mistake, where the files hold two different ones, is
    overruled by the files, as in transformers.
    """
    names = {_older_name(name, source): name for name in source.tensors}
    config = source.config
    if source.format != "gguf" and _has_own_head(source):
        config = {**config, "tie_word_embeddings": False}
        if isinstance(config.get("text_config"), Mapping):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    if config is source.config and all(name == of for name, of in names.items()):
        return source
    return SpelledSource(source, names, config)


def _older_name(name: str, source: Source) -> str:
    if not isinstance(source.config.get("text_config"), Mapping):
        return name
    for newer, older in _NEWER_PREFIXES.items():
        if name.startswith(newer):
            return older + name.removeprefix(newer)
    return name


def _has_own_head(source: Source) -> bool:
    """Whether the files hold an LM head of the embedding's shape and of other values."""
    head, embedding = (
        next((name for name in source.tensors if name.endswith(endings)), None)
        for endings in (_HEADS, _EMBEDDINGS)
    )
    if head is None or embedding is None:
        return False
    shape = source.tensors[head].shape
    if shape != source.tensors[embedding].shape or len(shape) != 2:
        return False
    return any(
        not np.array_equal(
            source.read_rows(head, start, stop), source.read_rows(embedding, start, stop)
        )
        for start, stop in row_chunks(*shape)
    )
