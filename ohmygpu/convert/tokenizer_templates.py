"""Which of a model's chat templates are used, wherever they are written.

A model has one template, or several with names: `default`, `tool_use` for requests with tools, and
others (`rag`) that nothing asks for. As in transformers, `tool_use` is used for a conversation with
tools and `default` for every other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ohmygpu.core.errors import CorruptFile

from .safetensors import read_json_object

Templates = tuple[str | None, str | None]
"""The template of plain conversations, and that of those with tools where it is another."""

_TOOL_USE = "tool_use"
_MORE = "additional_chat_templates/"
_GGUF = "tokenizer.chat_template"


def repository_templates(files: Mapping[str, Path], settings: Mapping[str, Any]) -> Templates:
    """The templates of a repository; `settings` is its tokenizer_config.json.

    `chat_template.jinja` goes before `tokenizer_config.json` before `chat_template.json`. Raises
    CorruptFile.
    """
    if "chat_template.jinja" in files:
        more = f"{_MORE}{_TOOL_USE}.jinja"
        return _read(files["chat_template.jinja"]), _read(files[more]) if more in files else None
    template = settings.get("chat_template")
    if template is None and "chat_template.json" in files:
        path = files["chat_template.json"]
        template = read_json_object(path.name, path).get("chat_template")
    if isinstance(template, list):
        template = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
    where = "the chat_template in tokenizer_config.json"
    if isinstance(template, dict):
        return _text(template.get("default"), where), _text(template.get(_TOOL_USE), where)
    return _text(template, where), None


def gguf_templates(metadata: Mapping[str, Any], name: str) -> Templates:
    """The templates in a GGUF file's metadata; `name` is the file's. Raises CorruptFile."""
    tool_use = metadata.get(f"{_GGUF}.{_TOOL_USE}")
    return (
        _text(metadata.get(_GGUF), f"{_GGUF} in {name}"),
        _text(tool_use, f"{_GGUF}.{_TOOL_USE} in {name}"),
    )


def _text(template: Any, where: str) -> str | None:
    if template is not None and not isinstance(template, str):
        raise CorruptFile(f"{where} is not text; pull the model again")
    return template or None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") or None
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path.name} cannot be read; pull the model again") from error
