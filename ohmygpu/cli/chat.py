"""`omg chat` and `omg run`: one answer, or a conversation at a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ohmygpu.client import ChatOptions, Client, ModelInfo, connect
from ohmygpu.core.errors import InvalidName, InvalidRequest, ModelNotFound
from ohmygpu.core.refs import ModelRef
from ohmygpu.core.settings import load_settings
from ohmygpu.runtime_api import Message, SamplingParams
from ohmygpu.tui.line_editor import LineEditor

from .answer import ask, explain_end, print_answer
from .catalogue import Catalogue
from .errors import INTERRUPTED
from .model import pull_model
from .options import model_name
from .output import note
from .repl import COMMANDS, Conversation

HISTORY_FILE = "chat_history"
_SILENT_INPUT_S = 2.0

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _options(command: _Function) -> _Function:
    for option in reversed(
        (
            click.option("--system", metavar="TEXT", help="The system message."),
            click.option(
                "--temperature", type=float, metavar="T", help="0 always takes the likeliest token."
            ),
            click.option(
                "--top-p", type=float, metavar="P", help="Choose among tokens of this total share."
            ),
            click.option(
                "--top-k", type=int, metavar="K", help="Choose among the K likeliest tokens."
            ),
            click.option(
                "--min-p",
                type=float,
                metavar="P",
                help="Leave out tokens below this share of the best.",
            ),
            click.option("--max-tokens", type=int, metavar="N", help="Longest answer."),
            click.option("--seed", type=int, metavar="N", help="The same seed, the same answer."),
            click.option(
                "--stop", multiple=True, metavar="TEXT", help="End the answer here; repeatable."
            ),
            click.option("--verbose", is_flag=True, help="Show token counts and speed."),
            click.option("--no-history", is_flag=True, help="Neither read nor save typed lines."),
        )
    ):
        command = option(command)
    return command


@click.command("chat")
@model_name("model")
@click.argument("prompt", nargs=-1)
@_options
def chat(model: str, prompt: tuple[str, ...], **given: Any) -> None:
    """Chat with an installed model.

    With PROMPT, or with text on standard input, the answer alone goes to standard output. Both
    together ask about the text: `omg chat smollm2 "summarise this" < notes.txt`. Otherwise a
    conversation begins: /help lists its commands, Ctrl-C stops an answer, Ctrl-D ends the chat.
    A model without a chat template continues the text it is given.

    The daemon must run: `omg serve -d` starts it.
    """
    settings = load_settings()
    options = _chat_options(given)
    with connect(settings) as client:
        _talk(
            client,
            Catalogue(settings).model(model),
            " ".join(prompt),
            options,
            given,
            settings.home,
        )


@click.command("run")
@click.argument("reference", metavar="MODEL")
@click.argument("prompt", nargs=-1)
@_options
def run(reference: str, prompt: tuple[str, ...], **given: Any) -> None:
    """Chat with a model; pull it first if it is missing.

    MODEL is an installed name or anything that `omg pull` takes; the rest is as in `omg chat`.
    """
    settings = load_settings()
    options = _chat_options(given)
    with connect(settings) as client:
        model = _installed(Catalogue(settings), reference)
        _talk(client, model, " ".join(prompt), options, given, settings.home)


def _installed(catalogue: Catalogue, reference: str) -> ModelInfo:
    """The model that `reference` names, pulled if it is missing."""
    try:
        ref = ModelRef.parse(reference)
    except InvalidName as invalid:
        try:
            return catalogue.model(reference)  # a name that --name gave it
        except ModelNotFound as missing:
            near = [
                *missing.details.get("suggestions", ()),
                *invalid.details.get("suggestions", ()),
            ]
            raise ModelNotFound(
                f"{reference} is neither an installed model nor a reference that can be pulled",
                suggestions=list(dict.fromkeys(near)),
            ) from missing
    if ref.provider == "hub":
        try:
            return catalogue.model(reference)
        except (ModelNotFound, InvalidName) as missing:
            near = [str(name) for name in missing.details.get("suggestions") or ()]
            hint = f" (did you mean {near[0]}?)" if near else ""
            note(f"{reference} is not installed{hint}; pulling it")
    return catalogue.model(pull_model(catalogue, reference))


def _chat_options(given: dict[str, Any]) -> ChatOptions:
    """Options of the answer, checked before anything else happens."""
    names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop")
    options = ChatOptions(**{name: given[name] for name in names})
    SamplingParams(**{name: given[name] for name in names if given[name] is not None})
    return options


def _talk(
    client: Client,
    model: ModelInfo,
    prompt: str,
    options: ChatOptions,
    given: dict[str, Any],
    home: Path,
) -> None:
    if model.embeds:
        raise InvalidRequest(
            f"{model.name} is an embedding model: it makes vectors of texts and cannot chat; "
            "/v1/embeddings and /api/embed of the daemon use it"
        )
    system = _text(given["system"] or "", "--system")
    if system and not model.has_template:
        raise InvalidRequest(
            f"{model.name} has no chat template, so it only continues text: leave --system out"
        )
    piped = None if _is_tty(sys.stdin) else _read_stdin()
    if piped is None and not prompt and _is_tty(sys.stdout):
        history = None if given["no_history"] else home / HISTORY_FILE
        editor = LineEditor(history, list(COMMANDS))
        try:
            Conversation(client, model, options, system, verbose=given["verbose"]).loop(editor)
        finally:
            editor.close()
        return
    if piped is None and not prompt:
        note("type the prompt, and end it with Ctrl-D")
        piped = _read_stdin()
    text = "\n\n".join(part for part in (piped, _text(prompt, "the prompt")) if part)
    if not text.strip():
        raise InvalidRequest("there is nothing to ask: give a prompt, or text on standard input")
    messages = [Message("system", system)] if system else []
    messages.append(Message("user", text))
    answer = print_answer(ask(client, model, messages, options))
    explain_end(answer)
    if given["verbose"]:
        note(answer.summary())
    if answer.interrupted:
        click.get_current_context().exit(INTERRUPTED)


def _is_tty(stream: Any) -> bool:
    return stream is not None and bool(stream.isatty())


def _read_stdin() -> str | None:
    """All of standard input without the line ends after it; None when there is none."""
    if sys.stdin is None:
        return None
    hint = threading.Timer(_SILENT_INPUT_S, note, ["waiting for the end of standard input"])
    hint.daemon = True
    hint.start()
    try:
        data = sys.stdin.buffer.read()
    finally:
        hint.cancel()
    try:
        # like $(…) of the shell: the line end that `echo` adds is not part of the question
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"standard input is not UTF-8 text (byte {error.start} is not part of any character)"
        ) from error


def _text(text: str, what: str) -> str:
    """The text itself. Raises InvalidRequest when it holds bytes that were no characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} is not UTF-8 text") from error
    return text
