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

    `tool_text` is the template for conversations with tools, where that is another one. Never
    raises on a bad template: it says so, with InvalidRequest, at the first rendering.
    """

    def __init__(self, text: str, tokens: Mapping[str, str], tool_text: str = "") -> None:
        self._environment = SandboxEnvironment()
        self._tokens = dict(tokens)
        self._lock = threading.Lock()  # the budget is the environment's
        self._template = self._compile(text)
        self._tool_template = self._compile(tool_text) if tool_text else self._template

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation up to where the assistant speaks (add_generation_prompt).

        `tools` are functions the model may call, each as the OpenAI API describes it; `variables`
        are more of the template's own (enable_thinking, reasoning_effort, documents, …), made of
        JSON's types. Raises InvalidRequest with the template's own words when it refuses the
        messages.
        """
        template = self._template if tools is None else self._tool_template
        if isinstance(template, str):
            raise InvalidRequest(
                f"the model's chat template is not valid ({template}); send a prompt instead",
                param="messages",
            )
        known: dict[str, Any] = {
            "messages": [_as_variable(message) for message in messages],
            "tools": None if tools is None else [_plain(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": True,
            **self._tokens,
            **_plain(variables),
        }
        with self._lock:
            self._environment.start()
            try:
                return self._environment.joined(template.generate(known))
            except RecursionError:
                reason = "it calls itself without end"
            except Exception as error:  # noqa: BLE001  a template can fail in any way Python can
                reason = _reason(error)
        raise InvalidRequest(
            f"the model's chat template refuses these messages: {reason}", param="messages"
        )

    def _compile(self, text: str) -> jinja2.Template | str:
        """The template, or what is wrong with it."""
        try:
            return self._environment.from_string(text)
        except (jinja2.TemplateError, RecursionError, ValueError, OverflowError) as error:
            return _reason(error)

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


def _as_variable(message: Message) -> dict[str, Any]:
    variable: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        # a call without words has no content in the OpenAI API; templates ask for `none`
        variable["content"] = message.content or None
        variable["tool_calls"] = [_plain(call) for call in message.tool_calls]
    if message.name is not None:
        variable["name"] = message.name
    if message.tool_call_id is not None:
        variable["tool_call_id"] = message.tool_call_id
    if message.reasoning is not None:  # templates know it under either name
        variable["reasoning_content"] = variable["thinking"] = message.reasoning
    return variable


def _plain(value: Any) -> Any:
    """`value` of JSON's types alone: a template may call the methods of whatever it sees."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise TypeError(f"a chat template cannot be given a {type(value).__name__}")


def _reason(error: BaseException) -> str:
    """The template's or jinja2's message on one line, no addresses of objects."""
    own = isinstance(error, jinja2.TemplateError)
    text = str(error) if own else f"{type(error).__name__}: {error}"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(text.split()))
    return text[:1000] or type(error).__name__
