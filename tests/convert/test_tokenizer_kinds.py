"""Kinds of tokenizers beside byte-level BPE from GGUF: each equal to one made independently."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ohmygpu.convert.gguf import GgufModel
from ohmygpu.convert.tokenizer_bpe import read_tekken
from ohmygpu.convert.tokenizer_files import read_tokenizer_files
from ohmygpu.convert.tokenizer_gguf import read_gguf_tokenizer
from ohmygpu.convert.tokenizer_pre import PRE_TOKENIZERS
from ohmygpu.convert.tokenizer_sentencepiece import Piece, build_sentencepiece
from ohmygpu.convert.tokenizer_unigram import build_unigram
from ohmygpu.convert.tokenizer_wordpiece import is_uncased, word_pieces
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from tests.convert.gguf_files import llama_metadata, llama_tensors, write_gguf
from tests.convert.hard_text import HARD_TEXTS
from tests.convert.test_tokenizer import (
    CORPUS,
    ORIGINALS,
    TEKKEN,
    Workshop,
    bpe_metadata,
    ids,
    sentencepiece_file,
    train,
    workshop,
)

__all__ = ["workshop"]  # the fixture

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def same(one: Tokenizer, other: Tokenizer, *, special: bool = False) -> bool:
    return all(ids(one, text, special) == ids(other, text, special) for text in HARD_TEXTS)


# --- WordPiece ---


def bert(lowercase: bool = True) -> Tokenizer:
    """A tokenizer as BERT's authors made theirs."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=BERT_SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def pieces_of(tokenizer: Tokenizer) -> list[str]:
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_vocab_txt_is_read_as_bert_reads_it(workshop: Workshop, lowercase: bool) -> None:
    original = bert(lowercase)
    files = workshop.files(
        vocab__txt="\n".join(pieces_of(original)) + "\n",
        tokenizer_config__json={"do_lower_case": lowercase},
    )
    parts = read_tokenizer_files(files, {"model_type": "bert", "vocab_size": 500})
    assert same(parts.tokenizer, original, special=True)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_gguf_wordpiece_vocabulary_is_turned_back(workshop: Workshop, lowercase: bool) -> None:
    original = bert(lowercase)
    pieces = pieces_of(original)
    tokens = [
        piece if piece in BERT_SPECIAL else piece[2:] if piece.startswith("##") else "▁" + piece
        for piece in pieces
    ]
    tokenizer, _ = workshop.gguf(
        **{
            "tokenizer.ggml.model": "bert",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3 if piece in BERT_SPECIAL else 1 for piece in pieces],
            "tokenizer.ggml.scores": None,
            "tokenizer.ggml.unknown_token_id": 1,
            "tokenizer.ggml.cls_token_id": 2,
            "tokenizer.ggml.seperator_token_id": 3,
            "tokenizer.ggml.bos_token_id": None,
            "tokenizer.ggml.eos_token_id": None,
            "tokenizer.ggml.add_bos_token": None,
        }
    )
    assert same(tokenizer, original, special=True)


def test_brackets_are_whole_and_capitals_tell_that_case_matters() -> None:
    assert word_pieces(["[CLS]", "[unused1]", "▁a", "b"], [True, False, False, False]) == [
        "[CLS]",
        "[unused1]",
        "a",
        "##b",
    ]
    assert is_uncased(["[CLS]", "a", "##ß"])
    assert not is_uncased(["[CLS]", "a", "##B"])


def test_a_vocabulary_without_a_token_for_unknown_words_is_refused(workshop: Workshop) -> None:
    with pytest.raises(CorruptFile, match=r"\[UNK\]"):
        read_tokenizer_files(workshop.files(vocab__txt="a\nb\n"), {"vocab_size": 2})


# --- SentencePiece unigram ---


