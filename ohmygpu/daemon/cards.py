"""What the daemon says about an installed model: one card from its record and its compile.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ohmygpu.core.errors import CorruptFile
from ohmygpu.core.fidelity import Fidelity, load_fidelity
from ohmygpu.core.records import TEMPLATE_FILE, TOKENIZER_FILE, CompiledModel, InstallRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """An installed model as both APIs describe it.

    `template` is the chat template's text, "" when the model has none; `folder` is the compiled
    model's, where the tokenizer lies.
    """

    record: InstallRecord
    compiled: CompiledModel
    template: str
    folder: Path
    fidelity: Mapping[str, Fidelity] = field(default_factory=dict)  # by graph, where measured

    @property
    def name(self) -> str:
        """The listed name, always with a tag: `name:latest`, or `name:variant` if not default.

        `/v1/models`, `/api/tags` and `/api/ps` all use it, and every request accepts it back.
        """
        tag = "latest" if self.record.is_default else self.record.variant
        return f"{self.record.name}:{tag}"

    @property
    def digest(self) -> str:
        """64 hex digits, stable for the same compiled content."""
        return self.record.digest

    @property
    def size_bytes(self) -> int:
        """Bytes of the compiled model on disk."""
        return self.record.compiled_bytes

    @property
    def installed_at(self) -> datetime:
        """When it was installed, UTC."""
        moment = datetime.fromisoformat(self.record.installed_at)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)

    @property
    def has_template(self) -> bool:
        """Whether it can chat; without a chat template it only continues text."""
        return bool(self.template.strip()) and not self.embeds

    @property
    def embeds(self) -> bool:
        """Whether it makes vectors of texts, and cannot generate."""
        return self.compiled.kind == "encoder"

    @property
    def capabilities(self) -> list[str]:
        """Ollama's words for what requests the model can serve."""
        return ["embedding"] if self.embeds else ["completion"]


def read_card(record: InstallRecord, folder: Path) -> ModelCard:
    """Card of the model compiled in `folder`. Raises CorruptFile when its files are damaged."""
    compiled = CompiledModel.load(folder)
    path = folder / TEMPLATE_FILE
    try:
        template = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        raise CorruptFile(
            f"the chat template of {record.full_name} is damaged ({_reason(error)}); remove it "
            "with omg model rm, then pull it again"
        ) from error
    return ModelCard(
        record=record,
        compiled=compiled,
        template=template,
        folder=folder,
        fidelity=load_fidelity(folder),
    )


def read_vocabulary(card: ModelCard) -> tuple[list[str], list[str]]:
    """(tokens by id, merges "a b") of the model's tokenizer; merges are empty where it has none.

    Raises CorruptFile when the tokenizer file is damaged.
    """
    try:
        data = json.loads((card.folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
        model = data["model"]
        tokens = _tokens_by_id(model["vocab"], data.get("added_tokens") or [])
        merges = model.get("merges") or []
        return tokens, [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFile(
            f"the tokenizer of {card.record.full_name} is damaged ({_reason(error)}); remove it "
            "with omg model rm, then pull it again"
        ) from error


def _tokens_by_id(vocab: Any, added: list[dict[str, Any]]) -> list[str]:
    if isinstance(vocab, dict):
        by_id = {int(token_id): token for token, token_id in vocab.items()}
    else:  # unigram: [[token, score], …] in the order of ids
        by_id = {token_id: entry[0] for token_id, entry in enumerate(vocab)}
    by_id.update({int(entry["id"]): entry["content"] for entry in added})
    return [by_id.get(token_id, "") for token_id in range(max(by_id, default=-1) + 1)]


def _reason(error: Exception) -> str:
    """What went wrong, without the path that an OSError shows."""
    return str(error.strerror if isinstance(error, OSError) else error)
