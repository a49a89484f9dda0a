"""Prepares what serving needs beside the graph: `tokenizer.json`, the chat template, the ids.

Whatever the source has (tokenizer.json, a SentencePiece model, GGUF metadata), the result is the
format of the `tokenizers` library, so that serving needs that library and Jinja alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from ohmygpu.core.errors import CorruptFile
from ohmygpu.core.records import TEMPLATE_FILE, TOKENIZER_FILE, TOOL_TEMPLATE_FILE

from .source import Source

MAX_TEMPLATE_CHARACTERS = 1 << 20

# Tokens that end a turn whenever the model's chat template writes them.
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
    "<end_of_utterance>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<turn|>",
    "[|endofturn|]",
    "<|EOT|>",
    "</s>",
)
# Tokens that end a document or a message in every model that has them.
_DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", _DEEPSEEK_END)
# Where a reply has several messages, these end it, and <|end|> only one of its messages.
_MESSAGE_END = "<|end|>"
_REPLY_ENDS = (("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>"))

# Sampling parameters and the ranges requests accept them in.
_SAMPLING = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What `compile.json` says about the tokenizer.

    `generation` holds the model's own sampling defaults under SamplingParams' names.
    """

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    bos_token: str
    eos_token: str
    has_template: bool
    generation: dict[str, float]


@dataclass(slots=True)
class TokenizerParts:
    """A tokenizer as read from one kind of source, before anything is written."""

    tokenizer: Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None  # the one `eos_token` in a chat template stands for
    more_eos_token_ids: list[int] = field(default_factory=list)
    template: str | None = None
    tool_template: str | None = None  # for conversations with tools, where it is another one
    generation: dict[str, float] = field(default_factory=dict)


def prepare_tokenizer(source: Source, folder: Path) -> TokenizerFacts:
    """Write tokenizer.json, and the chat templates where there are some, into `folder`.

    Raises CorruptFile when they are damaged, UnsupportedModel when they are of an unknown kind.
    """
    if source.format == "gguf":
        from .adapter import without_adapter
        from .gguf_source import GgufSource
        from .tokenizer_gguf import read_gguf_tokenizer

        source = without_adapter(source)
        if not isinstance(source, GgufSource):
            raise TypeError(f"{type(source).__name__} is not a GGUF source")
        parts = read_gguf_tokenizer(source.model, int(source.config["vocab_size"]))
    else:
        from .tokenizer_files import read_tokenizer_files

        parts = read_tokenizer_files(source.files, source.config)
    return _write(parts, folder)


def sampling_defaults(found: dict[str, Any], origin: str) -> dict[str, float]:
    """The sampling parameters among `found`, checked. Raises CorruptFile naming `origin`."""
    values: dict[str, float] = {}
    for name, (low, high) in _SAMPLING.items():
        value = found.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CorruptFile(f"{origin} has {name} = {str(value)[:40]!r}, which is not a number")
        if name == "top_k" and value < 0:  # -1 is another way to say off
            value = 0
        if not low <= value <= high:  # also refuses NaN
            raise CorruptFile(f"{origin} has {name} = {value:g}, not between {low:g} and {high:g}")
        values[name] = int(value) if name == "top_k" else float(value)
    return values


def set_bos_eos(
    tokenizer: Tokenizer, bos: tuple[str, int] | None, eos: tuple[str, int] | None
) -> None:
    """Make plain text be encoded as BOS + text + EOS, each where given as (token, id)."""
    single = [f"{bos[0]}:0"] if bos else []
    single.append("$A:0")
    single += [f"{eos[0]}:0"] if eos else []
    pair = [*single, *([f"{bos[0]}:1"] if bos else []), "$B:1", *([f"{eos[0]}:1"] if eos else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[token for token in (bos, eos) if token]
    )


def check_id(value: Any, vocab_size: int, what: str) -> int:
    """A token id of the model. Raises CorruptFile naming `what`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise CorruptFile(
            f"{what} is {str(value)[:40]}, which is not one of the {vocab_size} tokens of the "
            "model; pull the model again"
        )
    return value


def _write(parts: TokenizerParts, folder: Path) -> TokenizerFacts:
    tokenizer, template = parts.tokenizer, parts.template
    # Cutting and padding are the caller's business; a file that asks for them must not shorten
    # prompts silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8")
    for name, text in ((TEMPLATE_FILE, template), (TOOL_TEMPLATE_FILE, parts.tool_template)):
        if text is None:
            continue
        if len(text) > MAX_TEMPLATE_CHARACTERS:
            raise CorruptFile(f"the chat template has {len(text)} characters; pull the model again")
        (folder / name).write_bytes(text.encode("utf-8"))
    return TokenizerFacts(
        bos_token_id=parts.bos_token_id,
        eos_token_ids=_all_ends(parts),
        bos_token=_token(tokenizer, parts.bos_token_id),
        eos_token=_token(tokenizer, parts.eos_token_id),
        has_template=template is not None,
        generation=parts.generation,
    )


def _all_ends(parts: TokenizerParts) -> tuple[int, ...]:
    """Ids that end generation: the declared ones, and those the template ends turns with."""
    own = [] if parts.eos_token_id is None else [parts.eos_token_id]
    written = [token for token in _TURN_ENDS if token in (parts.template or "")]
    added = {token.content: number for number, token in _added_tokens(parts.tokenizer)}
    replies = [token for pair in _REPLY_ENDS for token in pair if added.keys() >= set(pair)]
    if replies:
        written = [token for token in written if token != _MESSAGE_END]
    known = [added[token] for token in (*written, *replies, *_DOCUMENT_ENDS) if token in added]
    return tuple(dict.fromkeys([*own, *parts.more_eos_token_ids, *known]))


def _added_tokens(tokenizer: Tokenizer) -> Iterable[tuple[int, Any]]:
    return tokenizer.get_added_tokens_decoder().items()


def _token(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.id_to_token(token_id) or ""
