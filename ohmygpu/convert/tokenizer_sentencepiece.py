"""SentencePiece BPE vocabularies (Llama 1 and 2, Mistral, …) as a `tokenizers` tokenizer.

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
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces, the same numbers in SentencePiece and in GGUF."""

_SPACE = "▁"
_BPE = 2  # TrainerSpec.model_type
_MAX_MODEL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its position is its id."""

    text: str
    score: float
    kind: int


def build_sentencepiece(
    pieces: Sequence[Piece], *, add_space_prefix: bool, prefix_once: bool
) -> Tokenizer:
    """A tokenizer that splits text as SentencePiece does with these pieces.

    `add_space_prefix` puts a space before the text; before its start only with `prefix_once`,
    otherwise also after each special token. Raises CorruptFile.
    """
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise CorruptFile("the tokenizer has the same token twice; pull the model again")
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    model = models.BPE(
        vocab=vocab,
        merges=_merges(pieces, vocab),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=any(piece.kind == BYTE for piece in pieces),
    )
    tokenizer = Tokenizer(model)
    if prefix_once:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE,
            prepend_scheme="first" if add_space_prefix else "never",
            split=False,
        )
    else:
        steps: list[normalizers.Normalizer] = []
        if add_space_prefix:
            steps.append(normalizers.Prepend(_SPACE))
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    add_marked_tokens(tokenizer, pieces)
    return tokenizer


def add_marked_tokens(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> None:
    """Make control tokens special and user-defined ones whole, whatever surrounds them."""
    special = [piece.text for piece in pieces if piece.kind in (CONTROL, UNKNOWN)]
    whole = [piece.text for piece in pieces if piece.kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])


def read_sentencepiece(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` file with the settings of tokenizer_config.json.

    Raises CorruptFile or UnsupportedModel.
    """
    proto = _parse(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != _BPE:
        raise UnsupportedModel(
            "tokenizer.model is not a BPE SentencePiece model; look for a repository of this model "
            "that has a tokenizer.json"
        )
    pieces = [Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    prefix = settings.get("add_prefix_space")
    tokenizer = build_sentencepiece(
        pieces,
        add_space_prefix=normalizer.add_dummy_prefix if prefix is None else prefix is True,
        prefix_once=settings.get("legacy", True) is False,
    )
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UnsupportedModel(
            "tokenizer.model rewrites text before it splits it; look for a repository of this "
            "model that has a tokenizer.json"
        )
    return tokenizer


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
    found: list[tuple[float, int, int, str, str]] = []
    joinable = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    for piece in pieces:
        if piece.kind != NORMAL:
            continue
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in joinable and right in joinable:
                found.append((-piece.score, vocab[left], vocab[right], left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]
