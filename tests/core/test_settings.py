from __future__ import annotations

import math
import os
import stat
import time
from pathlib import Path

import pytest

from ohmygpu.convert.recipes import RECIPES as COMPILED_RECIPES
from ohmygpu.core import settings as settings_module
from ohmygpu.core.errors import ConfigError
from ohmygpu.core.settings import (
    Settings,
    describe,
    load_settings,
    parse_duration,
    set_setting,
)
from ohmygpu.core.values import mask_credentials, parse_bytes


def write(home: Path, text: str | bytes) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    path = home / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def row(settings: Settings, key: str) -> tuple[str, str]:
    return next((row.value, row.origin) for row in describe(settings) if row.key == key)


def test_defaults_hold_without_a_file(home: Path) -> None:
    settings = load_settings()
    assert settings == Settings(home=home)
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 10692)
    assert row(settings, "server.port") == ("10692", "default")
    assert not home.exists(), "reading settings must not create anything"


def test_the_home_is_under_the_users_configuration_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OHMYGPU_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings().home == tmp_path / ".config" / "ohmygpu"
    assert load_settings({"home": str(tmp_path / "x")}).home == tmp_path / "x"


def test_flags_beat_the_environment_which_beats_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(home, "[server]\nport = 1\nhost = 'a'\n[engine]\nslots = 2\n")
    monkeypatch.setenv("OHMYGPU_SERVER_PORT", "3")
    monkeypatch.setenv("OHMYGPU_ENGINE_SLOTS", "4")
    settings = load_settings({"engine.slots": "5"})
    assert (settings.server.host, settings.server.port, settings.engine.slots) == ("a", 3, 5)
    assert row(settings, "server.host") == ("a", f"{path} line 3")
    assert row(settings, "server.port") == ("3", "environment OHMYGPU_SERVER_PORT")
    assert row(settings, "engine.slots") == ("5", "command line")


def test_variables_of_other_tools_are_honoured_below_our_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror/simple")
    settings = load_settings()
    assert settings.hub.endpoint == "http://127.0.0.1:9"
    assert settings.pypi.index == "https://mirror/simple"
    monkeypatch.setenv("OHMYGPU_HUB_ENDPOINT", "https://ours")
    assert load_settings().hub.endpoint == "https://ours"


def test_empty_and_foreign_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OHMYGPU_SERVER_PORT", "")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("OHMYGPU_SOURCE", "x.whl")
    settings = load_settings()
    assert settings.server.port == 10692
    assert settings.hub.token is None


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", " hf_secret\n")
    settings = load_settings()
    assert settings.hub.token == "hf_secret"
    assert row(settings, "hub.token") == ("set", "environment HF_TOKEN")
    assert "secret" not in repr(settings) + repr(describe(settings))
    monkeypatch.setenv("HF_TOKEN", "hf_sec\nret: x")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "hf_sec" not in repr(caught.value.to_dict())