def unigram(one_space: bool) -> tuple[Tokenizer, list[Piece]]:
    """A tokenizer trained by the library, and its pieces as SentencePiece writes them."""
    tokenizer = Tokenizer(models.Unigram())
    spaces = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" +"), " ")]
    tokenizer.normalizer = normalizers.Sequence(
        [*(spaces if one_space else []), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.decoder = decoders.Metaspace()
    trained = json.loads(tokenizer.to_str())["model"]["vocab"]
    # scores are stored as float32: here they differ by more than that rounds away
    vocab = [(text, -1 - number / 64) for number, (text, _) in enumerate(trained)]
    tokenizer.model = models.Unigram(vocab, 2)
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    return tokenizer, [Piece(text, score, kinds.get(text, 1)) for text, score in vocab]


@pytest.mark.parametrize("one_space", [True, False])
def test_a_gguf_unigram_vocabulary_is_rebuilt(workshop: Workshop, one_space: bool) -> None:
    original, pieces = unigram(one_space)
    tokenizer, _ = workshop.gguf(
        **{
            "tokenizer.ggml.model": "t5",
            "tokenizer.ggml.tokens": [piece.text for piece in pieces],
            "tokenizer.ggml.token_type": [piece.kind for piece in pieces],
            "tokenizer.ggml.scores": [piece.score for piece in pieces],
            "tokenizer.ggml.remove_extra_whitespaces": one_space,
            "tokenizer.ggml.unknown_token_id": 2,
            "tokenizer.ggml.bos_token_id": None,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.add_bos_token": None,
        }
    )
    assert same(tokenizer, original)
    assert ids(tokenizer, "fox", True)[-1] == 1
    assert tokenizer.decode(ids(tokenizer, "the quick fox")) == "the quick fox"


def test_a_unigram_tokenizer_model_is_read(workshop: Workshop) -> None:
    original, pieces = unigram(one_space=False)
    path = sentencepiece_file(workshop.folder / "tokenizer.model", pieces, model_type=1)
    parts = read_tokenizer_files(
        {"tokenizer.model": path}, {"model_type": "t5", "vocab_size": len(pieces)}
    )
    assert same(parts.tokenizer, original)


def test_bytes_stand_for_what_no_unigram_piece_covers() -> None:
    pieces = [Piece("<unk>", 0.0, 2), *(Piece(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    pieces += [Piece("▁", -2.0, 1), Piece("a", -1.0, 1)]
    tokenizer = build_unigram(pieces)
    assert tokenizer.encode("aé").tokens == ["▁", "a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids(tokenizer, "aé a")) == "aé a"


def test_a_damaged_table_of_characters_is_refused() -> None:
    with pytest.raises(CorruptFile, match="precompiled_charsmap"):
        build_unigram([Piece("a", 0.0, 1)], charsmap=b"\xff" * 20)


# --- SentencePiece BPE ---


def test_joins_of_equal_score_make_the_longest_left_part_first() -> None:
    pieces = [Piece("▁", -9.0, 1), Piece("▁▁", -1.0, 1), Piece("▁▁▁▁", -2.0, 1)]
    pieces += [Piece("▁▁▁", -2.0, 1), Piece("x", -9.0, 1)]
    tokenizer = build_sentencepiece(pieces, add_space_prefix=False, prefix_once=False)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert merges == [
        ["▁", "▁"],
        ["▁▁▁", "▁"],
        ["▁▁", "▁▁"],
        ["▁▁", "▁"],
        ["▁", "▁▁▁"],
        ["▁", "▁▁"],
    ]


def test_rows_that_fill_a_vocabulary_up_are_ordinary_text() -> None:
    texts = ["<unk>", *"[PAD67]", "[PAD8]", "[PAD1]"]
    kinds = [2, *[1] * 7, 4, 4]
    pieces = [Piece(text, 0.0, kind) for text, kind in zip(texts, kinds, strict=True)]
    tokenizer = build_sentencepiece(pieces, add_space_prefix=False, prefix_once=False)
    assert tokenizer.encode("[PAD1]").tokens == ["[PAD1]"]
    assert "[PAD8]" not in tokenizer.encode("[PAD8]").tokens


@pytest.mark.parametrize(("architecture", "strips"), [("phi3", True), ("llama", False)])
def test_phi_3_markers_take_the_space_after_them(
    workshop: Workshop, architecture: str, strips: bool
) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["a", "▁", "<|end|>", "<|endoftext|>"]
    metadata = llama_metadata(
        **{
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 3, 3],
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.add_space_prefix": False,
        }
    )
    tensors = llama_tensors(np.random.default_rng(0), embedding="F32")
    path = write_gguf(workshop.folder / "phi.gguf", metadata, tensors)
    model = GgufModel({"phi.gguf": path})
    model.metadata["general.architecture"] = architecture
    tokenizer = read_gguf_tokenizer(model, len(tokens)).tokenizer
    model.close()
    a, space, end, document_end = range(259, 263)
    assert ids(tokenizer, "a<|end|> a") == ([a, end, a] if strips else [a, end, space, a])
    assert ids(tokenizer, "<|endoftext|> a") == [document_end, space, a]


# --- byte-level BPE of repositories ---


@pytest.mark.parametrize(
    ("model_type", "pre"),
    [("gpt2", "gpt-2"), ("phi", "gpt-2"), ("starcoder2", "smollm"), ("qwen2", "qwen2")],
)
def test_vocab_json_and_merges_txt_are_cut_as_their_model_cuts(
    workshop: Workshop, model_type: str, pre: str
) -> None:
    original = train(ORIGINALS[pre])
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    model = json.loads(original.to_str())["model"]
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    files = workshop.files(vocab__json=model["vocab"], merges__txt=merges)
    parts = read_tokenizer_files(
        files, {"model_type": model_type, "vocab_size": 700, "eos_token_id": 0}
    )
    assert same(parts.tokenizer, original)
    assert ids(parts.tokenizer, "a<|endoftext|>").count(0) == 1  # named by the config alone


def test_vocab_json_of_an_unknown_model_is_refused(workshop: Workshop) -> None:
    files = workshop.files(vocab__json={"a": 0}, merges__txt="")
    with pytest.raises(UnsupportedModel, match=r"'new_model'.*tokenizer\.json"):
        read_tokenizer_files(files, {"model_type": "new_model", "vocab_size": 1})


@pytest.mark.parametrize("merges", ["a\n", "a b c\n", "a zz\n"])
def test_merges_txt_that_does_not_fit_is_refused(workshop: Workshop, merges: str) -> None:
    files = workshop.files(vocab__json={"a": 0, "b": 1}, merges__txt=merges)
    with pytest.raises(CorruptFile, match=r"merges\.txt"):
        read_tokenizer_files(files, {"model_type": "gpt2", "vocab_size": 2})


def tekken(original: Tokenizer, special: int) -> dict[str, Any]:
    """A tekken.json with the tokens of a trained tokenizer, ranked as they were learnt."""
    alphabet = {character: byte for byte, character in enumerate(byte_characters())}
    names = [name for name in pieces_of(original) if not name.startswith("<|")]
    tokens = [bytes(alphabet[character] for character in name) for name in names]
    return {
        "config": {
            "pattern": TEKKEN,
            "default_vocab_size": len(tokens) + special,
            "default_num_special_tokens": special,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
            for rank, token in enumerate([*tokens, b"beyond the model"])
        ],
    }


def byte_characters() -> list[str]:
    """GPT-2's character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + rest.index(byte)) for byte in range(256)]


def test_a_tekken_json_gives_the_tokens_it_was_made_of(workshop: Workshop) -> None:
    original = train(ORIGINALS["tekken"])
    files = workshop.files(tekken__json=tekken(original, special=30))
    parts = read_tokenizer_files(files, {"model_type": "mistral", "vocab_size": 800})
    for text in HARD_TEXTS:
        expected = [number - 3 + 30 for number in ids(original, text)]  # three special tokens
        assert ids(parts.tokenizer, text) == expected
    assert parts.tokenizer.encode("[INST]a").tokens == ["<s>", "[INST]", "a"]
    assert (parts.bos_token_id, parts.eos_token_id) == (1, 2)
    assert parts.tokenizer.token_to_id("<SPECIAL_29>") == 29


@pytest.mark.parametrize("change", [{"vocab": 3}, {"config": {}}, {"vocab": [{"rank": 0}]}])
def test_a_damaged_tekken_json_is_refused(workshop: Workshop, change: dict[str, Any]) -> None:
    data = tekken(train(ORIGINALS["tekken"]), special=30) | change
    with pytest.raises(CorruptFile, match=r"tekken\.json"):
        read_tekken(workshop.files(tekken__json=data)["tekken.json"])


# --- GGUF byte-level BPE ---


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, whole])


MORE_ORIGINALS = {
    "deepseek-v3": split(
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "gpt-4o": split(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "falcon": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    ),
}


@pytest.mark.parametrize("pre", MORE_ORIGINALS)
def test_more_byte_level_tokenizers_are_rebuilt_as_they_were(workshop: Workshop, pre: str) -> None:
    original = train(MORE_ORIGINALS[pre])
    rebuilt, _ = workshop.gguf(**bpe_metadata(original, pre))
    assert same(rebuilt, original)


def test_every_known_cut_loses_nothing() -> None:
    for name, pre in PRE_TOKENIZERS.items():
        sequence = pre_tokenizers.Sequence(pre.steps())
        for text in HARD_TEXTS:
            cut = "".join(word for word, _ in sequence.pre_tokenize_str(text))
            whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            assert cut == "".join(word for word, _ in whole.pre_tokenize_str(text)), name


def test_an_old_file_is_cut_as_its_architecture_always_was(workshop: Workshop) -> None:
    original = train(ORIGINALS["gpt-2"])
    metadata = llama_metadata(**bpe_metadata(original, None))
    path = write_gguf(
        workshop.folder / "old.gguf",
        metadata,
        llama_tensors(np.random.default_rng(0), embedding="F32"),
    )
    model = GgufModel({"old.gguf": path})
    model.metadata["general.architecture"] = "phi2"
    assert same(read_gguf_tokenizer(model, 700).tokenizer, original)
    model.close()


def test_replies_of_several_messages_do_not_end_at_the_first(workshop: Workshop) -> None:
    metadata = bpe_metadata(train(ORIGINALS["gpt-2"]), "gpt-4o")
    ends = ["<|end|>", "<|return|>", "<|call|>"]
    metadata["tokenizer.ggml.tokens"] += ends
    metadata["tokenizer.ggml.token_type"] += [3] * 3
    metadata["tokenizer.chat_template"] = "<|start|>{{ messages[0].content }}<|end|>"
    tokenizer, facts = workshop.gguf(**metadata)
    expected = {tokenizer.token_to_id(token) for token in ("<|return|>", "<|call|>")}
    assert expected < set(facts.eos_token_ids)
    assert tokenizer.token_to_id("<|end|>") not in facts.eos_token_ids


def test_special_tokens_that_settings_name_are_whole(workshop: Workshop) -> None:
    data = json.loads(train(ORIGINALS["gpt-2"]).to_str())
    data["added_tokens"] = []
    settings = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    files = workshop.files(tokenizer__json=data, tokenizer_config__json=settings)
    tokenizer = read_tokenizer_files(files, {"model_type": "llama", "vocab_size": 700}).tokenizer
    assert ids(tokenizer, "<|im_start|><|im_end|>") == [1, 2]
    added = tokenizer.get_added_tokens_decoder()
    assert added[1] == AddedToken("<|im_start|>", special=True, normalized=False)
