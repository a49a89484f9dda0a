from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ohmygpu import install
from ohmygpu.core.errors import Busy, ContextLengthExceeded, RuntimeFailure
from ohmygpu.core.events import Event
from tests.cli.conftest import Result
from tests.cli.fake_daemon import FakeDaemon
from tests.cli.fake_models import install_fake

Omg = Callable[..., Result]


@pytest.fixture
def daemon(home: Path, fake_daemon: FakeDaemon) -> FakeDaemon:
    install_fake(home)
    return fake_daemon


def test_a_pipe_gets_just_the_answer(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue("Par", "is", ".")
    result = omg("chat", "org/tiny", stdin=b"What is the capital of France?\n")
    assert (result.code, result.stdout, result.stderr) == (0, "Paris.\n", "")
    (body,) = daemon.chats()
    assert body["model"] == "org/tiny"
    assert body["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert body["stream"] is True


def test_words_on_the_command_line_are_one_prompt(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue("ok\n")
    assert omg("chat", "org/tiny", "say", "ok").stdout == "ok\n"
    assert daemon.chats()[0]["messages"][-1]["content"] == "say ok"


def test_piped_text_comes_before_the_prompt_about_it(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue("ok")
    omg("chat", "org/tiny", "summarise this", stdin="Größe\n".encode())
    assert daemon.chats()[0]["messages"][-1]["content"] == "Größe\n\nsummarise this"


def test_options_reach_the_daemon_and_absent_ones_are_left_to_the_model(
    daemon: FakeDaemon, omg: Omg
) -> None:
    daemon.enqueue("a")
    daemon.enqueue("b")
    options = "--temperature 0 --top-p 0.9 --top-k 5 --min-p 0.1 --max-tokens 7 --seed -3 --stop x"
    omg("chat", "org/tiny", "hi", "--system", "Be brief.", *options.split())
    omg("chat", "org/tiny", "hi")
    given, bare = daemon.chats()
    assert given["messages"][0] == {"role": "system", "content": "Be brief."}
    expected = {"temperature": 0, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 7}
    assert expected | {"seed": -3, "stop": ["x"]} == {
        key: given[key] for key in [*expected, "seed", "stop"]
    }
    assert set(bare) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--temperature", "warm"],
        ["--max-tokens", "-5"],
        ["--max-tokens", "1" + "0" * 40],
        ["--top-p", "2"],
        ["--seed", "x"],
        ["--stop", ""],
        ["--bogus"],
    ],
)
def test_a_bad_option_is_refused_before_anything_is_asked(
    daemon: FakeDaemon, omg: Omg, options: list[str]
) -> None:
    result = omg("chat", "org/tiny", "hi", *options)
    assert (result.code, result.stdout) == (2, "")
    assert "Error: " in result.stderr
    assert daemon.chats() == []


def test_nothing_to_ask_is_an_error(daemon: FakeDaemon, omg: Omg) -> None:
    result = omg("chat", "org/tiny", stdin=b" \n")
    assert result.code == 2
    assert "nothing to ask" in result.stderr


def test_input_that_is_not_text_is_refused(daemon: FakeDaemon, omg: Omg) -> None:
    result = omg("chat", "org/tiny", stdin=b"abc\xff")
    assert result.code == 2
    assert "byte 3" in result.stderr


def test_without_a_daemon_chat_says_how_to_start_one(home: Path, omg: Omg) -> None:
    install_fake(home)
    for command in ("chat", "run"):
        result = omg(command, "org/tiny", "hi")
        assert (result.code, result.stdout) == (4, "")
        assert "omg serve" in result.stderr


def test_an_unknown_model_suggests_the_near_one(daemon: FakeDaemon, omg: Omg) -> None:
    result = omg("chat", "org/tinny", "hi")
    assert result.code == 3
    assert "org/tiny" in result.stderr
    assert daemon.chats() == []


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(
    daemon: FakeDaemon, omg: Omg
) -> None:
    message = "the prompt has 3000 tokens, the context 2048"
    daemon.enqueue(refusal=ContextLengthExceeded(message))
    result = omg("chat", "org/tiny", "hi")
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"Error: {message}\n"


def test_a_full_queue_has_its_own_exit_code(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue(refusal=Busy("the queue is full", retry_after_s=2), status=503)
    assert omg("chat", "org/tiny", "hi").code == 8


def test_an_error_in_the_middle_keeps_what_was_said_and_fails(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue("Half", error=RuntimeFailure("the model's process died"))
    result = omg("chat", "org/tiny", "hi")
    assert (result.code, result.stdout) == (9, "Half\n")
    assert result.stderr == "Error: the model's process died\n"


def test_a_daemon_that_dies_in_the_middle_is_an_error(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue("Half", cut=True)
    result = omg("chat", "org/tiny", "hi")
    assert (result.code, result.stdout) == (1, "Half\n")
    assert "went away" in result.stderr


def test_an_answer_that_was_cut_off_says_so_beside_the_data(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue("Once", finish="length")
    result = omg("chat", "org/tiny", "hi", "--max-tokens", "1")
    assert (result.code, result.stdout) == (0, "Once\n")
    assert "cut off" in result.stderr


def test_verbose_counts_tokens(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue("a", "b", "c")
    result = omg("chat", "org/tiny", "hi", "--verbose")
    assert result.stdout == "abc\n"
    assert "prompt 7 tokens, answer 3 tokens" in result.stderr


def test_control_characters_pass_into_a_pipe_untouched(daemon: FakeDaemon, omg: Omg) -> None:
    daemon.enqueue("a\x1b[31mb")
    assert omg("chat", "org/tiny", "hi").stdout == "a\x1b[31mb\n"


def test_run_pulls_a_missing_model_after_saying_so(
    home: Path, daemon: FakeDaemon, omg: Omg
) -> None:
    daemon.enqueue("Hi.")
    daemon.pulls.append([Event("done", name="org/tiny").to_dict()])
    result = omg("run", "org/tinny", "hello")
    assert (result.code, result.stdout) == (0, "Hi.\n")
    assert "org/tinny is not installed (did you mean org/tiny?); pulling it" in result.stderr
    assert daemon.paths() == ["POST /v1/models/pull", "POST /v1/chat/completions"]


def test_run_does_not_pull_what_is_installed(
    home: Path, daemon: FakeDaemon, omg: Omg, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(home, "mine")  # a name that cannot be pulled
    monkeypatch.setattr(install, "pull", None)
    for name in ("org/tiny", "ORG/TINY:latest", "hf.co/org/tiny", "mine"):
        daemon.enqueue("Hi.")
        assert omg("run", name, "hello").stdout == "Hi.\n"


def test_run_of_a_name_that_is_nothing_suggests_installed_ones_and_short_names(
    home: Path, daemon: FakeDaemon, omg: Omg
) -> None:
    install_fake(home, "smolly")
    result = omg("run", "smolll", "hello")
    assert result.code == 3
    assert "smolly" in result.stderr
    assert "smollm" in result.stderr


def test_a_model_without_a_chat_template_continues_the_prompt(
    home: Path, fake_daemon: FakeDaemon, omg: Omg
) -> None:
    install_fake(home, "org/base", has_template=False)
    fake_daemon.enqueue(" a", " time", finish="length")
    result = omg("chat", "org/base", "Once upon", "--max-tokens", "2", "--stop", "x", "--verbose")
    assert (result.code, result.stdout) == (0, " a time\n")
    assert "cut off" in result.stderr
    assert "prompt 7 tokens" in result.stderr
    assert fake_daemon.completions() == [
        {
            "model": "org/base",
            "prompt": "Once upon",
            "raw": True,
            "stream": True,
            "options": {"num_predict": 2, "stop": ["x"]},
        }
    ]
    assert fake_daemon.chats() == []


def test_a_model_without_a_chat_template_takes_no_system_message(
    home: Path, fake_daemon: FakeDaemon, omg: Omg
) -> None:
    install_fake(home, "org/base", has_template=False)
    result = omg("chat", "org/base", "hi", "--system", "Be brief.")
    assert result.code != 0
    assert "no chat template" in result.stderr
    assert fake_daemon.completions() == []


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        ({"refusal": RuntimeFailure("too long")}, "too long"),
        ({"error": RuntimeFailure("the worker died")}, "the worker died"),
        ({"cut": True}, "went away before it had finished"),
    ],
)
def test_trouble_while_a_text_is_continued_is_one_sentence(
    home: Path, fake_daemon: FakeDaemon, omg: Omg, trouble: dict[str, Any], sentence: str
) -> None:
    install_fake(home, "org/base", has_template=False)
    fake_daemon.enqueue("a", **trouble)
    result = omg("chat", "org/base", "hi")
    assert result.code != 0
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
