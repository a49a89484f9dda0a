"""Texts and token ids of an embed request, as the model gets them."""

from __future__ import annotations

import numpy as np
import pytest

from ohmygpu.core.errors import ContextLengthExceeded, InvalidRequest
from ohmygpu.runtime_api import MAX_EMBED_INPUTS, EmbedRequest
from ohmygpu.runtime_onnx.embed_input import (
    Framing,
    check_dimensions,
    finish,
    framing,
    prepare_inputs,
)


class Letters:
    """A token for each letter, [1] before and [2, 3] behind; counts the characters it saw."""

    vocab_size = 256

    def __init__(self, most: int = 1 << 30) -> None:
        self.seen = 0
        self.most = most

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        self.seen += len(text)
        if len(text) > self.most:
            raise ContextLengthExceeded("too long", prompt_tokens=0, context_tokens=0)
        row = [ord(letter) for letter in text]
        return [1, *row, 2, 3] if add_special else row


AROUND = Framing((1,), (2, 3))


def rows(request: EmbedRequest, encoder: Letters | None = None, context: int = 10) -> list[str]:
    found = prepare_inputs(request, encoder or Letters(), AROUND, context)
    return ["".join(map(chr, row)) for row in found]


def test_what_a_model_puts_around_a_text_is_found() -> None:
    assert framing(Letters()) == AROUND


def test_texts_are_framed_and_token_ids_used_as_they_stand() -> None:
    request = EmbedRequest(inputs=("ab", (97, 98), ""))
    assert rows(request) == ["\1ab\2\3", "ab", "\1\2\3"]


def test_a_text_may_fill_the_context_and_not_more() -> None:
    assert rows(EmbedRequest(inputs=("abcdefg",))) == ["\1abcdefg\2\3"]
    with pytest.raises(ContextLengthExceeded, match=r"input\[1\] has 11 tokens.*takes 10") as got:
        rows(EmbedRequest(inputs=("a", "abcdefgh")))
    assert got.value.details["prompt_tokens"] == 11
    assert got.value.details["context_tokens"] == 10


def test_truncation_keeps_what_the_model_puts_around() -> None:
    request = EmbedRequest(inputs=("abcdefghijkl", "ab", tuple(range(97, 117))), truncate=True)
    assert rows(request) == ["\1abcdefg\2\3", "\1ab\2\3", "abcdefghij"]


def test_a_request_can_lower_the_context_and_not_raise_it() -> None:
    for limit, text in ((4, "a"), (99, "abcdefg")):
        request = EmbedRequest(inputs=("abcdefghijk",), truncate=True, context_limit=limit)
        assert rows(request) == [f"\1{text}\2\3"]
    with pytest.raises(InvalidRequest, match="input after truncation exceeds"):
        rows(EmbedRequest(inputs=("a",), truncate=True, context_limit=3))


@pytest.mark.parametrize("truncate", [False, True])
def test_a_huge_text_is_not_tokenised_whole(truncate: bool) -> None:
    encoder = Letters()
    request = EmbedRequest(inputs=("x" * 5_000_000,), truncate=truncate)
    if truncate:
        assert rows(request, encoder) == ["\1xxxxxxx\2\3"]
    else:
        with pytest.raises(ContextLengthExceeded, match="more than"):
            rows(request, encoder)
    assert encoder.seen < 100_000


def test_a_huge_text_is_cut_though_the_encoder_refuses_parts_of_it() -> None:
    request = EmbedRequest(inputs=("x" * 500_000,), truncate=True)
    assert rows(request, Letters(most=900)) == ["\1xxxxxxx\2\3"]


def test_token_ids_the_model_does_not_have_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"input\[1\] holds token 256; .* 0 to 255"):
        rows(EmbedRequest(inputs=((1,), (2, 256))))


def test_an_input_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"input\[0\] is empty"):
        rows(EmbedRequest(inputs=((),)))


def test_texts_are_put_in_lower_case_where_the_model_asks_for_it() -> None:
    found = prepare_inputs(EmbedRequest(inputs=("aB",)), Letters(), AROUND, 10, lower_case=True)
    assert found == [[1, 97, 98, 2, 3]]


def test_a_request_has_some_inputs_and_not_too_many() -> None:
    with pytest.raises(InvalidRequest, match="nothing to embed"):
        EmbedRequest(inputs=())
    with pytest.raises(InvalidRequest, match=f"{MAX_EMBED_INPUTS} is the most"):
        EmbedRequest(inputs=("a",) * (MAX_EMBED_INPUTS + 1))


def test_fewer_dimensions_have_length_one_again() -> None:
    vectors = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 0.0]], np.float32)
    found = finish(vectors, EmbedRequest(inputs=("a",), dimensions=2))
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert finish(vectors, EmbedRequest(inputs=("a",))).tolist() == vectors.tolist()
    whole = finish(vectors[:1], EmbedRequest(inputs=("a",), normalize=True))
    assert np.linalg.norm(whole) == pytest.approx(1)


@pytest.mark.parametrize("dimensions", [0, 4, -1])
def test_dimensions_the_model_does_not_have_are_refused(dimensions: int) -> None:
    with pytest.raises(InvalidRequest, match="between 1 and 3"):
        check_dimensions(EmbedRequest(inputs=("a",), dimensions=dimensions), 3)
