"""Chat templates of the families: rendered as transformers renders them, with tools."""

from __future__ import annotations

from collections.abc import Mapping

from tests.runtime_onnx.tool_talks import TALKS, differences
from tests.runtime_onnx.tool_templates import TOOL_TEMPLATES

STYLES: Mapping[str, tuple[str, ...]] = {
    "gemma3": ("gemma 3",),
    "gemma3_text": ("gemma 3",),
    "gpt_oss": ("harmony",),
    "granite": ("granite",),
    "granitemoe": ("granite",),
    "llama": ("llama 3.1", "deepseek r1", "hermes"),
    "ministral3": ("mistral v7",),
    "mistral": ("mistral v7", "hermes"),
    "mistral3": ("mistral v7",),
    "mixtral": ("mistral v7",),
    "qwen2": ("hermes", "deepseek r1"),
    "qwen2_moe": ("hermes",),
    "qwen3": ("qwen3",),
    "qwen3_moe": ("qwen3",),
}
"""How the templates with tools of well-known models of a family are built."""


def cell(family: str) -> str:
    """The styles of a family's templates, FAILS among them; empty where none is known."""
    return ", ".join(
        style if _is_equal(style) else f"{style} FAILS" for style in STYLES.get(family, ())
    )


def _is_equal(style: str) -> bool:
    return not any(differences(TOOL_TEMPLATES[style], talk) for talk in TALKS.values())
