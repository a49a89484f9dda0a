from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from ohmygpu.core.errors import NetworkError
from ohmygpu.core.hub import Hub, SearchHit
from tests.cli.conftest import Result

Omg = Callable[..., Result]


def hit(name: str, **changes: Any) -> SearchHit:
    values: dict[str, Any] = {
        "id": name,
        "downloads": 1_234_567,
        "likes": 89,
        "size_bytes": 269_060_552,
        "model_type": "llama",
        "tags": ("safetensors",),
        "gated": False,
        "has_gguf": False,
        "has_safetensors": True,
    }
    return SearchHit(**{**values, **changes})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Asked queries; the hub's answer is in the last of them until a test replaces it."""
    asked: list[Any] = []
    hits = [
        hit("org/good"),
        hit("org/other", model_type="t5", gated=True),
        hit("org/mystery", model_type=None, size_bytes=None),
        hit("org/pickle", has_safetensors=False),
    ]

    def search(self: Hub, query: str, limit: int = 20) -> list[SearchHit]:
        asked.append((self.endpoint, query, limit))
        return hits[:limit]

    monkeypatch.setattr(Hub, "search", search)
    return asked


def test_search_says_for_each_model_whether_it_can_be_compiled(omg: Omg, hub: list[Any]) -> None:
    result = omg("search", "smol", "model")
    assert result.code == 0
    rows = result.stdout.splitlines()
    assert rows[0].split() == ["NAME", "DOWNLOADS", "LIKES", "SIZE", "CONVERTER", "ACCESS"]
    assert rows[1].split() == ["org/good", "1.23M", "89", "269", "MB", "yes", "(llama)"]
    assert rows[2].split()[-3:] == ["no", "(t5)", "gated"]
    assert rows[3].split()[-2:] == ["?", "?"]
    assert rows[4].split()[-2:] == ["no", "(llama)"]
    assert hub == [("https://huggingface.co", "smol model", 20)]


def test_search_as_json(omg: Omg, hub: list[Any]) -> None:
    result = omg("search", "smol", "--json", "--limit", "2")
    first, second = json.loads(result.stdout)["models"]
    assert first["converter"] is True
    assert second["converter"] is False
    assert first["downloads"] == 1_234_567


def test_a_limit_out_of_range_is_refused(omg: Omg, hub: list[Any]) -> None:
    assert omg("search", "smol", "--limit", "0").code == 2
    assert omg("search").code == 2
    assert hub == []


def test_nothing_found_is_a_hint_and_no_data(omg: Omg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hub, "search", lambda *_: [])
    result = omg("search", "qqq")
    assert (result.code, result.stdout) == (0, "")
    assert "nothing found" in result.stderr


def test_a_hub_that_cannot_be_reached_has_its_own_exit_code(
    omg: Omg, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[SearchHit]:
        raise NetworkError("the hub cannot be reached")

    monkeypatch.setattr(Hub, "search", fail)
    assert omg("search", "x").code == 5
