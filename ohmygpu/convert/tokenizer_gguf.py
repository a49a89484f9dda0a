"""Rebuilds the tokenizer that a GGUF file describes in its metadata.

`tokenizer.ggml.model` says the kind: gpt2 (byte-level BPE, cut as `tokenizer.ggml.pre` says, see
tokenizer_pre.py), llama (SentencePiece BPE), gemma4 (the same with merges), t5 (SentencePiece
unigram) and bert (WordPiece).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .gguf import GgufModel
from .tokenizer import TokenizerParts, check_id, sampling_defaults, set_bos_eos
from .tokenizer_bpe import build_byte_level
from .tokenizer_pre import BY_ARCHITECTURE, PRE_TOKENIZERS, PreTokenizer
from .tokenizer_sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Piece,
    add_marked_tokens,
    build_sentencepiece,
)
from .tokenizer_templates import gguf_templates
from .tokenizer_unigram import build_unigram
from .tokenizer_wordpiece import build_wordpiece, is_uncased, word_pieces

# Phi-3's special tokens take the white space after them, except these; the files do not say so.
_PHI3 = "phi3"
_PHI3_KEEPING = ("<unk>", "<s>", "<|endoftext|>")


def read_gguf_tokenizer(model: GgufModel, vocab_size: int) -> TokenizerParts:
    """The tokenizer, its templates and its ids. Raises CorruptFile or UnsupportedModel."""
    keys = _Keys(model)
    kind = keys.value("model", str)
    tokens = keys.strings("tokens")
    if len(tokens) > vocab_size:
        raise keys.corrupt("tokens", f"has {len(tokens)} entries for {vocab_size} embeddings")
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"{model.name} has a tokenizer of the kind {str(kind)[:40]!r}; known: "
            f"{', '.join(sorted(_KINDS))}"
        )
    found = _KINDS[kind](keys, tokens)
    bos = keys.token_id("bos", found.bos_token_id)
    eos = keys.token_id("eos", found.eos_token_id)
    first, last = found.first_token_id, found.last_token_id
    first, last = bos if first is None else first, eos if last is None else last
    keep_bos = keys.flag("add_bos_token", found.add_bos)
    keep_eos = keys.flag("add_eos_token", keys.flag("add_sep_token", found.add_eos))
    set_bos_eos(
        found.tokenizer,
        (tokens[first], first) if keep_bos and first is not None else None,
        (tokens[last], last) if keep_eos and last is not None else None,
    )
    ends = (keys.token_id("eot"), keys.token_id("eom"))
    template, tool_template = gguf_templates(model.metadata, model.name)
    return TokenizerParts(
        tokenizer=found.tokenizer,
        bos_token_id=bos,
        eos_token_id=eos,
        more_eos_token_ids=[number for number in ends if number is not None],
        template=template,
        tool_template=tool_template,
        generation=_sampling(model),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """A tokenizer, and what its kind takes for granted where the file does not say."""

    tokenizer: Tokenizer
    add_bos: bool = False
    add_eos: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    first_token_id: int | None = None  # goes before a text instead of BOS
    last_token_id: int | None = None  # goes after a text instead of EOS


class _Keys:
    """Typed access to `tokenizer.ggml.*` metadata."""

    def __init__(self, model: GgufModel) -> None:
        self._model = model
        tokens = model.metadata.get("tokenizer.ggml.tokens")
        self._size = len(tokens) if isinstance(tokens, list) else 0

    def corrupt(self, key: str, what: str) -> CorruptFile:
        return CorruptFile(f"{_full(key)} in {self._model.name} {what}; pull the model again")

    def value(self, key: str, kind: type) -> Any:
        value = self._model.metadata.get(_full(key))
        if value is not None and type(value) is not kind:
            raise self.corrupt(key, f"is not of the type {kind.__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, bool)
        return default if value is None else bool(value)

    def strings(self, key: str) -> list[str]:
        value = self._model.metadata.get(_full(key))
        if not isinstance(value, list) or not value:
            raise self.corrupt(key, "is not a list of strings")
        return value

    def numbers(self, key: str) -> Any:
        """An array with one number per token, or None."""
        value = self._model.metadata.get(_full(key))
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != self._size:
            raise self.corrupt(key, f"is not a list of {self._size} numbers, one per token")
        return value

    def token_id(self, kind: str, default: int | None = None) -> int | None:
        key = f"{kind}_token_id"
        value = self.value(key, int)
        if value is None:
            return default if default is not None and default < self._size else None
        return check_id(value, self._size, f"{_full(key)} in {self._model.name}")

    def pre_tokenizer(self) -> PreTokenizer:
        name = self.value("pre", str)
        if name in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[name]
        architecture = self._model.metadata.get("general.architecture")
        if name in (None, "default") and architecture in BY_ARCHITECTURE:
            return PRE_TOKENIZERS[BY_ARCHITECTURE[architecture]]
        if name is None or name == "default":
            raise UnsupportedModel(
                f"{self._model.name} does not say how its tokenizer cuts text "
                "(tokenizer.ggml.pre): it was made by an old converter; pull a newer conversion"
            )
        raise UnsupportedModel(
            f"{self._model.name} cuts text the {name[:40]!r} way (tokenizer.ggml.pre); "
            f"known: {', '.join(sorted(PRE_TOKENIZERS))}"
        )

    @property
    def architecture(self) -> str:
        return str(self._model.metadata.get("general.architecture"))

    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens to join."""
        pairs = []
        for merge in self.strings("merges"):
            left, space, right = merge.partition(" ")
            if not (left and space and right) or " " in right:
                raise self.corrupt("merges", f"holds {merge[:40]!r}, which is not a pair")
            pairs.append((left, right))
        return pairs

    def data(self, key: str) -> bytes:
        """An array of bytes, empty where there is none."""
        value = self._model.metadata.get(_full(key))
        if value is None:
            return b""
        if not isinstance(value, np.ndarray) or value.dtype.itemsize != 1:
            raise self.corrupt(key, "is not a list of bytes")
        return value.tobytes()


