"""A conversation at the terminal, line by line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from ohmygpu.client import ChatOptions, Client, ModelInfo
from ohmygpu.core.errors import ContextLengthExceeded, InvalidRequest, OhMyGPUError
from ohmygpu.runtime_api import Message, SamplingParams
from ohmygpu.tui.line_editor import QUOTES, LineEditor

from .answer import Answer, ask, explain_end, print_answer
from .errors import explain
from .output import note

COMMANDS = {
    "/help": "show this",
    "/clear": "forget the conversation; the system message stays",
    "/system": "TEXT sets the system message; alone it shows it; /system none removes it",
    "/set": "NAME VALUE sets temperature, top_p, top_k, min_p, max_tokens, seed or stop; alone it"
    " shows them; /set NAME none leaves it to the model",
    "/show": "what model this is",
    "/bye": "end the chat (also Ctrl-D, /exit, /quit)",
}
_ALIASES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye", "/info": "/show"}
_PARSERS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "seed": int,
    "stop": lambda text: (text,),
}
_UNSET = ("none", "default", "off")
_HINT = "(Ctrl-C stops an answer; Ctrl-D or /bye ends the chat)"


class Conversation:
    """The messages so far, and what to do with each line typed."""

    def __init__(
        self,
        client: Client,
        model: ModelInfo,
        options: ChatOptions,
        system: str = "",
        *,
        verbose: bool = False,
    ) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._system = system
        self._verbose = verbose
        self.turns: list[Message] = []  # user and assistant, in turn

    def loop(self, editor: LineEditor) -> None:
        """Read and answer until the user ends the chat."""
        note(f"{self._model.name}: type a message; /help lists what else you can do")
        if not self._model.has_template:
            note("it has no chat template: it continues each text you type, and remembers none")
        while True:
            try:
                text = editor.read()
                if not self.handle(text):
                    return
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:
                note(f"\n{_HINT}")

    def handle(self, text: str) -> bool:
        """Obey a command or answer a message; False ends the chat."""
        if not text.strip():
            return True
        if not text.startswith("/"):
            self.ask(text)
            return True
        word, _, rest = text.strip().partition(" ")
        word = _ALIASES.get(word.lower(), word.lower())
        if word == "/bye":
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/clear": self._clear,
            "/system": self._set_system,
            "/set": self._set,
            "/show": self._show,
        }
        if word in actions:
            actions[word](rest.strip())
        else:
            near = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
            note(f"{word} is not a command; {hint} (start with a space to send it as a message)")
        return True

    def ask(self, text: str) -> None:
        """Send a message and print the answer; errors end the answer, not the chat."""
        if not self._model.has_template:
            self.turns.clear()
        self.turns.append(Message("user", text))
        try:
            answer = self._answer()
        except OhMyGPUError as error:
            self.turns.pop()
            note(f"Error: {explain(error)}")
            return
        if answer.interrupted:
            note("(stopped)" if answer.text else "(stopped before the answer began)")
        if not answer.text:  # templates want user and assistant in turn
            self.turns.pop()
            return
        self.turns.append(Message("assistant", answer.text))
        explain_end(answer)
        if self._verbose:
            note(answer.summary())

    def _answer(self) -> Answer:
        """Ask with the whole conversation, or with its newest part that fits the context."""
        turns = list(self.turns)
        while True:
            try:
                answer = self._print(turns)
            except ContextLengthExceeded:
                if len(turns) < 3:
                    raise
                del turns[:2]  # the oldest message and its answer
                continue
            dropped = len(self.turns) - len(turns)
            if dropped:
                self.turns = turns
                note(f"(the context is full: the oldest {dropped} messages are forgotten)")
            return answer

    def _print(self, turns: list[Message]) -> Answer:
        system = [Message("system", self._system)] if self._system else []
        pieces = ask(self._client, self._model, system + turns, self._options)
        return print_answer(pieces, show_waiting=True)

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        for name, meaning in COMMANDS.items():
            note(f"{name:<{width}}  {meaning}")
        note(f"{QUOTES:<{width}}  begins and ends a message of several lines")
        note("Ctrl-C stops the answer; the arrow keys edit and recall lines")

    def _clear(self, _: str) -> None:
        self.turns.clear()
        note("(the conversation is forgotten)")

    def _set_system(self, text: str) -> None:
        if not self._model.has_template:
            note("a model without a chat template takes no system message")
            return
        if text:
            self._system = "" if text in _UNSET else text
        note(f"system: {self._system or '(none)'}")

    def _set(self, text: str) -> None:
        name, _, value = text.removeprefix("parameter ").strip().partition(" ")
        if name == "system":
            self._set_system(value.strip())
            return
        if not name or not value.strip():
            for field in _PARSERS if not name else [name]:
                note(f"{field}: {self._shown(field)}")
            return
        if name not in _PARSERS:
            near = difflib.get_close_matches(name, _PARSERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_PARSERS)}"
            note(f"{name} cannot be set; {hint}")
            return
        try:
            self._options = dataclasses.replace(
                self._options, **{name: _parse(name, value.strip())}
            )
        except InvalidRequest as error:
            note(f"Error: {error.message}")
            return
        note(f"{name}: {self._shown(name)}")

    def _shown(self, name: str) -> str:
        value = getattr(self._options, name, None)
        return "(the model's default)" if value in (None, ()) else str(value)

    def _show(self, _: str) -> None:
        model = self._model
        note(f"{model.name}: recipe {model.record.recipe}, from {model.record.source_ref}")
        note(f"{model.quantization}, context {model.context_tokens} tokens")


def _parse(name: str, text: str) -> Any:
    """The value of an option. Raises InvalidRequest when it is none."""
    if text.lower() in _UNSET:
        return () if name == "stop" else None
    try:
        value = _PARSERS[name](text)
    except ValueError as error:
        raise InvalidRequest(f"{name} must be a number, not {text!r}", param=name) from error
    SamplingParams(**{name: value})  # checks the range
    return value
