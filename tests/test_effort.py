"""`--effort high` from a folder of SafeTensors to an installed model, with a tiny one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import tokenizers

from ohmygpu import install
from ohmygpu.core.errors import Cancelled, DiskFull
from ohmygpu.core.events import Event
from ohmygpu.core.files import TEMPORARY
from ohmygpu.core.records import CompiledModel
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import Settings, load_settings
from tests.ladder.models import cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with a tiny Llama."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    cases("llama")["grouped"].save(folder)
    words = {f"w{number}": number for number in range(61)} | {"<s>": 61, "</s>": 62, "<unk>": 63}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    return folder


@pytest.fixture
def settings() -> Settings:
    return load_settings({})


def left_over(settings: Settings) -> list[str]:
    return [p.name for p in Repository(settings.home).compiled_dir.glob(f"*{TEMPORARY}*")]


def test_high_effort_compiles_to_float32_looks_into_it_and_rounds(
    folder: Path, settings: Settings
) -> None:
    seen: list[Event] = []
    record = install.pull(str(folder), settings, recipe="q4-high", sink=seen.append)
    assert (record.recipe, record.variant) == ("q4-high", "q4-high")
    compiled = CompiledModel.load(Repository(settings.home).compiled_path(record.compiled_key))
    assert compiled.recipe == "q4-high"
    said = list(dict.fromkeys(event.message for event in seen if event.phase == "compile"))
    assert [words.partition(" tiny")[0] for words in said] == [
        "compiling",
        "the effort for",  # how long it takes comes before it is done
        "compiling",
        "looking at what the layers of",
    ]
    assert "about a minute" in said[1]
    assert left_over(settings) == []
    plain = install.pull(str(folder), settings, recipe="q4")
    assert plain.compiled_key != record.compiled_key


def test_a_cancel_while_it_looks_leaves_nothing(folder: Path, settings: Settings) -> None:
    cancel = threading.Event()

    def sink(event: Event) -> None:
        if "are given" in event.message:
            cancel.set()

    with pytest.raises(Cancelled):
        install.pull(str(folder), settings, recipe="q4-high", sink=sink, cancel=cancel)
    assert left_over(settings) == []
    assert Repository(settings.home).records() == []


def test_a_disk_too_small_for_the_float32_copy_is_refused_before_anything_is_made(
    folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Repository.check_space

    def full(self: Repository, needed_bytes: int, what: str) -> None:
        if "temporary" in what:
            raise DiskFull(f"not enough space for {what}")
        check(self, needed_bytes, what)

    monkeypatch.setattr(Repository, "check_space", full)
    with pytest.raises(DiskFull, match="looking at the layers of tiny"):
        install.pull(str(folder), settings, recipe="q4-high")
    assert left_over(settings) == []
