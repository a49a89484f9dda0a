from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.errors import CorruptFile
from ohmygpu.core.records import TEMPLATE_FILE, TOKENIZER_FILE
from ohmygpu.daemon.cards import read_card, read_vocabulary
from tests.daemon.model_cards import make_card, make_compiled, make_record


def test_the_listed_name_has_a_tag_that_finds_the_model_again() -> None:
    assert make_card().name == "HuggingFaceTB/SmolLM2-135M-Instruct:latest"
    assert make_card(is_default=False, variant="q4_k_m", name="m").name == "m:q4_k_m"


@pytest.mark.parametrize(
    "text",
    ["2026-11-22T10:00:00Z", "2026-11-22T12:00:00+02:00", "2026-11-22T10:00:00.000000+00:00"],
)
def test_the_time_of_installation_is_utc(text: str) -> None:
    assert make_card(installed_at=text).installed_at == datetime(2026, 11, 22, 10, tzinfo=UTC)


def test_a_card_is_read_from_the_compiled_folder(tmp_path: Path) -> None:
    make_compiled().save(tmp_path)
    (tmp_path / TEMPLATE_FILE).write_text("{{ 'é' }}", encoding="utf-8")
    card = read_card(make_record(), tmp_path)
    assert card.compiled == make_compiled()
    assert card.template == "{{ 'é' }}"
    assert card.has_template
    assert card.digest == make_record().compiled_key


def test_a_model_without_template_cannot_chat(tmp_path: Path) -> None:
    make_compiled().save(tmp_path)
    assert not read_card(make_record(), tmp_path).has_template
    (tmp_path / TEMPLATE_FILE).write_text(" \n", encoding="utf-8")
    assert not read_card(make_record(), tmp_path).has_template


def test_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match="pull it again"):
        read_card(make_record(), tmp_path)
    make_compiled().save(tmp_path)
    (tmp_path / TEMPLATE_FILE).write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CorruptFile, match=r"template of .* pull it again"):
        read_card(make_record(), tmp_path)


@pytest.mark.parametrize(
    ("model", "tokens", "merges"),
    [
        ({"vocab": {"b": 1, "a": 0}, "merges": ["a b"]}, ["a", "b", "", "<s>"], ["a b"]),
        ({"vocab": {"b": 1, "a": 0}, "merges": [["a", "b"]]}, ["a", "b", "", "<s>"], ["a b"]),
        ({"vocab": [["a", -1.0], ["b", -2.0]]}, ["a", "b", "", "<s>"], []),
    ],
)
def test_the_vocabulary_is_listed_by_id(
    model: dict[str, Any], tokens: list[str], merges: list[str], tmp_path: Path
) -> None:
    data = {"model": model, "added_tokens": [{"id": 3, "content": "<s>"}]}
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(data), encoding="utf-8")
    assert read_vocabulary(make_card(folder=tmp_path)) == (tokens, merges)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": 5}}'])
def test_a_damaged_tokenizer_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(CorruptFile, match="tokenizer of"):
        read_vocabulary(make_card(folder=tmp_path))
