"""Real GGUF files: tool-call prompts and tokens as transformers makes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from ohmygpu.convert.gguf import GgufModel
from ohmygpu.convert.tokenizer_gguf import read_gguf_tokenizer
from ohmygpu.runtime_onnx.template import ChatTemplate
from tests.convert.hard_text import HARD_TEXTS
from tests.runtime_onnx.tool_talks import TALKS, TOOLS, as_request

pytestmark = pytest.mark.reference

CONTROL, USER_DEFINED = 3, 4
Reference = Any  # transformers' tokenizers have no types


def smollm(metadata: dict[str, Any]) -> Reference:
    """SmolLM2's tokenizer.json, written by hand: single digits, then GPT-2's words."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=_vocab(tokens), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def qwen2(metadata: dict[str, Any]) -> Reference:
    """The tokenizer class of Qwen2's authors."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    return Qwen2Tokenizer(vocab=_vocab(tokens), merges=merges)


REFERENCES = {"smollm": smollm, "qwen2": qwen2}


def _vocab(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def reference(metadata: dict[str, Any]) -> Reference:
    """The tokenizer by transformers, with the file's special tokens and template."""
    tokenizer = REFERENCES[metadata["tokenizer.ggml.pre"]](metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    names = {"bos_token": "bos", "eos_token": "eos"}
    ends = {key: tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}
    tokenizer.add_special_tokens(ends)
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED) and not token.startswith("[PAD")
    ]
    tokenizer.add_tokens(added)
    tokenizer.chat_template = metadata["tokenizer.chat_template"]
    return tokenizer


def real_files() -> list[Path]:
    """GGUF files in the folder of test models whose tokenizer transformers has a class for."""
    folder = Path(os.environ["OHMYGPU_TEST_MODELS"])
    return sorted(folder.rglob("*.gguf"))


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> list[tuple[str, dict[str, Any], Any]]:
    """Name, metadata and our parts of each real file; SmolLM2 is always among them."""
    found = []
    for path in {smollm2_gguf, *real_files()}:
        model = GgufModel({path.name: path})
        if model.metadata.get("tokenizer.ggml.pre") in REFERENCES:
            parts = read_gguf_tokenizer(model, len(model.metadata["tokenizer.ggml.tokens"]))
            found.append((path.name, dict(model.metadata), parts))
        model.close()
    return found


def test_tool_call_prompts_and_their_tokens_are_those_of_transformers(
    real: list[tuple[str, dict[str, Any], Any]],
) -> None:
    for name, metadata, parts in real:
        theirs = reference(metadata)
        template = ChatTemplate(
            parts.template, {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
        )
        for talk, messages in TALKS.items():
            if "tool_calls" not in parts.template and talk in ("called", "answered"):
                continue  # written for no tools at all: it would join None to text
            for tools in (None, TOOLS):
                expected = theirs.apply_chat_template(
                    as_request(messages), tools=tools, tokenize=False, add_generation_prompt=True
                )
                assert template.render(messages, tools) == expected, (name, talk)
                found = parts.tokenizer.encode(expected, add_special_tokens=False).ids
                assert found == theirs(expected, add_special_tokens=False)["input_ids"], name


def test_the_hard_text_is_cut_as_transformers_cuts_it(
    real: list[tuple[str, dict[str, Any], Any]],
) -> None:
    for name, metadata, parts in real:
        theirs = reference(metadata)
        for text in HARD_TEXTS:
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            found = parts.tokenizer.encode(text, add_special_tokens=False).ids
            assert found == expected, (name, text)
