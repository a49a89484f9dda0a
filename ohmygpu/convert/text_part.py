"""The text model inside a multimodal one: what it sees or hears is left out, text works alone.

A family of multimodal models is the family of its text model under a prefix. Its module in
`converters/` says what its configs mean and takes the rest from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ohmygpu.core.errors import CorruptFile

from .decoder import Decoder, Emitter
from .family import Family, FamilyConfig, family, text_family
from .source import Source
from .views import View, ViewedSource

_PREFIX = "language_model."
_OTHER_PARTS = ("vision_tower.", "vision_model.", "multi_modal_projector.", "image_newline")


@dataclass(frozen=True, slots=True)
class TextPart:
    """The family of the text model, and its reading of `text_config`."""

    family: Family
    config: FamilyConfig

    @property
    def decoder(self) -> Decoder:
        """Sizes of the text model."""
        return self.config.decoder


def read_text_part(config: Mapping[str, Any], tied: bool) -> TextPart:
    """The text model of a multimodal config; `tied` LM heads are the embedding's matrix.

    Raises CorruptFile for bad fields, UnsupportedModel for a text model that is not built.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CorruptFile(f"the model's config has text_config = {text!r}; an object is needed")
    found = family(text_family(config))
    return TextPart(found, found.Config.read({**text, "tie_word_embeddings": tied}))


def weights(part: TextPart) -> dict[str, tuple[int, ...]]:
    """Every tensor of the text model and its shape, by its name in the files."""
    shapes = part.family.weights(part.config)
    return {_PREFIX + name: shape for name, shape in shapes.items()}


def ignored(part: TextPart, name: str) -> bool:
    """Tensors of the other parts, and what the text model's family ignores."""
    if name.startswith(_PREFIX):
        return part.family.ignored(part.config, name.removeprefix(_PREFIX))
    return name.startswith(_OTHER_PARTS)


def view(part: TextPart, source: Source) -> Source:
    """The text model's tensors by their own names, as its family reads them."""
    names = part.family.weights(part.config)
    bare = ViewedSource(source, {name: View(_PREFIX + name) for name in names})
    return part.family.view(part.config, bare)


def build(part: TextPart, e: Emitter) -> None:
    """Emit the graph, from token ids to logits."""
    part.family.build(part.config, e)
