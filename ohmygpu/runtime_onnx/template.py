"""Chat templates, rendered as transformers' `apply_chat_template` renders them.

A chat template is a program that came with the model, so it runs in a sandbox and on a budget
(sandbox.py). One that overspends is refused like one that fails.

Texts of messages are data to the template, but special tokens written in them become special tokens
when the prompt is tokenised, as in transformers: the tokenizer cannot tell who wrote them.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ohmygpu.core.errors import InvalidRequest
from ohmygpu.runtime_api import Message

from .sandbox import SandboxEnvironment

_MARK = "omgcontinues"  # stands for an assistant's reply; no template changes such a word


class ChatTemplate:
    """A model's compiled chat template; thread-safe. `tokens` are variables such as bos_token.

    Never raises on a bad template: it says so, with InvalidRequest, at the first rendering.
    """

    def __init__(self, text: str, tokens: Mapping[str, str]) -> None:
        self._environment = SandboxEnvironment()
        self._tokens = dict(tokens)
        self._lock = threading.Lock()  # the budget is the environment's
        self._template: jinja2.Template | None = None
        self._error = ""
        try:
            self._template = self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
            self._error = _reason(error)

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant speaks (add_generation_prompt).

        Raises InvalidRequest with the template's own words when it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest(
                f"the model's chat template is not valid ({self._error}); send a prompt instead",
                param="messages",
            )
        variables: dict[str, Any] = {
            "messages": [_as_variable(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
        }
        with self._lock:
            self._environment.start()
            try:
                return self._environment.joined(self._template.generate(variables))
            except RecursionError:
                reason = "it calls itself without end"
            except Exception as error:  # noqa: BLE001  a template can fail in any way Python can
                reason = _reason(error)
        raise InvalidRequest(
            f"the model's chat template refuses these messages: {reason}", param="messages"
        )

    def render_continuation(self, messages: Sequence[Message]) -> str:
        """What follows an assistant's reply in a longer conversation: its end, then `messages`.

        The template is asked for a conversation with a marked reply, and what it writes after the
        mark is the answer; so neither the model's default system message nor BOS appear again.
        """
        mark = _MARK
        while any(mark in message.content for message in messages):
            mark += "x"
        _, found, rest = self.render(
            [Message("user", "x"), Message("assistant", mark), *messages]
        ).rpartition(mark)
        if not found:
            raise InvalidRequest(
                "the model's chat template leaves earlier replies out, so it cannot continue from "
                "context; send the conversation as messages",
                param="context",
            )
        return rest


def _as_variable(message: Message) -> dict[str, str]:
    variable = {"role": message.role, "content": message.content}
    if message.name is not None:
        variable["name"] = message.name
    if message.tool_call_id is not None:
        variable["tool_call_id"] = message.tool_call_id
    if message.reasoning is not None:  # templates know it under either name
        variable["reasoning_content"] = variable["thinking"] = message.reasoning
    return variable


def _reason(error: BaseException) -> str:
    """The template's or jinja2's message on one line, no addresses of objects."""
    own = isinstance(error, jinja2.TemplateError)
    text = str(error) if own else f"{type(error).__name__}: {error}"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(text.split()))
    return text[:1000] or type(error).__name__
