from __future__ import annotations

import stat
from pathlib import Path

import pytest

from ohmygpu.core.errors import ContextLengthExceeded, RuntimeFailure
from tests.cli.fake_daemon import FakeDaemon
from tests.cli.fake_models import install_fake
from tests.cli.terminal import CTRL_C, CTRL_D, Terminal

READY = ">>> "


@pytest.fixture
def daemon(home: Path, fake_daemon: FakeDaemon) -> FakeDaemon:
    install_fake(home)
    return fake_daemon


def roles(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def test_a_conversation_remembers_what_was_said_and_ends_with_ctrl_d(daemon: FakeDaemon) -> None:
    daemon.enqueue("Hello ", "Ann.")
    daemon.enqueue("Ann.")
    with Terminal("chat", "org/tiny", "--system", "Be brief.") as screen:
        screen.wait_for(READY)
        screen.type("I am Ann.\r")
        screen.wait_for("Hello Ann.")
        screen.wait_for(READY)
        screen.type("Who am I?\r")
        screen.wait_for("Ann.")
        screen.wait_for(READY)
        screen.type(CTRL_D)
        assert screen.exit_code() == 0
    assert roles(daemon.chats()[1]["messages"]) == [
        ("system", "Be brief."),
        ("user", "I am Ann."),
        ("assistant", "Hello Ann."),
        ("user", "Who am I?"),
    ]


def test_ctrl_c_stops_the_answer_and_keeps_the_program_and_what_was_said(
    daemon: FakeDaemon,
) -> None:
    daemon.enqueue("One ", "two ", "three", hold_after=2)
    daemon.enqueue("Fine.")
    with Terminal("chat", "org/tiny") as screen:
        screen.wait_for(READY)
        screen.type("Count.\r")
        screen.wait_for("two ")
        assert daemon.holding.wait(10)
        screen.type(CTRL_C)
        screen.wait_for("(stopped)")
        assert daemon.client_left.wait(10), "the daemon must see the client leave"
        screen.wait_for(READY)
        screen.type("Go on.\r")
        screen.wait_for("Fine.")
        screen.wait_for(READY)
        screen.type("/bye\r")
        assert screen.exit_code() == 0
    assert roles(daemon.chats()[1]["messages"]) == [
        ("user", "Count."),
        ("assistant", "One two "),
        ("user", "Go on."),
    ]


def test_ctrl_c_before_the_first_word_leaves_the_question_out(daemon: FakeDaemon) -> None:
    daemon.enqueue("late", hold_after=0)
    daemon.enqueue("Fine.")
    with Terminal("chat", "org/tiny") as screen:
        screen.wait_for(READY)
        screen.type("Hm?\r")
        assert daemon.holding.wait(10)
        screen.type(CTRL_C)
        screen.wait_for("stopped before")
        screen.wait_for(READY)
        screen.type("Well?\r")
        screen.wait_for("Fine.")
    assert roles(daemon.chats()[1]["messages"]) == [("user", "Well?")]


def test_ctrl_c_at_an_empty_prompt_hints_at_the_way_out(daemon: FakeDaemon) -> None:
    with Terminal("chat", "org/tiny") as screen:
        screen.wait_for(READY)
        screen.press_until(CTRL_C, "Ctrl-D or /bye ends the chat")
        screen.wait_for(READY)
        screen.type(CTRL_D)
        assert screen.exit_code() == 0


def test_an_error_ends_the_answer_and_not_the_chat(daemon: FakeDaemon) -> None:
    daemon.enqueue("Half", error=RuntimeFailure("the model's process died"))
    daemon.enqueue("Back.")
    with Terminal("chat", "org/tiny") as screen:
        screen.wait_for(READY)
        screen.type("Hi.\r")
        screen.wait_for("Error: the model's process died")
        screen.wait_for(READY)
        screen.type("Again.\r")
        screen.wait_for("Back.")
    assert roles(daemon.chats()[1]["messages"]) == [("user", "Again.")]


def test_an_escape_sequence_from_the_model_does_not_reach_the_terminal(
    daemon: FakeDaemon,
) -> None:
    daemon.enqueue("a\x1b]0;owned\x07", "\x1b[2Jz.")
    with Terminal("chat", "org/tiny") as screen:
        screen.wait_for(READY)
        screen.type("Hi.\r")
        assert "owned" in screen.wait_for("z.")
        screen.wait_for(READY)
    assert "\x1b]0;" not in screen.text
    assert "\x1b[2J" not in screen.text


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_messages(
    daemon: FakeDaemon,
) -> None:
    daemon.enqueue("One.")
    daemon.enqueue("Two.")
    daemon.enqueue(refusal=ContextLengthExceeded("3000 of 2048 tokens"))
    daemon.enqueue("Three.")
    with Terminal("chat", "org/tiny") as screen:
        for question, answer in (("1?", "One."), ("2?", "Two."), ("3?", "Three.")):
            screen.wait_for(READY)
            screen.type(f"{question}\r")
            screen.wait_for(answer)
        screen.wait_for("the oldest 2 messages are forgotten")
        screen.wait_for(READY)
    assert [text for _, text in roles(daemon.chats()[3]["messages"])] == ["2?", "Two.", "3?"]


def test_a_message_that_alone_is_too_long_loses_nothing_of_the_conversation(
    daemon: FakeDaemon,
) -> None:
    daemon.enqueue("One.")
    for _ in range(2):
        daemon.enqueue(refusal=ContextLengthExceeded("3000 of 2048 tokens"))
    daemon.enqueue("Still here.")
    with Terminal("chat", "org/tiny") as screen:
        for question, answer in (("1?", "One."), ("long", "3000 of 2048"), ("2?", "Still here.")):
            screen.wait_for(READY)
            screen.type(f"{question}\r")
            screen.wait_for(answer)
    assert [text for _, text in roles(daemon.chats()[-1]["messages"])] == ["1?", "One.", "2?"]


def test_commands_change_the_chat_and_misspelt_ones_are_no_messages(daemon: FakeDaemon) -> None:
    daemon.enqueue("a")
    daemon.enqueue("Done.")
    with Terminal("chat", "org/tiny") as screen:
        for typed, shown in (
            ("/help", "/clear"),
            ("/hlep", "did you mean /help"),
            ("/set temperature 0.5", "temperature: 0.5"),
            ("/set parameter seed 7", "seed: 7"),
            ("/set top_p 3", "top_p must be between"),
            ("/set top_k many", "must be a number"),
            ("/set tmperature 1", "did you mean temperature"),
            ("/set seed none", "the model's default"),
            ("/system Talk like a pirate.", "system: Talk like a pirate."),
            ("/show", "context 2048 tokens"),
            ("Hi.", "a"),
            ("/clear", "forgotten"),
            ('"""first', "... "),
            ('second"""', "Done."),
        ):
            screen.type(f"{typed}\r")
            screen.wait_for(shown)
    body = daemon.chats()[1]
    assert body["temperature"] == 0.5
    assert "seed" not in body
    assert roles(body["messages"]) == [
        ("system", "Talk like a pirate."),
        ("user", "first\nsecond"),
    ]


def test_typed_lines_are_remembered_for_the_next_chat_in_a_private_file(
    home: Path, daemon: FakeDaemon
) -> None:
    for _ in range(2):
        daemon.enqueue("Hm.")
    with Terminal("chat", "org/tiny") as screen:
        screen.wait_for(READY)
        screen.type("a question\r")
        screen.wait_for("Hm.")
        screen.wait_for(READY)
        screen.type(CTRL_D)
        assert screen.exit_code() == 0
    history = home / "chat_history"
    assert "a question" in history.read_text(encoding="utf-8")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with Terminal("chat", "org/tiny") as screen:
        screen.wait_for(READY)
        screen.type("\x1b[A\r")  # the up arrow
        screen.wait_for("Hm.")
    assert daemon.chats()[1]["messages"][-1]["content"] == "a question"


def test_ctrl_c_during_a_single_answer_exits_with_130(daemon: FakeDaemon) -> None:
    daemon.enqueue("One ", "two", hold_after=1)
    with Terminal("chat", "org/tiny", "Count.") as screen:
        screen.wait_for("One ")
        assert daemon.holding.wait(10)
        screen.type(CTRL_C)
        assert screen.exit_code() == 130
    assert "Traceback" not in screen.text


def test_ctrl_c_during_a_pull_leaves_the_daemon_and_says_how_to_go_on(daemon: FakeDaemon) -> None:
    bar = {"phase": "download", "done_bytes": 5_000_000, "total_bytes": 10_000_000}
    daemon.pulls.append([bar, {"phase": "hold"}])
    with Terminal("pull", "org/tiny") as screen:
        screen.wait_for("downloading:")
        assert daemon.holding.wait(10)
        screen.type(CTRL_C)
        screen.wait_for("goes on from here")
        assert screen.exit_code() == 130
    assert daemon.client_left.wait(10)
    assert "Traceback" not in screen.text


def test_a_model_without_a_chat_template_continues_each_text_alone(
    home: Path, fake_daemon: FakeDaemon
) -> None:
    install_fake(home, "org/base", has_template=False)
    fake_daemon.enqueue(" a time")
    fake_daemon.enqueue(" far away")
    with Terminal("chat", "org/base") as screen:
        screen.wait_for("it continues each text you type")
        screen.wait_for(READY)
        screen.type("Once upon\r")
        screen.wait_for("a time")
        screen.wait_for(READY)
        screen.type("/system Be brief.\r")
        screen.wait_for("takes no system message")
        screen.wait_for(READY)
        screen.type("In a land\r")
        screen.wait_for("far away")
        screen.wait_for(READY)
        screen.type(CTRL_D)
        assert screen.exit_code() == 0
    assert [body["prompt"] for body in fake_daemon.completions()] == ["Once upon", "In a land"]
