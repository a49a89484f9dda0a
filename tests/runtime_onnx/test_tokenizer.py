from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from ohmygpu.core.errors import ContextLengthExceeded, CorruptFile, InvalidRequest
from ohmygpu.core.records import TEMPLATE_FILE, TOKENIZER_FILE
from ohmygpu.runtime_api import Message
from ohmygpu.runtime_onnx.tokenizer import Tokenizer
from tests.runtime_onnx import tiny_tokenizer

USER = [Message("user", "Hi")]


@pytest.fixture
def chatml(tmp_path: Path) -> Tokenizer:
    """Byte-level BPE with ChatML markers, as SmolLM2 and Qwen have."""
    plain = tiny_tokenizer.byte_level()
    folder = tiny_tokenizer.save(tmp_path, plain)
    return Tokenizer(folder, tiny_tokenizer.compiled(plain, "<|im_end|>", "<|im_start|>"))


@pytest.fixture
def llama(tmp_path: Path) -> Tokenizer:
    """A tokenizer that puts BOS before plain text, as Llama's do."""
    plain = tiny_tokenizer.byte_fallback()
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    folder = tiny_tokenizer.save(tmp_path, plain, template)
    return Tokenizer(folder, tiny_tokenizer.compiled(plain, "</s>", "<s>"))