@pytest.mark.parametrize("where", ["file", "environment", "set"])
def test_the_token_is_not_taken_from_anywhere_else(
    where: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "file":
        write(home, "[hub]\ntoken = 'hf_secret'\n")
    if where == "environment":
        monkeypatch.setenv("OHMYGPU_HUB_TOKEN", "hf_secret")
    with pytest.raises(ConfigError, match="HF_TOKEN") as caught:
        set_setting(home, "hub.token", "hf_secret") if where == "set" else load_settings()
    assert "secret" not in repr(caught.value.to_dict())


def test_credentials_inside_an_index_address_are_never_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:pa@ss@mirror/simple")
    settings = load_settings()
    assert "pa@ss" in settings.pypi.index
    assert row(settings, "pypi.index")[0] == "https://***@mirror/simple"
    assert "ss@" not in repr(settings).replace("***@", "")
    monkeypatch.setenv("PIP_INDEX_URL", "gopher://me:pass@mirror")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "pass" not in repr(caught.value.to_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[server]\nprot = 1",
            'unknown setting "server.prot" (…line 2); did you mean "server.port"',
        ),
        ("\n[servr]\nport = 1", 'unknown section or setting "servr" (…line 2); did you mean "serv'),
        ("port = 1", 'unknown section or setting "port" (…line 1); did you mean "server.port"?'),
        ("server = 1", "server (…line 1): must be a table"),
        ("[server]\n\nport = true", "server.port = True (…line 3): must be a whole number"),
        ("[server]\nport = 70000", "server.port = 70000 (…line 2): must be a whole number from 0"),
        ("[server]\nport = 1.5", "server.port = 1.5 (…line 2): must be a whole number"),
        ("[server]\nport = [1]", "server.port = [1] (…line 2): must be a whole number"),
        ("server.port = -1", "server.port = -1 (…line 1): must be"),
        ("[server]\nhost = 'a b'", "server.host = a b (…line 2): must be a host name"),
        ("[server]\norigins = [1]", "server.origins = [1] (…line 2): must be a list"),
        ("[server]\ndrain_s = nan", "server.drain_s = nan (…line 2): must be"),
        ("[models]\nrecipe = 'q5'", "models.recipe = q5 (…line 2): must be one of auto, f32"),
        ("[models]\nkeep_alive = 'soon'", "models.keep_alive = soon (…line 2): must be a duration"),
        ("[models]\nkeep_source = 2", "models.keep_source = 2 (…line 2): must be true or false"),
        ("[engine]\nexecution_provider = 'TPU'", "engine.execution_provider = TPU (…line 2): must"),
        (
            "[hub]\nendpoint = 'huggingface.co'",
            "hub.endpoint = huggingface.co (…line 2): must be an",
        ),
        ("[hub]\nendpoint = 'https://u:p@x'", "hub.endpoint = https://***@x (…line 2): must not"),
        ("[hub]\nendpoint = 'https://x:99999'", "hub.endpoint = https://x:99999 (…line 2): must"),
        ("[server\nport = 1", "is not valid TOML"),
        ("[server]\nport = 1\nport = 2", "is not valid TOML"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("[server]\nport = " + "9" * 5000, "is not valid TOML"),
        (b"[server]\n\xff\xfe = 1", "line 2: not UTF-8"),
        ("[server]\n" + "#" * 300_000, "larger than"),
        ("[server]\nhost = '" + "x" * 5000 + "'", "server.host = xxx"),
        ('[server]\nhost = "a\\u001b[31m"', "server.host = a?[31m (…line 2)"),
    ],
)
def test_a_bad_file_is_named_with_key_value_and_line(
    home: Path, text: str | bytes, message: str
) -> None:
    path = write(home, text)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    shown = caught.value.message
    assert message.replace("…", f"{path} ") in shown
    assert shown.isprintable()
    assert len(shown) < 500 + len(str(path))


def test_a_bad_variable_and_a_bad_flag_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"server\.port = x \(command line\)"):
        load_settings({"server.port": "x"})
    monkeypatch.setenv("OHMYGPU_SERVER_PROT", "1")
    with pytest.raises(ConfigError, match=r"environment OHMYGPU_SERVER_PROT.*server\.port"):
        load_settings()


def test_a_byte_order_mark_and_windows_lines_are_fine(home: Path) -> None:
    write(home, b"\xef\xbb\xbf[server]\r\nport = 5\r\n")
    assert load_settings().server.port == 5


def test_a_folder_or_a_device_in_place_of_the_file_is_refused(home: Path) -> None:
    (home / "config.toml").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not a file"):
        load_settings()
    (home / "config.toml").rmdir()
    (home / "config.toml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is not a file"):
        load_settings()


def test_an_unreadable_file_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(home, "[server]\nport = 5\n")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: let the system say no

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*Permission denied"):
        load_settings()


def test_a_home_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("")
    monkeypatch.setenv("OHMYGPU_HOME", str(tmp_path / "f"))
    with pytest.raises(ConfigError, match=r"OHMYGPU_HOME.*must be a folder"):
        load_settings()


