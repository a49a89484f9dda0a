"""Tokenizers of every source: the same tokens as the original, and the ids serving needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
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

from ohmygpu.convert.source import open_source
from ohmygpu.convert.tokenizer import TokenizerFacts, prepare_tokenizer
from ohmygpu.convert.tokenizer_files import read_tokenizer_files
from ohmygpu.convert.tokenizer_sentencepiece import Piece, build_sentencepiece
from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from ohmygpu.core.records import TEMPLATE_FILE, TOKENIZER_FILE
from tests.convert.gguf_files import KINDS, TOKENS, llama_metadata, llama_tensors, write_gguf

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1234567 o'clock, isn't it?",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\r\n",
    "Où êtes-vous ? Ça va bien, merci ! Здравствуйте, мир. こんにちは世界 你好",
    "  leading and   many    spaces   \n \n  \n",
    "emoji 😀👩‍👩‍👧 and 3.14159, 1e-10, ½, Ⅷ, ١٢٣",
    "CamelCaseWords ALLCAPS I'LL WE'VE don't",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "\n",
    "a",
    "0",
    "\x00\x7f",
    "x<|im_end|>\n<|im_start|>y",
    "zero\u200bwidth",
]
TEXTS += ["\U0010ffff e\u0301", "!?…—“”«»", "_".join(CORPUS)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gpt2(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


ORIGINALS = {
    "gpt-2": gpt2(),
    "smollm": gpt2(pre_tokenizers.Digits(individual_digits=True)),
    "llama-bpe": split(LLAMA_3),
    "qwen2": split(LLAMA_3.replace("{1,3}", "")),
    "tekken": split(TEKKEN),
}


def train(pre: pre_tokenizers.PreTokenizer, tokens: int = 700) -> Tokenizer:
    """A byte-level BPE tokenizer as a model's authors would have made it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def bpe_metadata(tokenizer: Tokenizer, pre: str | None) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.scores": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