def text_of(tokenizer: Tokenizer, folder: Path, ids: list[int]) -> str:
    """Decoded with the special tokens, which Tokenizer.decode leaves out."""
    plain = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    return str(plain.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("text", [*tiny_tokenizer.TEXT, "", " ", "\n\t", "👩‍👩‍👧\u202e\x00\ufffe"])
def test_text_survives_a_round_trip(text: str, chatml: Tokenizer, llama: Tokenizer) -> None:
    assert chatml.decode(chatml.encode(text)) == text
    assert llama.decode(llama.encode(text)) == text


def test_bos_is_added_to_plain_text_once(llama: Tokenizer) -> None:
    assert llama.encode("Rome")[0] == 1
    assert llama.encode("Rome", add_special=False)[0] != 1
    written = llama.encode("<s>Rome")
    assert written.count(1) == 1
    assert llama.encode("<s><s>Rome").count(1) == 2


def test_special_tokens_in_the_template_become_single_tokens(
    chatml: Tokenizer, tmp_path: Path
) -> None:
    ids = chatml.encode_chat(USER)
    start, end = chatml.encode("<|im_start|>"), chatml.encode("<|im_end|>")
    assert len(start) == len(end) == 1
    assert ids.count(start[0]) == 3
    assert ids.count(end[0]) == 2
    assert text_of(chatml, tmp_path, ids) == chatml.render(USER)
    assert chatml.render(USER).endswith("<|im_start|>assistant\n")


def test_a_chat_has_the_bos_of_its_template_alone(llama: Tokenizer) -> None:
    assert llama.encode_chat(USER).count(1) == 1


def test_special_tokens_written_by_a_user_are_special_as_in_transformers(
    chatml: Tokenizer,
) -> None:
    ids = chatml.encode_chat([Message("user", "<|im_end|>")])
    assert ids.count(chatml.eos_token_ids[0]) == 3


def test_a_chat_continues_from_context_without_a_second_system_message(
    chatml: Tokenizer, tmp_path: Path
) -> None:
    first = chatml.encode_chat(USER)
    reply = chatml.encode("Rome", add_special=False)
    expected = "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for context in (first + reply, [*first, *reply, chatml.eos_token_ids[0]]):
        ids = chatml.encode_chat(USER, context)
        assert ids[: len(first + reply)] == first + reply
        assert text_of(chatml, tmp_path, ids) == chatml.render(USER) + "Rome" + expected


def test_a_prompt_continues_from_context_without_bos(llama: Tokenizer) -> None:
    context = llama.encode("Rome")
    assert llama.encode_prompt(" Paris", context).count(1) == 1
    assert llama.encode_prompt("Paris")[0] == 1


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_context_tokens_must_be_in_the_vocabulary(chatml: Tokenizer, token_id: int) -> None:
    for encode in (chatml.encode_chat, chatml.encode_prompt):
        with pytest.raises(InvalidRequest, match=f"token {token_id}; this model has") as caught:
            encode(USER if encode == chatml.encode_chat else "x", [token_id])  # type: ignore[arg-type]
        assert caught.value.details["param"] == "context"


def test_half_a_surrogate_pair_is_refused(chatml: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="half a surrogate pair at character 2"):
        chatml.encode("é \ud83d")
    with pytest.raises(InvalidRequest, match="half a surrogate pair"):
        chatml.encode_chat([Message("user", "\udc00")])


@pytest.mark.parametrize(
    "text", ["x", " ", "🙂", "e\u0301", "\x00", "<|im_start|>", "東", "ab c\n"]
)
def test_a_huge_prompt_is_refused_with_both_numbers(chatml: Tokenizer, text: str) -> None:
    huge = text * (40_000_000 // len(text))
    with pytest.raises(ContextLengthExceeded, match="context holds 2048") as caught:
        chatml.encode(huge)
    assert caught.value.details["context_tokens"] == 2048
    assert caught.value.details["prompt_tokens"] > 2048


def test_a_large_prompt_of_odd_characters_is_counted_exactly(chatml: Tokenizer) -> None:
    text = "e\u0301\u202e\x00🙂" * 10_000
    assert chatml.decode(chatml.encode(text)) == text


def test_without_a_template_a_chat_says_to_use_a_prompt(tmp_path: Path) -> None:
    plain = tiny_tokenizer.byte_level()
    folder = tiny_tokenizer.save(tmp_path, plain, template="")
    tokenizer = Tokenizer(folder, tiny_tokenizer.compiled(plain, "<|im_end|>"))
    assert not tokenizer.has_template
    with pytest.raises(InvalidRequest, match=r"no chat template.*prompt instead") as caught:
        tokenizer.encode_chat(USER)
    assert caught.value.details["param"] == "messages"
    assert tokenizer.decode(tokenizer.encode_prompt("Rome")) == "Rome"


@pytest.mark.parametrize("damage", ["", "{}", "[]", "not json"])
def test_a_damaged_tokenizer_says_what_to_do(damage: str, tmp_path: Path) -> None:
    plain = tiny_tokenizer.byte_level()
    (tmp_path / TOKENIZER_FILE).write_text(damage, encoding="utf-8")
    with pytest.raises(CorruptFile, match="pull the model again"):
        Tokenizer(tmp_path, tiny_tokenizer.compiled(plain, "<|im_end|>"))
    tiny_tokenizer.save(tmp_path, plain)
    (tmp_path / TEMPLATE_FILE).write_bytes(b"\xff")
    with pytest.raises(CorruptFile, match="pull the model again"):
        Tokenizer(tmp_path, tiny_tokenizer.compiled(plain, "<|im_end|>"))


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    plain = tiny_tokenizer.byte_level()
    plain.enable_truncation(4)
    plain.enable_padding(length=64)
    folder = tiny_tokenizer.save(tmp_path, plain)
    assert json.loads((folder / TOKENIZER_FILE).read_text())["truncation"]
    tokenizer = Tokenizer(folder, tiny_tokenizer.compiled(plain, "<|im_end|>"))
    text = tiny_tokenizer.TEXT[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("a")) == 1


def test_only_decoders_that_look_at_one_token_give_bytes(tmp_path: Path) -> None:
    for kind, expected in (("byte_level", True), ("byte_fallback", True), ("word_piece", False)):
        plain = getattr(tiny_tokenizer, kind)()
        folder = tiny_tokenizer.save(tmp_path, plain)
        eos = plain.id_to_token(0)
        assert Tokenizer(folder, tiny_tokenizer.compiled(plain, eos)).has_bytes is expected


def test_every_byte_has_a_token_in_a_byte_level_vocabulary(chatml: Tokenizer) -> None:
    single = {
        chatml.token_bytes(each)
        for each in range(chatml.vocab_size)
        if len(chatml.token_bytes(each)) == 1
    }
    assert len(single) == 256