def test_every_setting_accepts_its_own_shown_value(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings()
    rows = [row for row in describe(settings) if row.key not in ("home", "hub.token")]
    assert len(rows) > 15
    for entry in rows:
        if entry.value:
            monkeypatch.setenv("OHMYGPU_" + entry.key.upper().replace(".", "_"), entry.value)
        assert entry.help
    assert load_settings() == settings


def test_the_recipes_of_the_settings_are_those_of_the_compiler() -> None:
    assert set(settings_module.RECIPES) == {"auto", *COMPILED_RECIPES}


def test_setting_a_value_keeps_comments_and_the_rest(home: Path) -> None:
    path = write(home, "# mine\n[server]\nport = 1 # why\n\n[models]\nkeep_alive = '1h'\n")
    assert set_setting(home, "server.port", "2") == 2
    assert set_setting(home, "hub.connections", "3") == 3
    assert set_setting(home, "server.origins", "https://a, https://b") == ("https://a", "https://b")
    assert set_setting(home, "models.keep_source", "no") is False
    text = path.read_text()
    assert "# mine\n[server]\nport = 2 # why\n" in text
    settings = load_settings()
    assert (settings.server.port, settings.hub.connections) == (2, 3)
    assert settings.server.origins == ("https://a", "https://b")
    assert settings.models.keep_source is False
    assert settings.models.keep_alive == "1h"
    assert [entry.name for entry in home.iterdir()] == ["config.toml"], "nothing is left over"


def test_setting_the_first_value_creates_a_private_file(home: Path) -> None:
    set_setting(home, "server.port", "2")
    assert load_settings().server.port == 2
    assert stat.S_IMODE((home / "config.toml").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_refused_value_leaves_the_file_alone(home: Path) -> None:
    path = write(home, "[server]\nport = 1\n")
    for key, value in [("server.port", "x"), ("server.nope", "1"), ("nope", "1"), ("home", "/x")]:
        with pytest.raises(ConfigError):
            set_setting(home, key, value)
    assert path.read_text() == "[server]\nport = 1\n"


def test_a_wrong_value_in_the_file_can_be_set_right(home: Path) -> None:
    write(home, "[server]\nport = 'x'\n")
    set_setting(home, "server.port", "7")
    assert load_settings().server.port == 7


def test_a_file_that_is_not_toml_is_not_overwritten(home: Path) -> None:
    path = write(home, "[server\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        set_setting(home, "server.port", "7")
    assert path.read_text() == "[server\n"


def test_a_linked_file_stays_a_link(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    target = tmp_path / "dotfiles.toml"
    target.write_text("# kept\n")
    (home / "config.toml").symlink_to(target)
    set_setting(home, "server.port", "7")
    assert (home / "config.toml").is_symlink()
    assert target.read_text().startswith("# kept\n")
    assert load_settings().server.port == 7


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *(("5m", 300), ("1h30m", 5400), ("300", 300), ("0", 0), ("1.5h", 5400), ("500ms", 0.5)),
        *((".5s", 0.5), ("+5s", 5), ("1h0m0.5s", 3600.5), ("10us", 1e-5), ("10µs", 1e-5)),
        *((300, 300), (0, 0), (0.5, 0.5), (" 5m ", 300), ("3600s", 3600), ("-0", 0), ("-0s", 0)),
        *((-1, math.inf), ("-1", math.inf), ("-1s", math.inf), ("-5m", math.inf), (-0.5, math.inf)),
    ],
)
def test_durations_are_those_of_ollama(value: str | float, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "m", "5x", "5 m", "1h-5m", "1e3", "inf", "nan", "--5m", "5m5", "٣m", "0x1"),
        *(math.nan, math.inf, 1e300, 10**400, True, None, [], "9" * 1000, "1m" * 500_000),
    ],
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration(value)  # type: ignore[arg-type]
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5), ("64MiB", 64 << 20), ("2 GB", 2 * 10**9), ("512k", 512_000), ("1b", 1), (7, 7)],
)
def test_sizes_have_units(text: str | int, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "-1", "1.5M", "x", "1XB", "9" * 30, None, True])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="must be a size"):
        parse_bytes(text)  # type: ignore[arg-type]


def test_credentials_are_masked() -> None:
    assert mask_credentials("https://a:b@c@host/x@y") == "https://***@host/x@y"
    assert mask_credentials("https://host/x@y") == "https://host/x@y"
    assert mask_credentials("plain") == "plain"