class Workshop:
    """Writes a model, prepares its tokenizer and opens the result."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self.output = folder / "prepared"
        self.output.mkdir()

    def gguf(self, **changes: Any) -> tuple[Tokenizer, TokenizerFacts]:
        """Of a tiny GGUF model with these changes to its metadata."""
        metadata = llama_metadata(**changes)
        tensors = llama_tensors(np.random.default_rng(0), embedding="F32")
        rows = len(metadata["tokenizer.ggml.tokens"])
        tensors["token_embd.weight"] = (np.zeros((rows, 256), np.float32), "F32")
        path = write_gguf(self.folder / "m.gguf", metadata, tensors)
        source = open_source({"m.gguf": path})
        self._stack.callback(source.close)
        facts = prepare_tokenizer(source, self.output)
        return Tokenizer.from_file(str(self.output / TOKENIZER_FILE)), facts

    def files(self, **contents: Any) -> dict[str, Path]:
        """Files of a repository; keys are names with the dot as `__`, dicts become JSON."""
        files = {}
        for key, content in contents.items():
            name = key.replace("__", ".")
            files[name] = self.folder / name
            text = content if isinstance(content, str) else json.dumps(content)
            files[name].write_text(text, encoding="utf-8")
        return files

    @property
    def template(self) -> str:
        """The written chat template."""
        return (self.output / TEMPLATE_FILE).read_text(encoding="utf-8")


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    """A Workshop in a temporary folder; its sources are closed after the test."""
    with ExitStack() as stack:
        yield Workshop(tmp_path, stack)


def ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


@pytest.mark.parametrize("pre", ORIGINALS)
def test_a_byte_level_tokenizer_is_rebuilt_as_it_was(workshop: Workshop, pre: str) -> None:
    original = train(ORIGINALS[pre])
    if pre == "qwen2":
        original.normalizer = normalizers.NFC()
    rebuilt, _ = workshop.gguf(**bpe_metadata(original, pre))
    for text in TEXTS:
        assert ids(rebuilt, text) == ids(original, text)
        written = text if original.normalizer is None else original.normalizer.normalize_str(text)
        assert rebuilt.decode(ids(rebuilt, text), skip_special_tokens=False) == written


def test_pre_tokenizers_differ_so_that_a_guess_would_show(workshop: Workshop) -> None:
    original = train(ORIGINALS["gpt-2"])
    rebuilt, _ = workshop.gguf(**bpe_metadata(original, "smollm"))
    assert [ids(rebuilt, text) for text in TEXTS] != [ids(original, text) for text in TEXTS]


def test_whole_words_win_over_merges_where_the_tokenizer_says_so(workshop: Workshop) -> None:
    metadata = bpe_metadata(train(ORIGINALS["gpt-2"]), "llama-bpe")
    word = "Xylophonist"
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], word]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    tokenizer, _ = workshop.gguf(**metadata)
    assert tokenizer.encode(word, add_special_tokens=False).tokens == [word]
    tokenizer, _ = workshop.gguf(**metadata | {"tokenizer.ggml.pre": "gpt-2"})
    assert len(tokenizer.encode(word, add_special_tokens=False).tokens) > 1


@pytest.mark.parametrize(
    ("pre", "message"),
    [("made-up", "'made-up'.*llama-bpe"), (None, "old converter"), ("default", "old converter")],
)
def test_an_unknown_pre_tokenizer_is_refused_not_guessed(
    workshop: Workshop, pre: str | None, message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        workshop.gguf(**bpe_metadata(train(ORIGINALS["gpt-2"]), pre))


def test_an_unknown_kind_of_tokenizer_is_refused(workshop: Workshop) -> None:
    with pytest.raises(UnsupportedModel, match="'rwkv'"):
        workshop.gguf(**{"tokenizer.ggml.model": "rwkv"})


def test_facts_of_a_gguf_hold_the_template_and_every_end(workshop: Workshop) -> None:
    metadata = bpe_metadata(train(ORIGINALS["smollm"]), "smollm")
    metadata |= {"tokenizer.chat_template": TEMPLATE, "general.sampling.temp": 0.5}
    metadata |= {"general.sampling.top_k": 40}
    _, facts = workshop.gguf(**metadata)
    assert facts == TokenizerFacts(
        bos_token_id=1,
        eos_token_ids=(2, 0),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        has_template=True,
        generation={"temperature": 0.5, "top_k": 40},
    )
    assert workshop.template == TEMPLATE


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("smollm", {}, [False, False]),
        ("llama-bpe", {}, [True, False]),
        ("tekken", {}, [True, False]),
        ("llama-bpe", {"add_bos_token": False}, [False, False]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [True, True]),
    ],
)
def test_bos_and_eos_surround_plain_text_as_the_file_says(
    workshop: Workshop, pre: str, flags: dict[str, bool], expected: list[bool]
) -> None:
    metadata = bpe_metadata(train(ORIGINALS["gpt-2"]), pre)
    del metadata["tokenizer.ggml.add_bos_token"]
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    tokenizer, _ = workshop.gguf(**metadata)
    plain, full = ids(tokenizer, "fox"), ids(tokenizer, "fox", add_special_tokens=True)
    assert [full[0] == 1, full[-1] == 2] == expected
    assert full == [1] * expected[0] + plain + [2] * expected[1]


def sentencepiece_reference(pieces: list[Piece], text: str) -> list[int]:
    """SentencePiece's own rule: join the neighbours whose union scores best, leftmost first."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == 1}
    number = {piece.text: index for index, piece in enumerate(pieces)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [
            (-scores[a + b], place)
            for place, (a, b) in enumerate(pairwise(parts))
            if a + b in scores
        ]
        if not joins:
            break
        place = min(joins)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    found: list[int] = []
    for part in parts:
        raw = [f"<0x{byte:02X}>" for byte in part.encode()]
        found += [number[part]] if part in number else [number[byte] for byte in raw]
    return found


def sentencepiece_pieces() -> list[Piece]:
    """A vocabulary whose joins overlap in many ways."""
    rng = np.random.default_rng(0)
    words = sorted({text[i : i + n] for text in CORPUS[:2] for n in (2, 3, 4) for i in range(40)})
    words = [word.replace(" ", "▁") for word in words if "\n" not in word]
    letters = sorted({letter for text in CORPUS[:3] for letter in text.replace(" ", "▁")} - {"\n"})
    pieces = [Piece(text, 0.0, kind) for text, kind in zip(TOKENS[:259], KINDS, strict=False)]
    joined = rng.permutation(words)
    pieces += [Piece(str(text), -float(rank), 1) for rank, text in enumerate(joined)]
    return pieces + [Piece(text, -1000.0 - rank, 1) for rank, text in enumerate(letters)]


def test_sentencepiece_text_is_joined_by_score(workshop: Workshop) -> None:
    pieces = sentencepiece_pieces()
    tokenizer, facts = workshop.gguf(
        **{
            "tokenizer.ggml.tokens": [piece.text for piece in pieces],
            "tokenizer.ggml.token_type": [piece.kind for piece in pieces],
            "tokenizer.ggml.scores": [piece.score for piece in pieces],
        }
    )
    for text in (text for text in TEXTS if text and "<|" not in text):
        assert ids(tokenizer, text) == sentencepiece_reference(pieces, text)
        assert tokenizer.decode(ids(tokenizer, text)) == text
    assert ids(tokenizer, "fox", add_special_tokens=True)[0] == facts.bos_token_id == 1
    assert facts.eos_token_ids == (2,)


def test_special_tokens_in_text_are_one_token(workshop: Workshop) -> None:
    tokenizer, _ = workshop.gguf()
    assert ids(tokenizer, "ab</s>ab").count(2) == 1


def test_a_space_before_the_text_is_left_out_where_the_file_says_so(workshop: Workshop) -> None:
    tokenizer, _ = workshop.gguf(**{"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]


BAD_GGUF: dict[str, tuple[dict[str, Any], str]] = {
    "a token twice": ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, "same token twice"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "list of strings|lacks|shape"),
    "types missing": ({"tokenizer.ggml.token_type": [1, 1]}, "one per token"),
    "no scores": ({"tokenizer.ggml.scores": None}, "scores in m.gguf is missing"),
    "scores not finite": (
        {"tokenizer.ggml.scores": [float("nan")] * len(TOKENS)},
        "not a finite number",
    ),
    "bos outside": ({"tokenizer.ggml.bos_token_id": 9999}, "bos_token_id.*9999"),
    "flag of another type": ({"tokenizer.ggml.add_bos_token": 3}, "not of the type bool"),
    "template of another type": ({"tokenizer.chat_template": 3}, "is not text"),
    "impossible sampling": ({"general.sampling.temp": -3.0}, "temperature"),
}


@pytest.mark.parametrize("damage", BAD_GGUF)
def test_a_damaged_gguf_tokenizer_is_refused(workshop: Workshop, damage: str) -> None:
    changes, message = BAD_GGUF[damage]
    if damage == "no tokens":
        with pytest.raises(CorruptFile):
            workshop.gguf(**changes)
        return
    with pytest.raises(CorruptFile, match=message):
        workshop.gguf(**changes)


@pytest.mark.parametrize("merges", [["a"], ["a b c"], ["zz yy"], None])
def test_merges_that_do_not_fit_are_refused(workshop: Workshop, merges: list[str] | None) -> None:
    metadata = bpe_metadata(train(ORIGINALS["gpt-2"]), "gpt-2")
    with pytest.raises(CorruptFile, match="merges"):
        workshop.gguf(**metadata | {"tokenizer.ggml.merges": merges})


def hf_tokenizer(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(train(ORIGINALS["gpt-2"]).to_str())
    return data | changes


CONFIG = {"model_type": "llama", "vocab_size": 700, "bos_token_id": 0, "eos_token_id": 2}


def test_a_tokenizer_json_is_taken_as_it_is(workshop: Workshop) -> None:
    original = train(ORIGINALS["gpt-2"])
    original.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    files = workshop.files(tokenizer__json=json.loads(original.to_str()))
    parts = read_tokenizer_files(files, CONFIG)
    for text in TEXTS:
        assert ids(parts.tokenizer, text, True) == ids(original, text, True)
    assert (parts.bos_token_id, parts.eos_token_id) == (0, 2)


def test_a_tokenizer_json_that_would_cut_prompts_does_not(workshop: Workshop) -> None:
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    files = workshop.files(tokenizer__json=hf_tokenizer(truncation=truncation), config__json=CONFIG)
    files["model.safetensors"] = workshop.folder / "model.safetensors"
    files["model.safetensors"].write_bytes(b"\x02" + bytes(7) + b"{}")
    source = open_source(files)
    prepare_tokenizer(source, workshop.output)
    source.close()
    tokenizer = Tokenizer.from_file(str(workshop.output / TOKENIZER_FILE))
    assert len(ids(tokenizer, "x" * 50)) > 2


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0]),  # the post-processor of tokenizer.json
        ({"add_bos_token": True, "bos_token": "<|im_start|>"}, [1]),
        ({"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}}, [1]),
        ({"add_bos_token": False, "bos_token": "<|im_start|>"}, []),
        ({"add_bos_token": True, "bos_token": None}, []),
    ],
)
def test_explicit_settings_win_over_the_post_processor(
    workshop: Workshop, settings: dict[str, Any], expected: list[int]
) -> None:
    original = train(ORIGINALS["gpt-2"])
    original.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    files = workshop.files(
        tokenizer__json=json.loads(original.to_str()), tokenizer_config__json=settings
    )
    tokenizer = read_tokenizer_files(files, CONFIG).tokenizer
    assert ids(tokenizer, "fox", True) == expected + ids(tokenizer, "fox")


def test_ends_are_collected_from_every_file_and_the_template(workshop: Workshop) -> None:
    settings = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    files = workshop.files(
        tokenizer__json=hf_tokenizer(),
        config__json=CONFIG | {"eos_token_id": [7, 8]},
        tokenizer_config__json=settings,
        generation_config__json={"eos_token_id": 9},
    )
    files["model.safetensors"] = workshop.folder / "model.safetensors"
    files["model.safetensors"].write_bytes(b"\x02" + bytes(7) + b"{}")
    source = open_source(files)
    facts = prepare_tokenizer(source, workshop.output)
    source.close()
    assert facts.eos_token_ids == (0, 9, 7, 8, 2)
    assert facts.eos_token == "<|endoftext|>"
    assert facts.has_template


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template__jinja": "A", "tokenizer_config__json": {"chat_template": "B"}}, "A"),
        ({"tokenizer_config__json": {"chat_template": "B"}}, "B"),
        (
            {
                "tokenizer_config__json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "T"},
                        {"name": "default", "template": "D"},
                    ]
                }
            },
            "D",
        ),
        ({"chat_template__json": {"chat_template": "C"}}, "C"),
        ({}, None),
    ],
)
def test_the_template_is_found_where_repositories_keep_it(
    workshop: Workshop, files: dict[str, Any], expected: str | None
) -> None:
    parts = read_tokenizer_files(workshop.files(tokenizer__json=hf_tokenizer(), **files), CONFIG)
    assert parts.template == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 9},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        ),
        ({"temperature": 0.7, "top_k": -1, "min_p": None}, {"temperature": 0.7, "top_k": 0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({}, {}),
    ],
)
def test_sampling_defaults_are_the_models_own(
    workshop: Workshop, generation: dict[str, Any], expected: dict[str, float]
) -> None:
    files = workshop.files(tokenizer__json=hf_tokenizer(), generation_config__json=generation)
    assert read_tokenizer_files(files, CONFIG).generation == expected


