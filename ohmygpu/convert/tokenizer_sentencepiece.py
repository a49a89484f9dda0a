"""SentencePiece BPE vocabularies (Llama 2, Mistral, Gemma, …) as a `tokenizers` tokenizer.

SentencePiece joins the neighbouring pieces whose union has the best score; `tokenizers` joins by a
ranked list of pairs. Listing, for every piece, all ways to make it from two others, best score
first, gives the same joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, the same numbers in SentencePiece and in GGUF."""

SPACE = "▁"
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_MAX_MODEL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its position is its id."""

    text: str
    score: float
    kind: int


def build_sentencepiece(
    pieces: Sequence[Piece],
    *,
    add_space_prefix: bool,
    prefix_once: bool,
    merges: list[tuple[str, str]] | None = None,
    unknown_id: int | None = None,
    rewriting: Sequence[normalizers.Normalizer] = (),
    strip_right: Sequence[str] = (),
) -> Tokenizer:
    """A tokenizer that splits text as SentencePiece does with these pieces.

    `add_space_prefix` puts a space before the text; before its start only with `prefix_once`,
    otherwise also after each special token. `merges` are worked out from the scores when they are
    not given; `unknown_id` is found by its kind. `rewriting` is what happens to text first; tokens
    `strip_right` take the white space after them. Raises CorruptFile.
    """
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise CorruptFile("the tokenizer has the same token twice; pull the model again")
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    try:
        model = models.BPE(
            vocab=vocab,
            merges=_merges(pieces, vocab) if merges is None else merges,
            unk_token=unknown if unknown_id is None else pieces[unknown_id].text,
            fuse_unk=True,
            byte_fallback=any(piece.kind == BYTE for piece in pieces),
        )
    except Exception as error:  # the library raises plain Exception
        raise CorruptFile(
            f"the tokenizer's merges do not fit its tokens ({str(error)[:120]}); pull the model "
            "again"
        ) from error
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = list(rewriting)
    if prefix_once:
        if steps:
            tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE,
            prepend_scheme="first" if add_space_prefix else "never",
            split=False,
        )
    else:
        if add_space_prefix:
            steps.append(normalizers.Prepend(SPACE))
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    add_marked_tokens(tokenizer, pieces, strip_right=strip_right)
    return tokenizer


def add_marked_tokens(
    tokenizer: Tokenizer, pieces: Sequence[Piece], *, strip_right: Sequence[str] = ()
) -> None:
    """Make control tokens special and user-defined ones whole, whatever surrounds them.

    The tokens `strip_right` take the white space after them.
    """
    special, whole = [], []
    for number, piece in enumerate(pieces):
        if piece.text == f"[PAD{number}]":  # fills the vocabulary up; its text is ordinary text
            continue
        token = AddedToken(piece.text, normalized=False, rstrip=piece.text in strip_right)
        if piece.kind in (CONTROL, UNKNOWN):
            special.append(token)
        elif piece.kind == USER_DEFINED:
            whole.append(token)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(whole)


def charsmap_normalizer(charsmap: bytes) -> normalizers.Normalizer:
    """What a SentencePiece `precompiled_charsmap` does to text. Raises CorruptFile."""
    try:
        return normalizers.Precompiled(charsmap)
    except Exception as error:  # the library raises plain Exception
        raise CorruptFile(
            "the tokenizer's table of characters (precompiled_charsmap) is damaged; pull the model "
            "again"
        ) from error


def single_spaces() -> list[normalizers.Normalizer]:
    """Steps of `remove_extra_whitespaces`: join runs of spaces, take away those at the ends."""
    return [
        normalizers.Replace(Regex(r"\A +| +\z"), ""),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]


def read_sentencepiece(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` file with the settings of tokenizer_config.json.

    Raises CorruptFile or UnsupportedModel.
    """
    proto = _parse(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    prefix = settings.get("add_prefix_space")
    add_space_prefix = normalizer.add_dummy_prefix if prefix is None else prefix is True
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise UnsupportedModel(
            "tokenizer.model writes spaces in an unusual way; look for a repository of this model "
            "that has a tokenizer.json"
        )
    if trainer.model_type == _UNIGRAM:
        from .tokenizer_unigram import build_unigram

        return build_unigram(
            pieces,
            charsmap=normalizer.precompiled_charsmap,
            add_space_prefix=add_space_prefix,
            one_space=normalizer.remove_extra_whitespaces,
        )
    if trainer.model_type != _BPE:
        raise UnsupportedModel(
            "tokenizer.model is neither a BPE nor a unigram SentencePiece model; look for a "
            "repository of this model that has a tokenizer.json"
        )
    rewriting: list[normalizers.Normalizer] = []
    if normalizer.precompiled_charsmap:
        rewriting.append(charsmap_normalizer(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        rewriting += single_spaces()
    return build_sentencepiece(
        pieces,
        add_space_prefix=add_space_prefix,
        prefix_once=settings.get("legacy", True) is False,
        rewriting=rewriting,
    )


def _parse(path: Path) -> Any:
    # The message definition ships with transformers; reading a file needs no SentencePiece.
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from transformers.utils import sentencepiece_model_pb2_new as definition
    except ImportError as error:
        raise UnsupportedModel(
            "reading tokenizer.model needs the packages transformers and protobuf: "
            f"pip install transformers protobuf ({error})"
        ) from error
    proto = definition.ModelProto()
    try:
        if path.stat().st_size > _MAX_MODEL_BYTES:
            raise CorruptFile(f"tokenizer.model is larger than {_MAX_MODEL_BYTES} bytes")
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise CorruptFile("tokenizer.model is not a SentencePiece model; pull it again") from error
    if not proto.pieces:
        raise CorruptFile("tokenizer.model has no tokens; pull the model again")
    return proto


def _merges(pieces: Sequence[Piece], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All joins, best score first; of those to one piece, the one with the longest left part first.

    SentencePiece joins equal pairs from left to right, which a list cannot say; this order is that
    of transformers, so that runs of spaces become the tokens of the model's tokenizer.json.
    """
    found: list[tuple[float, int, int, int, int, int, str, str]] = []
    joinable = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    for number, piece in enumerate(pieces):
        if piece.kind != NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in joinable and right in joinable:
                lengths = (-len(left), -len(right))
                ids = (number, vocab[left], vocab[right])
                found.append((-piece.score, *lengths, *ids, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
