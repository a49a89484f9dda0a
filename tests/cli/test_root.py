from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from ohmygpu import __version__
from ohmygpu.cli import docs, main
from ohmygpu.cli.root import ALIASES, COMMANDS
from ohmygpu.cli.root import omg as root
from tests.cli.conftest import Result, spawn
from tests.cli.fake_models import install_fake

Omg = Callable[..., Result]


def test_help_imports_nothing_but_click_and_the_root(home: Path) -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from ohmygpu.cli import main\n"
        "code = main(['--help'])\n"
        "new = {name for name in set(sys.modules) - before}\n"
        "ours = sorted(name for name in new if name.startswith('ohmygpu'))\n"
        "heavy = {'httpx2', 'asyncio', 'ssl', 'tqdm', 'numpy', 'pydantic', 'tomlkit', 'mcp'}\n"
        "print(ours, sorted(heavy & new), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0
    assert "Usage: omg" in result.stdout
    expected = [f"ohmygpu.{name}" for name in ("cli", "cli.errors", "cli.lazy", "cli.output")]
    expected += ["ohmygpu.cli.root", "ohmygpu.core", "ohmygpu.core.errors"]
    assert result.stderr.strip() == f"{['ohmygpu', *expected]} []"


def test_each_line_of_the_help_is_a_command_and_says_what_the_command_says() -> None:
    for name, lazy in COMMANDS.items():
        command = lazy.load()
        words = set(lazy.summary.lower().rstrip(".").replace(";", "").split())
        said = set((command.help or "").lower().replace(".", " ").replace(";", " ").split())
        assert len(words & said) >= len(words) // 2, f"{name}: {lazy.summary!r} is out of date"


def test_aliases_lead_to_commands() -> None:
    assert set(ALIASES.values()) <= set(COMMANDS)


def test_no_arguments_show_the_help(omg: Omg) -> None:
    assert omg().stdout == omg("--help").stdout == omg("-h").stdout
    assert omg().code == 0


def test_version_is_one_line(omg: Omg) -> None:
    assert omg("--version").stdout == f"omg {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "meant"), [("lst", "list"), ("pul", "pull"), ("serv", "serve"), ("serach", "search")]
)
def test_a_misspelt_command_suggests_the_near_one(omg: Omg, typed: str, meant: str) -> None:
    result = omg(typed)
    assert (result.code, result.stdout) == (2, "")
    assert f"did you mean {meant}" in result.stderr


def test_a_misspelt_subcommand_or_option_suggests_the_near_one(omg: Omg) -> None:
    assert "pull" in omg("model", "pul").stderr
    assert "--json" in omg("list", "--jsn").stderr


def test_docs_cli_md_is_what_the_commands_say() -> None:
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == docs.render(), (
        "run: python -m ohmygpu.cli.docs docs/cli.md"
    )


def test_every_command_and_option_has_a_help_text() -> None:
    def check(command: click.Command, path: str) -> None:
        assert command.help, path
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{path} {parameter.opts}"
        if isinstance(command, click.Group):
            with click.Context(command) as ctx:
                for name in command.list_commands(ctx):
                    below = command.get_command(ctx, name)
                    assert below is not None
                    check(below, f"{path} {name}")

    check(root, "omg")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ohmygpu", "config"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == ""
        assert process.wait(30) == 1


class FullDisk(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_output_that_cannot_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert main(["config"]) == 1
    assert capsys.readouterr().err == (
        "Error: the operating system refused: No space left on device\n"
    )


def test_a_bug_is_a_sentence_and_a_traceback_only_with_omg_debug(
    omg: Omg, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("ohmygpu.core.settings.load_settings", broken)
    monkeypatch.setattr("ohmygpu.cli.model.load_settings", broken)
    result = omg("list")
    assert result.code == 1
    assert result.stderr.startswith("Error: unexpected ZeroDivisionError: oops")
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("OMG_DEBUG", "1")
    assert "Traceback" in omg("list").stderr


def test_python_m_ohmygpu_is_the_same_command(home: Path) -> None:
    result = spawn(["list", "--json"])
    assert result.returncode == 0
    assert json.loads(result.stdout) == {"models": []}


def test_the_shell_completes_commands_and_installed_names(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.shell_completion import BashComplete

    install_fake(home, "org/tiny")
    complete = BashComplete(root, {}, "omg", "_OMG_COMPLETE")
    assert "pull" in [item.value for item in complete.get_completions([], "pu")]
    assert [item.value for item in complete.get_completions(["chat"], "or")] == ["org/tiny"]
    monkeypatch.setenv("OHMYGPU_SERVER_PORT", "not a port")
    assert complete.get_completions(["chat"], "or") == []
