from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Result

Omg = Callable[..., Result]


@pytest.fixture(autouse=True)
def no_port(no_daemon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OHMYGPU_SERVER_PORT")


def test_each_setting_is_shown_with_its_value_and_its_origin(
    home: Path, omg: Omg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OHMYGPU_ENGINE_SLOTS", "4")
    assert omg("config", "set", "server.port", "1234").stdout == "server.port = 1234\n"
    rows = {row["key"]: row for row in json.loads(omg("config", "--json").stdout)["settings"]}
    assert rows["server.port"]["value"] == "1234"
    assert "config.toml" in rows["server.port"]["origin"]
    assert rows["engine.slots"]["origin"] == "environment OHMYGPU_ENGINE_SLOTS"
    assert rows["server.host"]["origin"] == "default"
    table = omg("config").stdout
    assert all(key in table for key in rows)


def test_get_prints_the_bare_value_and_path_the_file(home: Path, omg: Omg) -> None:
    assert omg("config", "get", "server.port").stdout == "10692\n"
    assert omg("config", "path").stdout == f"{home / 'config.toml'}\n"


def test_a_value_may_start_with_a_dash(omg: Omg) -> None:
    assert omg("config", "set", "models.keep_alive", "-1").code == 0
    assert omg("config", "get", "models.keep_alive").stdout == "-1\n"


def test_unknown_keys_and_bad_values_are_named_and_change_nothing(home: Path, omg: Omg) -> None:
    for arguments, text in (
        (["get", "server.prt"], "server.port"),
        (["set", "server.prt", "1"], "server.port"),
        (["set", "server.port", "abc"], "server.port"),
        (["set", "hub.token", "x"], "HF_TOKEN"),
    ):
        result = omg("config", *arguments)
        assert (result.code, result.stdout) == (2, "")
        assert text in result.stderr
    assert not (home / "config.toml").exists()


def test_set_repairs_a_value_that_everything_else_refuses(home: Path, omg: Omg) -> None:
    home.mkdir()
    (home / "config.toml").write_text('# mine\n[server]\nport = "x"\n', encoding="utf-8")
    assert omg("list").code == 2
    assert omg("config", "set", "server.port", "1234").code == 0
    assert omg("list").code == 0
    assert "# mine" in (home / "config.toml").read_text(encoding="utf-8")


def test_set_says_when_the_environment_wins(omg: Omg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OHMYGPU_SERVER_PORT", "5")
    assert "OHMYGPU_SERVER_PORT is set" in omg("config", "set", "server.port", "6").stderr


def test_the_token_is_never_shown(omg: Omg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in omg("config").stdout + omg("config", "--json").stdout
    assert omg("config", "get", "hub.token").stdout == "set\n"
