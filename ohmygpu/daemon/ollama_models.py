"""Ollama's wire format of installed and loaded models: /api/tags, /api/ps and /api/show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from .cards import ModelCard, read_vocabulary
from .options import parameter_lines

_FOREVER = timedelta(days=106_751)  # Go's longest duration: what Ollama shows for "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A loaded model for /api/ps. `expires_in_s`: inf = never."""

    card: ModelCard
    size_bytes: int
    vram_bytes: int
    context_tokens: int
    expires_in_s: float


def to_tags(cards: list[ModelCard]) -> dict[str, Any]:
    """Body of GET /api/tags, newest first."""
    newest_first = sorted(cards, key=lambda card: card.installed_at, reverse=True)
    return {
        "models": [
            {
                "name": card.name,
                "model": card.name,
                "modified_at": timestamp(card.installed_at),
                "size": card.size_bytes,
                "digest": card.digest,
                "details": _details(card),
                "capabilities": card.capabilities,
            }
            for card in newest_first
        ]
    }


def to_ps(loaded: list[Loaded]) -> dict[str, Any]:
    """Body of GET /api/ps, longest-lived first."""
    now = datetime.now(UTC)
    return {
        "models": [
            {
                "name": model.card.name,
                "model": model.card.name,
                "size": model.size_bytes,
                "digest": model.card.digest,
                "details": _details(model.card),
                "expires_at": timestamp(now + _lifetime(model.expires_in_s)),
                "size_vram": model.vram_bytes,
                "context_length": model.context_tokens,
            }
            for model in sorted(loaded, key=lambda model: model.expires_in_s, reverse=True)
        ]
    }


def to_show(card: ModelCard, *, verbose: bool = False) -> dict[str, Any]:
    """Body of POST /api/show; `verbose` adds the vocabulary. Raises CorruptFile reading that."""
    parameters = parameter_lines(card.compiled.generation, card.compiled.eos_token)
    reply: dict[str, Any] = {}
    if card.compiled.license:
        reply["license"] = card.compiled.license
    reply["modelfile"] = _modelfile(card, parameters)
    if parameters:
        reply["parameters"] = parameters
    if card.template:
        reply["template"] = card.template
    reply["details"] = _details(card)
    reply["model_info"] = _model_info(card, verbose)
    reply["capabilities"] = card.capabilities
    reply["modified_at"] = timestamp(card.installed_at)
    return reply


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with nine digits of a second, as Go writes it."""
    moment = moment.astimezone(UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond:06d}000Z"


def _lifetime(expires_in_s: float) -> timedelta:
    if not math.isfinite(expires_in_s) or expires_in_s > _FOREVER.total_seconds():
        return _FOREVER
    return timedelta(seconds=expires_in_s)


def _details(card: ModelCard) -> dict[str, Any]:
    compiled = card.compiled
    return {
        "parent_model": "",
        "format": compiled.source_format,
        "family": compiled.family,
        "families": [compiled.family],
        "parameter_size": human_count(compiled.parameters),
        "quantization_level": compiled.quantization,
        "context_length": compiled.context_length,
        "embedding_length": compiled.embedding_length or compiled.hidden_size,
    }


def human_count(count: int) -> str:
    """A number of weights as Ollama writes it: 134.52M, 7B, 1.2B."""
    for unit, size, digits in (("T", 10**12, 1), ("B", 10**9, 1), ("M", 10**6, 2)):
        if count >= size:
            return f"{count / size:.{0 if count % size == 0 else digits}f}{unit}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)


def _model_info(card: ModelCard, verbose: bool) -> dict[str, Any]:
    """The keys of a GGUF file's metadata, from which clients read sizes, for any source format."""
    compiled = card.compiled
    family = compiled.family
    info: dict[str, Any] = {
        "general.architecture": family,
        "general.basename": card.record.name,
        "general.parameter_count": compiled.parameters,
        f"{family}.attention.head_count": compiled.heads,
        f"{family}.attention.head_count_kv": compiled.kv_heads,
        f"{family}.attention.key_length": compiled.head_dim,
        f"{family}.attention.layer_norm_rms_epsilon": compiled.norm_epsilon,
        f"{family}.attention.value_length": compiled.head_dim,
        f"{family}.block_count": compiled.layers,
        f"{family}.context_length": compiled.context_length,
        f"{family}.embedding_length": compiled.hidden_size,
        f"{family}.feed_forward_length": compiled.feed_forward_length,
        f"{family}.rope.freq_base": compiled.rope_theta,
        f"{family}.vocab_size": compiled.vocab_size,
    }
    if compiled.bos_token_id is not None:
        info["tokenizer.ggml.bos_token_id"] = compiled.bos_token_id
    if compiled.eos_token_ids:
        info["tokenizer.ggml.eos_token_id"] = compiled.eos_token_ids[0]
    # long arrays are there, and empty, unless asked for
    tokens, merges = read_vocabulary(card) if verbose else ([], [])
    info["tokenizer.ggml.merges"] = merges
    info["tokenizer.ggml.tokens"] = tokens
    return info


def _modelfile(card: ModelCard, parameters: str) -> str:
    lines = [
        '# Modelfile generated by "ohmygpu"',
        "# To build a new Modelfile based on this, replace FROM with:",
        f"# FROM {card.name}",
        "",
        f"FROM {card.name}",
    ]
    if card.template:
        lines.append(f'TEMPLATE """{card.template}"""')
    for line in parameters.splitlines():
        name, _, value = line.partition(" ")
        lines.append(f"PARAMETER {name} {value.strip()}")
    if card.compiled.license:
        lines.append(f'LICENSE """{card.compiled.license}"""')
    return "\n".join(lines) + "\n"
