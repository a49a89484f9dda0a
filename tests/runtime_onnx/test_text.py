from __future__ import annotations

import random
from pathlib import Path

import pytest

from ohmygpu.runtime_onnx.text import TextStream
from ohmygpu.runtime_onnx.tokenizer import Tokenizer
from tests.runtime_onnx import tiny_tokenizer

MULTILINGUAL = (
    "Grüße aus 東京! 🙂👩‍👩‍👧‍👦 naïve ½ €\n\tdef f(x):  return x\r\n  العربية עברית 🇫🇷 done"
)


def load(tmp_path: Path, kind: str) -> Tokenizer:
    tokenizer = getattr(tiny_tokenizer, kind)()
    eos = {"byte_level": "<|im_end|>", "byte_fallback": "</s>", "word_piece": "[CLS]"}[kind]
    bos = "<s>" if kind == "byte_fallback" else ""
    folder = tiny_tokenizer.save(tmp_path, tokenizer)
    return Tokenizer(folder, tiny_tokenizer.compiled(tokenizer, eos, bos))


@pytest.fixture(params=["byte_level", "byte_fallback", "word_piece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load(tmp_path, request.param)


@pytest.fixture
def bytes_tokenizer(tmp_path: Path) -> Tokenizer:
    return load(tmp_path, "byte_level")


def stream(
    tokenizer: Tokenizer,
    ids: list[int],
    stop: tuple[str, ...] = (),
    prompt: list[int] | None = None,
) -> list[str]:
    text = TextStream(tokenizer, prompt or [], stop)
    pieces = []
    for token_id in ids:
        pieces.append(text.push(token_id))
        if text.stopped:
            break
    return [*pieces, text.finish()]


def bytewise(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Token ids that spell `data` one byte each (byte-level vocabulary)."""
    alphabet = {tokenizer.token_bytes(each): each for each in range(tokenizer.vocab_size)}
    return [alphabet[bytes([byte])] for byte in data]


def test_pieces_add_up_to_the_decoded_text(tokenizer: Tokenizer) -> None:
    for text in (MULTILINGUAL, *tiny_tokenizer.TEXT, "", " ", "a"):
        prompt = tokenizer.encode("The capital of France is")
        ids = tokenizer.encode(text, add_special=False)
        whole = tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
        assert "".join(stream(tokenizer, ids, prompt=prompt)) == whole


def test_text_keeps_its_spaces_after_a_prompt(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "byte_fallback")
    prompt = tokenizer.encode("The capital of France is")
    ids = tokenizer.encode("Paris. What", add_special=False)
    assert "".join(stream(tokenizer, ids, prompt=prompt)) == " Paris. What"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_every_piece_has_whole_characters_only(kind: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, kind)
    prompt = tokenizer.encode("x")
    ids = tokenizer.encode(MULTILINGUAL, add_special=False)
    pieces = stream(tokenizer, ids, prompt=prompt)
    assert pieces.count("") > 10, "characters must be spread over tokens"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces).strip(" ") == MULTILINGUAL
    assert pieces[-1] == ""


def test_a_character_comes_with_its_last_byte(bytes_tokenizer: Tokenizer) -> None:
    ids = bytewise(bytes_tokenizer, "a🙂é".encode())
    assert stream(bytes_tokenizer, ids) == ["a", "", "", "", "🙂", "", "é", ""]


@pytest.mark.parametrize(
    "data", [b"\x80a", b"\xe6\x9d\xe6\x9d\xb1", b"\xff\xfe", b"a\xc3(", b"\xf0\x9f\x99\x9f\x99 "]
)
def test_bytes_that_are_not_utf8_become_replacement_characters(
    data: bytes, bytes_tokenizer: Tokenizer
) -> None:
    ids = bytewise(bytes_tokenizer, data)
    assert "".join(stream(bytes_tokenizer, ids)) == data.decode("utf-8", "replace")
    assert "".join(stream(bytes_tokenizer, ids)) == bytes_tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_that_the_end_cuts_off_is_left_out(kind: str, tmp_path: Path) -> None:
    tokenizer = load(tmp_path, kind)
    prompt = tokenizer.encode("x")
    ids = tokenizer.encode("a½", add_special=False)[:-1]
    assert "".join(stream(tokenizer, ids, prompt=prompt)).strip() == "a"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("capital of France", add_special=False)
    special = min(tokenizer.special_ids)
    mixed = [special, *ids[:2], special, tokenizer.eos_token_ids[0], *ids[2:]]
    assert "".join(stream(tokenizer, mixed)) == "".join(stream(tokenizer, ids))


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer: Tokenizer) -> None:
    assert "".join(stream(tokenizer, [10**6])) == ""


def test_the_stop_string_and_what_follows_is_never_sent(bytes_tokenizer: Tokenizer) -> None:
    ids = bytewise(bytes_tokenizer, b"Hello world, bye")
    pieces = stream(bytes_tokenizer, ids, ("wor",))
    assert "".join(pieces) == "Hello "
    assert len(pieces) == len("Hello wor") + 1


def test_a_possible_stop_string_is_held_back_until_it_is_none(bytes_tokenizer: Tokenizer) -> None:
    ids = bytewise(bytes_tokenizer, b"aEND ENX")
    assert stream(bytes_tokenizer, ids, ("ENDX",)) == [*"a", "", "", "", "END ", "", "", "ENX", ""]


def test_what_is_held_back_comes_at_the_end(bytes_tokenizer: Tokenizer) -> None:
    assert stream(bytes_tokenizer, bytewise(bytes_tokenizer, b"xEN"), ("END",))[-1] == "EN"


def test_the_stop_string_that_ends_first_wins(bytes_tokenizer: Tokenizer) -> None:
    ids = bytewise(bytes_tokenizer, b"1abcdef")
    assert "".join(stream(bytes_tokenizer, ids, ("abcde", "cd"))) == "1ab"
    assert "".join(stream(bytes_tokenizer, ids, ("cd", "bcd", "d"))) == "1a"


def test_stop_strings_may_be_emoji_or_split_over_tokens(bytes_tokenizer: Tokenizer) -> None:
    ids = bytewise(bytes_tokenizer, "ab🙂cd".encode())
    assert "".join(stream(bytes_tokenizer, ids, ("🙂c",))) == "ab"


def test_after_a_stop_nothing_comes(bytes_tokenizer: Tokenizer) -> None:
    text = TextStream(bytes_tokenizer, [], ("b",))
    ids = bytewise(bytes_tokenizer, b"abab")
    assert [text.push(each) for each in ids] == ["a", "", "", ""]
    assert text.finish() == ""
    assert text.stopped


def reference_cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The rule of TextStream, written the slow way."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def test_any_split_and_any_stops_give_the_same_text(bytes_tokenizer: Tokenizer) -> None:
    chance = random.Random(3)
    for _ in range(400):
        text = "".join(chance.choice("aab🙂") for _ in range(chance.randrange(30)))
        stops = tuple(
            "".join(chance.choice("aab🙂") for _ in range(chance.randrange(1, 6)))
            for _ in range(chance.randrange(1, 4))
        )
        ids = bytewise(bytes_tokenizer, text.encode())
        if chance.random() < 0.5:
            ids = bytes_tokenizer.encode(text, add_special=False)
        stream_ = TextStream(bytes_tokenizer, [], stops)
        sent = ""
        for token_id in ids:
            sent += stream_.push(token_id)
            assert reference_cut(text, stops)[0].startswith(sent), "text was sent too early"
            if stream_.stopped:
                break
        sent += stream_.finish()
        assert (sent, stream_.stopped) == reference_cut(text, stops)


def test_streams_do_not_share_state(bytes_tokenizer: Tokenizer) -> None:
    first, second = (TextStream(bytes_tokenizer) for _ in range(2))
    smile, euro = (bytewise(bytes_tokenizer, text.encode()) for text in ("🙂", "€uro"))
    sent = ["", ""]
    for one, other in zip(smile, euro, strict=False):
        sent[0] += first.push(one)
        sent[1] += second.push(other)
    assert sent == ["🙂", "€u"]


def test_a_long_reply_holds_no_growing_window(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "word_piece")
    calls: list[int] = []
    decode = tokenizer.decode

    class Counting:
        special_ids = tokenizer.special_ids
        has_bytes = False

        def decode(self, ids: list[int]) -> str:
            calls.append(len(ids))
            return decode(ids)

    ids = tokenizer.encode(tiny_tokenizer.TEXT[0] * 50, add_special=False)
    text = TextStream(Counting(), [])  # type: ignore[arg-type]
    assert "".join(text.push(each) for each in ids) + text.finish() == decode(ids)
    assert max(calls) <= 12