def test_tokens_listed_beside_the_tokenizer_are_added(workshop: Workshop) -> None:
    size = train(ORIGINALS["gpt-2"]).get_vocab_size()
    decoder = {str(size): {"content": "<|tool|>", "special": True}}
    files = workshop.files(
        tokenizer__json=hf_tokenizer(), tokenizer_config__json={"added_tokens_decoder": decoder}
    )
    tokenizer = read_tokenizer_files(files, CONFIG | {"vocab_size": size + 1}).tokenizer
    assert ids(tokenizer, "<|tool|>") == [size]


def test_a_listed_token_with_another_number_is_refused(workshop: Workshop) -> None:
    files = workshop.files(tokenizer__json=hf_tokenizer(), added_tokens__json={"<|tool|>": 5000})
    with pytest.raises(CorruptFile, match="should be number 5000"):
        read_tokenizer_files(files, CONFIG | {"vocab_size": 6000})


def test_tokens_the_model_has_no_embedding_for_are_plain_text(workshop: Workshop) -> None:
    data = hf_tokenizer()
    size = len(data["model"]["vocab"])
    pad = data["added_tokens"][0] | {"id": size, "content": "<pad>"}
    data["added_tokens"] = [*data["added_tokens"], pad]
    files = workshop.files(tokenizer__json=data)
    tokenizer = read_tokenizer_files(files, CONFIG | {"vocab_size": size}).tokenizer
    assert max(ids(tokenizer, "<pad>")) < size


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "tokenizer": ({"tokenizer__json": {"model": {}}}, r"tokenizer\.json cannot be read"),
    "not JSON": ({"tokenizer__json": "{"}, "not valid JSON"),
    "eos nowhere": (
        {"tokenizer__json": {}, "tokenizer_config__json": {"eos_token": "<nope>"}},
        "'<nope>' is not in the tokenizer",
    ),
    "sampling": (
        {"tokenizer__json": {}, "generation_config__json": {"temperature": "hot"}},
        "temperature = 'hot'",
    ),
    "sampling range": (
        {"tokenizer__json": {}, "generation_config__json": {"top_p": 7.0}},
        "top_p = 7, not between 0 and 1",
    ),
    "template": (
        {"tokenizer__json": {}, "tokenizer_config__json": {"chat_template": 7}},
        "not text",
    ),
}


