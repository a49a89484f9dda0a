"""WordPiece vocabularies (BERT and its kin) as a `tokenizers` tokenizer.

A word is cut into its longest pieces from the left; pieces inside a word begin with `##`. GGUF
files write the same vocabulary the other way round: `▁` marks the beginning of a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ohmygpu.core.errors import CorruptFile

_INSIDE = "##"
_WORD = "▁"
_BRACKETED = re.compile(r"\[[^\[\]\s]+\]")
_SPECIAL = ("unk", "sep", "pad", "cls", "mask")


def build_wordpiece(
    vocab: Mapping[str, int],
    special: Sequence[str],
    *,
    unknown: str,
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese: bool = True,
) -> Tokenizer:
    """A tokenizer that cuts text as BERT does; `strip_accents` None means as `lowercase` says.

    `special` are the tokens that are whole wherever they stand; `chinese` makes each Chinese
    character a word. Raises CorruptFile when `unknown` is not in the vocabulary.
    """
    if unknown not in vocab:
        raise CorruptFile(
            f"the tokenizer has no token {unknown[:40]!r} for unknown words; pull the model again"
        )
    tokenizer = Tokenizer(models.WordPiece(vocab=dict(vocab), unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_INSIDE)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in special if token in vocab]
    )
    return tokenizer


def read_vocab_txt(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a `vocab.txt`, one token a line, with tokenizer_config.json's settings.

    Raises CorruptFile.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile("vocab.txt cannot be read; pull the model again") from error
    while lines and not lines[-1].strip():
        lines.pop()
    vocab = {line.rstrip("\r"): number for number, line in enumerate(lines)}
    names = {kind: _name(settings, kind) for kind in _SPECIAL}
    accents = settings.get("strip_accents")
    return build_wordpiece(
        vocab,
        list(names.values()),
        unknown=names["unk"],
        lowercase=settings.get("do_lower_case", True) is True,
        strip_accents=accents if isinstance(accents, bool) else None,
        chinese=settings.get("tokenize_chinese_chars", True) is True,
    )


def word_pieces(tokens: Sequence[str], control: Sequence[bool]) -> list[str]:
    """The vocabulary as BERT writes it, from `tokens` as GGUF writes it.

    `control` says which tokens are special and stand as they are; so do bracketed names such as
    [unused7], which older files do not mark.
    """
    pieces = []
    for token, is_control in zip(tokens, control, strict=True):
        if is_control or _BRACKETED.fullmatch(token):
            pieces.append(token)
        elif token.startswith(_WORD):
            pieces.append(token[len(_WORD) :])
        else:
            pieces.append(_INSIDE + token)
    return pieces


def is_uncased(pieces: Sequence[str]) -> bool:
    """Whether no piece has a capital: such a vocabulary was made from text in lower case."""
    return all(piece == piece.lower() for piece in pieces if not _BRACKETED.fullmatch(piece))


def _name(settings: dict[str, Any], kind: str) -> str:
    token = settings.get(f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else f"[{kind.upper()}]"
