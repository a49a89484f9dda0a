"""Text ↔ token ids, and chat messages → prompt, from the files beside a compiled graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ohmygpu.core.errors import ContextLengthExceeded, CorruptFile, InvalidRequest
from ohmygpu.core.records import (
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TOOL_TEMPLATE_FILE,
    CompiledModel,
)
from ohmygpu.runtime_api import Message

from .template import ChatTemplate

_HUGE_CHARACTERS = 200_000  # from here on a prompt is tried in parts first
_CUT_TOKENS = 64  # more than cutting a text can add


class Tokenizer:
    """The compiled model's tokenizer and chat template; thread-safe.

    `special_ids` are the tokens that are not text (chat markers, end of sequence). Raises
    CorruptFile when `folder` holds no valid tokenizer.
    """

    def __init__(self, folder: Path, compiled: CompiledModel) -> None:
        path = folder / TOKENIZER_FILE
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            text, tool_text = (
                template.read_text(encoding="utf-8") if template.exists() else ""
                for template in (folder / TEMPLATE_FILE, folder / TOOL_TEMPLATE_FILE)
            )
        except Exception as error:  # the tokenizers library raises plain Exception
            raise CorruptFile(
                f"the tokenizer in {folder.name} is damaged ({error}); remove the model with "
                "omg model rm, then pull the model again"
            ) from error
        # some files ask for batches of one length, which would cut or pad a prompt
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = compiled.vocab_size
        self._context_tokens = compiled.context_length
        self.eos_token_ids = compiled.eos_token_ids
        self.special_ids = frozenset(self.eos_token_ids) | {
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self._to_bytes = _byte_rule(self._tokenizer)
        self._bytes: dict[int, bytes] = {}
        self.has_template = bool(text.strip())
        self._bos_token = compiled.bos_token
        self._bos_token_id = compiled.bos_token_id
        tokens = {"bos_token": compiled.bos_token, "eos_token": compiled.eos_token}
        # an absent token stays undefined, as in transformers: templates ask `is defined`
        self._template = ChatTemplate(
            text, {name: token for name, token in tokens.items() if token}, tool_text
        )

    # --- text → tokens ---

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; `add_special` adds what the model wants around plain text (BOS).

        Special tokens written in the text become special tokens; a BOS that the text already begins
        with is not added twice. Raises InvalidRequest when the text is not valid Unicode, and
        ContextLengthExceeded when it is both huge and certain not to fit the model's context.
        """
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise InvalidRequest(
                    f"the text has half a surrogate pair at character {error.start}; send whole "
                    "characters",
                    param="prompt",
                ) from error
        if len(text) > _HUGE_CHARACTERS:
            self._refuse_overlong(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        if add_special and self._bos_token and text.startswith(self._bos_token):
            twice = [self._bos_token_id, self._bos_token_id]
            return ids[1:] if ids[:2] == twice else ids
        return ids

    def _refuse_overlong(self, text: str) -> None:
        """Raise ContextLengthExceeded if a part of the text alone exceeds the model's context.

        Tokenising a body of the largest size takes minutes; parts that grow eightfold find out in a
        time that depends on the context alone. Cutting a text adds a token or two at the cut.
        """
        characters = 8 * self._context_tokens
        while characters < len(text):
            part = self._tokenizer.encode(text[:characters], add_special_tokens=False)
            count = len(part.ids) - _CUT_TOKENS
            if count > self._context_tokens:
                raise ContextLengthExceeded(
                    f"the prompt has more than {count} tokens and the context holds "
                    f"{self._context_tokens}; shorten the prompt",
                    prompt_tokens=count,
                    context_tokens=self._context_tokens,
                )
            characters *= 8

    def encode_prompt(self, prompt: str, context_tokens: Sequence[int] = ()) -> list[int]:
        """Prompt of plain text, as it stands; after `context_tokens` it gets no BOS."""
        if not context_tokens:
            return self.encode(prompt)
        return [*self._checked(context_tokens), *self.encode(prompt, add_special=False)]

    def encode_chat(
        self, messages: Sequence[Message], context_tokens: Sequence[int] = ()
    ) -> list[int]:
        """Prompt of a conversation, up to where the assistant speaks.

        With `context_tokens` (prompt and completion of an earlier reply, with or without its
        end-of-sequence token) the messages continue that conversation: the result begins with these
        tokens. Raises InvalidRequest when there is no chat template or it refuses the messages.
        """
        if not self.has_template:
            raise InvalidRequest(
                "the model has no chat template, so it cannot chat; send a prompt instead",
                param="messages",
            )
        if not context_tokens:
            return self.encode(self.render(messages), add_special=False)
        context = self._checked(context_tokens)
        if context[-1] in self.eos_token_ids:
            context.pop()  # the template writes the end of the reply itself
        follow = self._template.render_continuation(messages)
        return context + self.encode(follow, add_special=False)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model's template writes it (see ChatTemplate.render)."""
        return self._template.render(messages, tools, **variables)

    def _checked(self, context_tokens: Sequence[int]) -> list[int]:
        for token_id in context_tokens:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"context holds token {token_id}; this model has the tokens 0 to "
                    f"{self.vocab_size - 1}",
                    param="context",
                )
        return list(context_tokens)

    # --- tokens → text ---

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, the special ones left out."""
        text: str = self._tokenizer.decode(
            [token_id for token_id in token_ids if token_id not in self.special_ids]
        )
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes a token stands for inside a text; none for special and unknown tokens.

        Only where `has_bytes`: other decoders need to see neighbouring tokens.
        """
        data = self._bytes.get(token_id)
        if data is None:
            token = None if token_id in self.special_ids else self._tokenizer.id_to_token(token_id)
            data = b"" if token is None or self._to_bytes is None else self._to_bytes(token)
            self._bytes[token_id] = data
        return data

    @property
    def has_bytes(self) -> bool:
        """Whether every token stands for the same bytes wherever it is (`token_bytes`)."""
        return self._to_bytes is not None


def _byte_rule(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes] | None:
    """How this tokenizer's decoder turns one token into bytes; None if it looks at several."""
    if tokenizer.decoder is None:
        return None
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _byte_level
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if steps[:3] == [space, {"type": "ByteFallback"}, {"type": "Fuse"}] and all(
        # strips the first space of a text; a reply never is the first of its text
        step["type"] == "Strip" and step["stop"] == 0
        for step in steps[3:]
    ):
        return _byte_fallback
    return None


def _byte_level(token: str) -> bytes:
    """Bytes of a token in GPT-2's alphabet, where each character is a byte; else its UTF-8."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _byte_fallback(token: str) -> bytes:
    """Bytes of a SentencePiece token: `▁` is a space, `<0x0A>` one byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character of each byte, inverted: printable Latin-1 is itself, others follow 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()