@pytest.mark.parametrize("damage", BAD_FILES)
def test_damaged_files_are_refused_and_named(workshop: Workshop, damage: str) -> None:
    contents, message = BAD_FILES[damage]
    contents = {key: value or hf_tokenizer() for key, value in contents.items()}
    with pytest.raises(CorruptFile, match=message):
        read_tokenizer_files(workshop.files(**contents), CONFIG)


def test_a_repository_without_a_tokenizer_is_refused(workshop: Workshop) -> None:
    with pytest.raises(UnsupportedModel, match=r"none of tokenizer\.json, tokenizer\.model"):
        read_tokenizer_files({}, CONFIG)


def sentencepiece_file(path: Path, pieces: list[Piece], **trainer: Any) -> Path:
    from transformers.utils import sentencepiece_model_pb2_new as definition

    proto = definition.ModelProto()
    for piece in pieces:
        proto.pieces.add(piece=piece.text, score=piece.score, type=piece.kind)
    for key, value in ({"model_type": 2} | trainer).items():
        setattr(proto.trainer_spec, key, value)
    proto.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_sentencepiece_file_is_read_without_sentencepiece(workshop: Workshop) -> None:
    pieces = sentencepiece_pieces()
    path = sentencepiece_file(workshop.folder / "tokenizer.model", pieces)
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    files = workshop.files(tokenizer_config__json=settings) | {"tokenizer.model": path}
    parts = read_tokenizer_files(files, {"model_type": "llama", "vocab_size": len(pieces)})
    for text in (text for text in TEXTS if text and "<|" not in text):
        assert ids(parts.tokenizer, text) == sentencepiece_reference(pieces, text)
    assert ids(parts.tokenizer, "fox", True)[0] == parts.bos_token_id == 1


def test_a_sentencepiece_file_of_another_kind_is_refused(workshop: Workshop) -> None:
    path = sentencepiece_file(workshop.folder / "m", sentencepiece_pieces(), model_type=4)
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        read_tokenizer_files({"tokenizer.model": path}, CONFIG)


@pytest.mark.parametrize("data", [b"", b"\xff" * 40])
def test_a_damaged_sentencepiece_file_is_refused(workshop: Workshop, data: bytes) -> None:
    path = workshop.folder / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"tokenizer\.model"):
        read_tokenizer_files({"tokenizer.model": path}, CONFIG)


def test_the_space_is_added_once_or_after_every_special_token() -> None:
    pieces = [Piece(text, 0.0, kind) for text, kind in zip(TOKENS, KINDS, strict=True)]
    pieces += [Piece("▁", -5.0, 1), Piece("▁ab", -1.0, 1)]
    found = [
        build_sentencepiece(pieces, add_space_prefix=True, prefix_once=once)
        .encode("ab</s>ab", add_special_tokens=False)
        .tokens
        for once in (True, False)
    ]
    assert found == [["▁ab", "</s>", "ab"], ["▁ab", "</s>", "▁ab"]]
