"""The first bytes of a GGUF file tell its architecture, or nothing."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ohmygpu.core.gguf_header import HEAD_BYTES, architecture_of, expert_count_of
from tests.convert.gguf_files import write_gguf


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def head(*entries: bytes, count: int | None = None) -> bytes:
    number = len(entries) if count is None else count
    return struct.pack("<4sIQQ", b"GGUF", 3, 5, number) + b"".join(entries)


LLAMA = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
NUMBER = text(b"general.alignment") + struct.pack("<II", 4, 32)
NAME = text(b"general.name") + struct.pack("<I", 8) + text(b"A model")
LIST = text(b"general.tags") + struct.pack("<IIQ", 9, 8, 1) + text(b"chat")


def test_the_reference_writers_files_tell_their_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture="qwen2")
    assert architecture_of(path.read_bytes()[:HEAD_BYTES]) == "qwen2"


def test_plain_entries_before_it_are_passed_over() -> None:
    assert architecture_of(head(NUMBER, NAME, LLAMA)) == "llama"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"<html>" * 100,
        head(),
        head(NAME),
        head(LIST, LLAMA),
        head(LLAMA)[:-1],
        head(NAME, count=1 << 62),
        head(struct.pack("<Q", 1 << 63) + b"x"),
        head(text(b"general.architecture") + struct.pack("<II", 4, 1)),
        head(text(b"x") + struct.pack("<I", 99)),
    ],
)
def test_what_does_not_show_it_tells_nothing(data: bytes) -> None:
    assert architecture_of(data) is None


EXPERTS = text(b"llama.expert_count") + struct.pack("<II", 4, 8)


@pytest.mark.parametrize("entries", [(LLAMA, EXPERTS), (LLAMA, LIST, EXPERTS)])
def test_the_number_of_experts_is_found_behind_lists_too(entries: tuple[bytes, ...]) -> None:
    assert expert_count_of(head(*entries)) == 8


@pytest.mark.parametrize(
    "data",
    [b"", b"GGUF", head(LLAMA), head(LLAMA, EXPERTS)[:-1], head(text(b"llama.expert_count"))],
)
def test_a_file_that_tells_no_experts_has_none(data: bytes) -> None:
    assert expert_count_of(data) == 0
