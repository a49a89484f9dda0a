"""Byte-level BPE as a `tokenizers` tokenizer: from a vocabulary and merges, or from ranks.

GPT-2's repositories have `vocab.json` and `merges.txt`; Mistral's newer ones have `tekken.json`,
which ranks tokens and leaves the merges to be worked out. Neither says everything: how vocab.json
cuts text depends on the model it belongs to.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .safetensors import read_json_object
from .tokenizer_pre import PRE_TOKENIZERS, PreTokenizer, split_steps

Merges = list[tuple[str, str]]

# model_type → the pre-tokenizer of repositories that have vocab.json and merges.txt alone
_BY_MODEL_TYPE = {
    "codegen": "gpt-2",
    "gpt2": "gpt-2",
    "gpt_bigcode": "starcoder",
    "gpt_neo": "gpt-2",
    "gpt_neox": "gpt-neox",
    "gptj": "gpt-2",
    "opt": "gpt-2",
    "phi": "phi-2",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2",
    "qwen3": "qwen2",
    "qwen3_moe": "qwen2",
    "smollm3": "llama-bpe",
    "starcoder2": "starcoder",
}
_TEKKEN_SPECIAL = 1000  # tokens before the ranked ones, where the file does not say


def build_byte_level(vocab: Mapping[str, int], merges: Merges, pre: PreTokenizer) -> Tokenizer:
    """A byte-level BPE tokenizer; raises ValueError when the merges do not fit the vocabulary."""
    try:
        model = models.BPE(vocab=dict(vocab), merges=merges, ignore_merges=pre.whole_words)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(str(error)[:120]) from error
    tokenizer = Tokenizer(model)
    if pre.unicode_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre.steps())
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_vocab_merges(files: Mapping[str, Path], config: dict[str, Any]) -> Tokenizer:
    """The tokenizer of `vocab.json` and `merges.txt`. Raises CorruptFile or UnsupportedModel."""
    model_type = str(config.get("model_type"))
    if model_type not in _BY_MODEL_TYPE:
        raise UnsupportedModel(
            f"vocab.json and merges.txt do not say how a {model_type[:40]!r} model cuts text; look "
            "for a repository of this model that has a tokenizer.json"
        )
    vocab = read_json_object("vocab.json", files["vocab.json"])
    if not all(type(number) is int for number in vocab.values()):
        raise CorruptFile("vocab.json is not a list of tokens and numbers; pull the model again")
    try:
        return build_byte_level(
            vocab, _read_merges(files["merges.txt"]), PRE_TOKENIZERS[_BY_MODEL_TYPE[model_type]]
        )
    except ValueError as error:
        raise CorruptFile(
            f"merges.txt does not fit vocab.json ({error}); pull the model again"
        ) from error


def read_tekken(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a `tekken.json`, and its settings as tokenizer_config.json has them.

    Raises CorruptFile.
    """
    data = read_json_object(path.name, path)
    try:
        config, ranked = data["config"], data["vocab"]
        pattern = config["pattern"]
        count = config.get("default_num_special_tokens", _TEKKEN_SPECIAL)
        tokens = [
            base64.b64decode(entry["token_bytes"])
            for entry in ranked[: config["default_vocab_size"] - count]
        ]
        special = _tekken_special(data.get("special_tokens"), count)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise CorruptFile(
            f"{path.name} is not a Tekken vocabulary; pull the model again"
        ) from error
    names = [_characters(token) for token in tokens]
    vocab = {name: count + rank for rank, name in enumerate(names)}
    vocab |= {name: number for number, name in enumerate(special)}
    if len(vocab) != len(names) + len(special):
        raise CorruptFile(f"{path.name} has the same token twice; pull the model again")
    pre = PreTokenizer(split_steps(pattern), whole_words=True)
    try:
        Regex(pattern)
        tokenizer = build_byte_level(vocab, merges_of_ranks(names), pre)
    except Exception as error:  # the library raises plain Exception for a bad pattern
        raise CorruptFile(f"{path.name} cannot be used ({error}); pull the model again") from error
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    return tokenizer, settings


def merges_of_ranks(names: Sequence[str]) -> Merges:
    """Every way to make a token of two others, best rank first: the same joins as by rank."""
    ranks = {name: rank for rank, name in enumerate(names)}
    merges: Merges = []
    for name in names:
        ways = [
            (ranks[name[:cut]], ranks[name[cut:]], name[:cut], name[cut:])
            for cut in range(1, len(name))
            if name[:cut] in ranks and name[cut:] in ranks
        ]
        merges += [(left, right) for _, _, left, right in sorted(ways)]
    return merges


def _read_merges(path: Path) -> Merges:
    """Pairs of `merges.txt`, one a line; the first line may be a `#version`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile("merges.txt cannot be read; pull the model again") from error
    merges: Merges = []
    for number, line in enumerate(lines):
        pair = line.rstrip("\r")
        if not pair or (number == 0 and pair.startswith("#version")):
            continue
        left, _, right = pair.partition(" ")
        if not left or not right or " " in right:
            raise CorruptFile(f"merges.txt holds {pair[:40]!r}, not a pair; pull the model again")
        merges.append((left, right))
    return merges


def _tekken_special(listed: Any, count: int) -> list[str]:
    """Names of the first `count` tokens; those the file does not list are numbered."""
    names = [f"<SPECIAL_{number}>" for number in range(count)]
    if listed is None:  # the first files: the list was in the code that read them
        names[: len(_FIRST_SPECIAL)] = _FIRST_SPECIAL
    for entry in listed or []:
        names[entry["rank"]] = entry["token_str"]
    return names


# fmt: off
_FIRST_SPECIAL = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]",
    "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
]
# fmt: on


def _characters(token: bytes) -> str:
    """A token in GPT-2's alphabet, where each byte is a printable character."""
    return "".join(map(_ALPHABET.__getitem__, token))


def _byte_alphabet() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_ALPHABET = _byte_alphabet()
