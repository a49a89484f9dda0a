"""EmbedRequest → token ids of each input, and vectors → what the request asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import ContextLengthExceeded, InvalidRequest
from ohmygpu.runtime_api import EmbedRequest

_HUGE_CHARACTERS = 100_000  # from here on a text is cut before it is tokenised
_CUT_TOKENS = 64  # the tokens next to a cut may differ from the whole text's


class TextEncoder(Protocol):
    """The part of Tokenizer that embedding needs."""

    vocab_size: int

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids; `add_special` puts the model's own tokens around them."""
        ...


@dataclass(frozen=True, slots=True)
class Framing:
    """The tokens a model wants around a text: [CLS] … [SEP], or an end token alone."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.before) + len(self.after)


def framing(encoder: TextEncoder) -> Framing:
    """Found by looking at what is put around a short text."""
    plain, framed = encoder.encode("a", add_special=False), encoder.encode("a")
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return Framing(tuple(framed[:start]), tuple(framed[start + len(plain) :]))
    return Framing((), ())


def prepare_inputs(
    request: EmbedRequest,
    encoder: TextEncoder,
    around: Framing,
    context_tokens: int,
    lower_case: bool = False,
) -> list[list[int]]:
    """Token ids of each input, none longer than the context.

    Raises ContextLengthExceeded where `truncate` does not allow to cut, InvalidRequest naming the
    input for one without tokens or with tokens the model does not have.
    """
    limit = min(context_tokens, request.context_limit or context_tokens)
    if request.truncate and limit <= around.count:
        raise InvalidRequest(
            "input after truncation exceeds maximum context length: a context of "
            f"{limit} tokens has no room for text",
            param="input",
        )
    rows = []
    for index, entry in enumerate(request.inputs):
        if isinstance(entry, str):
            text = entry.lower() if lower_case else entry
            row = _encode(text, encoder, around, limit, truncate=request.truncate)
        else:
            row = _checked(entry, index, encoder.vocab_size)
            row = row[:limit] if request.truncate else row
        if not row:
            raise InvalidRequest(
                f"input[{index}] is empty; send at least one character", param="input"
            )
        if len(row) > limit:
            raise _too_long(len(row), limit, index)
        rows.append(row)
    return rows


def finish(vectors: NDArray[np.float32], request: EmbedRequest) -> NDArray[np.float32]:
    """(B, E) vectors with the `dimensions` and the length the request asks for."""
    if request.dimensions is not None:
        vectors = vectors[:, : request.dimensions]
    if request.normalize or request.dimensions is not None:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, np.float32(1e-12))
    return np.ascontiguousarray(vectors, dtype="<f4")


def check_dimensions(request: EmbedRequest, length: int) -> None:
    """Raise InvalidRequest unless a vector of `length` numbers has that many dimensions."""
    if request.dimensions is not None and not 1 <= request.dimensions <= length:
        raise InvalidRequest(
            f"dimensions must be between 1 and {length}, not {request.dimensions}: the model's "
            f"vectors have {length} numbers",
            param="dimensions",
        )


def _encode(
    text: str, encoder: TextEncoder, around: Framing, limit: int, *, truncate: bool
) -> list[int]:
    if truncate:
        row = _beginning(text, encoder, limit - around.count)
        if row is None:
            row = encoder.encode(text)
            return row if len(row) <= limit else _cut(row, around, limit)
        return [*around.before, *row, *around.after]
    row_of_part = _beginning(text, encoder, limit - around.count + _CUT_TOKENS)
    if row_of_part is not None:
        raise _too_long(limit + _CUT_TOKENS, limit, None)
    return encoder.encode(text)


def _beginning(text: str, encoder: TextEncoder, room: int) -> list[int] | None:
    """The first `room` tokens of a huge text, found without tokenising all of it.

    None when the text is not huge, or no part of it has that many tokens.
    """
    if len(text) <= _HUGE_CHARACTERS:
        return None
    characters = min(max(8 * room, 1024), _HUGE_CHARACTERS)
    while characters < len(text):
        try:
            part = encoder.encode(text[:characters], add_special=False)
        except ContextLengthExceeded:  # how the encoder refuses what is certainly too long
            characters = characters * 3 // 4
            continue
        if len(part) > room + _CUT_TOKENS:
            return part[:room]
        characters *= 2
    return None


def _cut(row: Sequence[int], around: Framing, limit: int) -> list[int]:
    """A framed text without its last tokens."""
    end = len(row) - len(around.after)
    kept = row[: min(end, limit - len(around.after))]
    return [*kept, *around.after]


def _checked(token_ids: Sequence[int], index: int, vocab_size: int) -> list[int]:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"input[{index}] holds token {token_id}; this model has the tokens 0 to "
                f"{vocab_size - 1}",
                param="input",
            )
    return list(token_ids)


def _too_long(count: int, limit: int, index: int | None) -> ContextLengthExceeded:
    which = "the input" if index is None else f"input[{index}]"
    at_least = "more than " if index is None else ""
    return ContextLengthExceeded(
        f"the input length exceeds the context length: {which} has {at_least}{count} tokens and "
        f"the model takes {limit}; shorten it",
        prompt_tokens=count,
        context_tokens=limit,
        param="input",
    )
