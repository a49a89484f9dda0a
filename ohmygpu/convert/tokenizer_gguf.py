"""Rebuilds the tokenizer that a GGUF file describes in its metadata.

Byte-level BPE (`tokenizer.ggml.model` = gpt2) depends on how text is cut before the merges, which
the file only names (`tokenizer.ggml.pre`). `_PRE_TOKENIZERS` gives, for the names we know, the
steps of the original tokenizer.json; any other name is refused, because a guess would give a model
that answers, but worse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .gguf import GgufModel
from .tokenizer import TokenizerParts, check_id, sampling_defaults, set_bos_eos
from .tokenizer_sentencepiece import (
    BYTE,
    NORMAL,
    Piece,
    add_marked_tokens,
    build_sentencepiece,
)

Steps = Callable[[], list[pre_tokenizers.PreTokenizer]]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
)
# Words from upper to lower case, as in tekken and o200k
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_CASED}|{_CAPITALS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT4O = (
    rf"{_CASED}{_CONTRACTIONS}?|{_CAPITALS}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK_HAN = "[一-龥ࠀ-一가-퟿]+"


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    steps: Steps
    whole_words: bool = False  # a word that is a token is taken as it stands, merges or not
    add_bos: bool = False  # where the file does not say
    unicode_nfc: bool = False


def _split(*patterns: str, digits: bool = False) -> Steps:
    def steps() -> list[pre_tokenizers.PreTokenizer]:
        cuts: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns
        ]
        if digits:
            cuts.append(pre_tokenizers.Digits(individual_digits=True))
        return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    return steps


def _gpt2(*, digits: bool = False) -> Steps:
    def steps() -> list[pre_tokenizers.PreTokenizer]:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return [pre_tokenizers.Digits(individual_digits=True), words] if digits else [words]

    return steps


_PRE_TOKENIZERS: dict[str, _PreTokenizer] = {}
_PRE_TOKENIZERS |= dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), _PreTokenizer(_gpt2()))
_PRE_TOKENIZERS |= dict.fromkeys(
    ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"),
    _PreTokenizer(_gpt2(digits=True)),
)
_PRE_TOKENIZERS |= dict.fromkeys(
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0"),
    _PreTokenizer(_split(_LLAMA3), whole_words=True, add_bos=True),
)
_PRE_TOKENIZERS |= dict.fromkeys(("smaug-bpe", "dbrx"), _PreTokenizer(_split(_LLAMA3)))
_PRE_TOKENIZERS |= dict.fromkeys(
    ("qwen2", "deepseek-r1-qwen"), _PreTokenizer(_split(_QWEN2), unicode_nfc=True)
)
_PRE_TOKENIZERS |= dict.fromkeys(("gpt-4o", "llama4"), _PreTokenizer(_split(_GPT4O)))
_PRE_TOKENIZERS["tekken"] = _PreTokenizer(_split(_TEKKEN), whole_words=True, add_bos=True)
_PRE_TOKENIZERS["seed-coder"] = _PreTokenizer(_split(_SEED_CODER))
_PRE_TOKENIZERS["deepseek-coder"] = _PreTokenizer(
    _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, digits=True)
)


def read_gguf_tokenizer(model: GgufModel, vocab_size: int) -> TokenizerParts:
    """The tokenizer, its template and its ids. Raises CorruptFile or UnsupportedModel."""
    keys = _Keys(model)
    kind = keys.value("model", str)
    tokens = keys.strings("tokens")
    if len(tokens) > vocab_size:
        raise keys.corrupt("tokens", f"has {len(tokens)} entries for {vocab_size} embeddings")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(keys, _pieces(keys, tokens, scored=False))
        bos, eos = keys.token_id("bos"), keys.token_id("eos")
    elif kind == "llama":
        tokenizer = build_sentencepiece(
            _pieces(keys, tokens, scored=True),
            add_space_prefix=keys.flag("add_space_prefix", True),
            prefix_once=False,
        )
        add_bos = True
        bos, eos = keys.token_id("bos", 1), keys.token_id("eos", 2)
    else:
        raise UnsupportedModel(
            f"{model.name} has a tokenizer of the kind {str(kind)[:40]!r}; gpt2 (byte-level BPE) "
            "and llama (SentencePiece BPE) are known"
        )
    keep_bos, keep_eos = keys.flag("add_bos_token", add_bos), keys.flag("add_eos_token", False)
    set_bos_eos(
        tokenizer,
        (tokens[bos], bos) if keep_bos and bos is not None else None,
        (tokens[eos], eos) if keep_eos and eos is not None else None,
    )
    ends = (keys.token_id("eot"), keys.token_id("eom"))
    return TokenizerParts(
        tokenizer=tokenizer,
        bos_token_id=bos,
        eos_token_id=eos,
        more_eos_token_ids=[number for number in ends if number is not None],
        template=keys.value("tokenizer.chat_template", str) or None,
        generation=_sampling(model),
    )


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

    def pre_tokenizer(self) -> _PreTokenizer:
        name = self.value("pre", str)
        if name in _PRE_TOKENIZERS:
            return _PRE_TOKENIZERS[name]
        if name is None or name == "default":
            raise UnsupportedModel(
                f"{self._model.name} does not say how its tokenizer cuts text "
                "(tokenizer.ggml.pre): it was made by an old converter; pull a newer conversion"
            )
        raise UnsupportedModel(
            f"{self._model.name} cuts text the {name[:40]!r} way (tokenizer.ggml.pre); "
            f"known: {', '.join(sorted(_PRE_TOKENIZERS))}"
        )


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


def _byte_level(keys: _Keys, pieces: list[Piece]) -> tuple[Tokenizer, bool]:
    """The tokenizer and whether it adds BOS by default."""
    pre = keys.pre_tokenizer()
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise keys.corrupt("tokens", "has the same token twice")
    merges: list[tuple[str, str]] = []
    for merge in keys.strings("merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise keys.corrupt("merges", f"holds {merge[:40]!r}, which is not a pair")
        merges.append((left, right))
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words)
    except Exception as error:  # the library raises plain Exception
        raise keys.corrupt("merges", f"does not fit the tokens ({str(error)[:120]})") from error
    tokenizer = Tokenizer(model)
    if pre.unicode_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre.steps())
    tokenizer.decoder = decoders.ByteLevel()
    if any(piece.kind == BYTE for piece in pieces):
        raise keys.corrupt("token_type", "marks byte tokens in a byte-level vocabulary")
    add_marked_tokens(tokenizer, pieces)
    return tokenizer, pre.add_bos


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