def _full(key: str) -> str:
    return key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"


def _pieces(keys: _Keys, tokens: list[str], *, scored: bool) -> list[Piece]:
    kinds = keys.numbers("token_type")
    scores = keys.numbers("scores") if scored else None
    if scored and scores is None:
        raise keys.corrupt("scores", "is missing")
    if scores is not None and not np.isfinite(scores).all():
        raise keys.corrupt("scores", "holds a score that is not a finite number")
    pieces = []
    for number, token in enumerate(tokens):
        kind = NORMAL if kinds is None else int(kinds[number])
        score = 0.0 if scores is None else float(scores[number])
        pieces.append(Piece(token or f"[EMPTY_{number}]", score, kind))
    return pieces


def _byte_level(keys: _Keys, tokens: list[str]) -> _Found:
    pieces = _pieces(keys, tokens, scored=False)
    pre = keys.pre_tokenizer()
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise keys.corrupt("tokens", "has the same token twice")
    if any(piece.kind == BYTE for piece in pieces):
        raise keys.corrupt("token_type", "marks byte tokens in a byte-level vocabulary")
    try:
        tokenizer = build_byte_level(vocab, keys.merges(), pre)
    except ValueError as error:
        raise keys.corrupt("merges", f"does not fit the tokens ({error})") from error
    add_marked_tokens(tokenizer, pieces)
    return _Found(tokenizer, add_bos=pre.add_bos, add_eos=pre.add_sep)


def _sentencepiece(keys: _Keys, tokens: list[str]) -> _Found:
    pieces = _pieces(keys, tokens, scored=True)
    strip_right: list[str] = []
    if keys.architecture == _PHI3:
        marked = [piece.text for piece in pieces if piece.kind in (CONTROL, USER_DEFINED)]
        strip_right = [text for text in marked if text not in _PHI3_KEEPING]
    tokenizer = build_sentencepiece(
        pieces,
        add_space_prefix=keys.flag("add_space_prefix", True),
        prefix_once=False,
        unknown_id=keys.token_id("unknown"),
        strip_right=strip_right,
    )
    return _Found(tokenizer, add_bos=True, bos_token_id=1, eos_token_id=2)


def _merged_sentencepiece(keys: _Keys, tokens: list[str]) -> _Found:
    tokenizer = build_sentencepiece(
        _pieces(keys, tokens, scored=False),
        add_space_prefix=keys.flag("add_space_prefix", False),
        prefix_once=False,
        merges=keys.merges(),
        unknown_id=keys.token_id("unknown"),
    )
    return _Found(tokenizer, add_bos=True)


def _unigram(keys: _Keys, tokens: list[str]) -> _Found:
    tokenizer = build_unigram(
        _pieces(keys, tokens, scored=True),
        unknown_id=keys.token_id("unknown"),
        charsmap=keys.data("precompiled_charsmap"),
        add_space_prefix=keys.flag("add_space_prefix", True),
        one_space=keys.flag("remove_extra_whitespaces", False),
    )
    return _Found(tokenizer, add_eos=True, eos_token_id=1)


def _wordpiece(keys: _Keys, tokens: list[str]) -> _Found:
    kinds = keys.numbers("token_type")
    control = [kinds is not None and kinds[number] == CONTROL for number in range(len(tokens))]
    words = word_pieces(tokens, control)
    vocab = {word: number for number, word in enumerate(words)}
    if len(vocab) != len(words):
        raise keys.corrupt("tokens", "has the same token twice")
    unknown = keys.token_id("unknown", vocab.get("[UNK]"))
    first = keys.token_id("cls", vocab.get("[CLS]"))
    last = keys.token_id("seperator", vocab.get("[SEP]"))  # so spelt in the format
    accents = keys.value("normalizer.strip_accents", bool)
    special = [word for word, is_control in zip(words, control, strict=True) if is_control]
    ends = [words[number] for number in (unknown, first, last) if number is not None]
    tokenizer = build_wordpiece(
        vocab,
        list(dict.fromkeys([*special, *ends])),
        unknown="[UNK]" if unknown is None else words[unknown],
        lowercase=keys.flag("normalizer.lowercase", is_uncased(words)),
        strip_accents=accents,
    )
    return _Found(tokenizer, add_bos=True, add_eos=True, first_token_id=first, last_token_id=last)


_KINDS: dict[str, Callable[[_Keys, list[str]], _Found]] = {
    "bert": _wordpiece,
    "gemma4": _merged_sentencepiece,
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "t5": _unigram,
}


def _sampling(model: GgufModel) -> dict[str, float]:
    """Sampling defaults that newer files carry (`general.sampling.*`)."""
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names["penalty_repeat"] = "repetition_penalty"
    found = {
        ours: model.metadata[f"general.sampling.{theirs}"]
        for theirs, ours in names.items()
        if f"general.sampling.{theirs}" in model.metadata
    }
    return sampling_defaults(found, f"general.sampling in {model.name}")
