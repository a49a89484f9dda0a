"""SentencePiece unigram vocabularies (T5, XLM-RoBERTa, …) as a `tokenizers` tokenizer.

Of all ways to cut a text into pieces, the one with the best sum of scores is taken; a character
that no piece covers costs 10 less than the worst piece (Kudo, arXiv:1808.06226, and SentencePiece's
unigram_model.cc, whose penalty `tokenizers` shares).
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

from ohmygpu.core.errors import CorruptFile

from .tokenizer_sentencepiece import (
    BYTE,
    NORMAL,
    SPACE,
    UNKNOWN,
    Piece,
    add_marked_tokens,
    charsmap_normalizer,
    single_spaces,
)

_NEVER = -1e9  # below the score of any text


def build_unigram(
    pieces: Sequence[Piece],
    *,
    unknown_id: int | None = None,
    charsmap: bytes = b"",
    add_space_prefix: bool = True,
    one_space: bool = True,
) -> Tokenizer:
    """A tokenizer that cuts text as SentencePiece's unigram model does with these pieces.

    `charsmap` rewrites characters first; `one_space` joins runs of spaces and strips the ends.
    Raises CorruptFile.
    """
    if unknown_id is None:
        kinds = [piece.kind for piece in pieces]
        unknown_id = kinds.index(UNKNOWN) if UNKNOWN in kinds else None
    has_bytes = any(piece.kind == BYTE for piece in pieces)
    worst = min((piece.score for piece in pieces if piece.kind == NORMAL), default=None)
    if worst is None:
        raise CorruptFile("the tokenizer has no ordinary token; pull the model again")
    vocab = [(piece.text, _score(piece, worst)) for piece in pieces]
    if len({text for text, _ in vocab}) != len(vocab):
        raise CorruptFile("the tokenizer has the same token twice; pull the model again")
    tokenizer = Tokenizer(models.Unigram(vocab, unknown_id, has_bytes))
    steps: list[normalizers.Normalizer] = [charsmap_normalizer(charsmap)] if charsmap else []
    steps += single_spaces() if one_space else []
    steps += [normalizers.Prepend(SPACE)] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    decoding += [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(decoding)
    add_marked_tokens(tokenizer, pieces)
    return tokenizer


def _score(piece: Piece, worst: float) -> float:
    """The score a piece is chosen by; those that are no text are found by name instead."""
    if piece.kind == NORMAL:
        return piece.score
    return _NEVER if piece.kind == BYTE else worst
