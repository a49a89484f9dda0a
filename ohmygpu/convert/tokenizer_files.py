"""The tokenizer of a Hugging Face repository, and its settings.

tokenizer.json where there is one; else what the model's first tokenizer read: tokenizer.model,
vocab.json with merges.txt, vocab.txt or tekken.json.

Follows transformers where files disagree: `tokenizer_config.json` over `special_tokens_map.json`
over `config.json`; an explicit `add_bos_token` or `add_eos_token` over tokenizer.json's own
post-processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .safetensors import read_json_object
from .tokenizer import TokenizerParts, sampling_defaults, set_bos_eos
from .tokenizer_templates import repository_templates

_TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_SENTENCEPIECE = "tokenizer.model"
_TEKKEN = "tekken.json"


def read_tokenizer_files(files: Mapping[str, Path], config: dict[str, Any]) -> TokenizerParts:
    """The tokenizer, its template and its ids. Raises CorruptFile or UnsupportedModel."""
    settings = _optional(files, _SETTINGS)
    generation = _optional(files, "generation_config.json")
    special = _optional(files, "special_tokens_map.json") | settings
    vocab_size = _vocab_size(config)
    tokenizer, taken_for_granted = _read_tokenizer(files, settings, config, vocab_size)
    settings = taken_for_granted | settings
    special = taken_for_granted | special
    _add_missing_tokens(tokenizer, _listed_tokens(files, settings), vocab_size)
    bos = _special_id(tokenizer, "bos", special, config, generation)
    eos = _special_id(tokenizer, "eos", special, config, generation)
    _mark_special(tokenizer, special, [bos, eos])
    if isinstance(settings.get("add_bos_token"), bool) or isinstance(
        settings.get("add_eos_token"), bool
    ):
        set_bos_eos(
            tokenizer,
            _pair(tokenizer, bos) if settings.get("add_bos_token") else None,
            _pair(tokenizer, eos) if settings.get("add_eos_token") else None,
        )
    elif settings.get("cls_token") and "vocab.txt" in files and _TOKENIZER not in files:
        ends = (_special_id(tokenizer, kind, special, {}, {}) for kind in ("cls", "sep"))
        set_bos_eos(tokenizer, *(_pair(tokenizer, number) for number in ends))
    sampling: dict[str, float] = {}
    if generation.get("do_sample") is not False:  # False asks for greedy: nothing to sample by
        sampling = sampling_defaults(generation, "generation_config.json")
    template, tool_template = repository_templates(files, settings)
    return TokenizerParts(
        tokenizer=tokenizer,
        bos_token_id=bos,
        eos_token_id=eos,
        more_eos_token_ids=[*_ids(generation, "eos_token_id"), *_ids(config, "eos_token_id")],
        template=template,
        tool_template=tool_template,
        generation=sampling,
    )


def _read_tokenizer(
    files: Mapping[str, Path],
    settings: dict[str, Any],
    config: dict[str, Any],
    vocab_size: int | None,
) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and the settings its kind takes for granted."""
    if _TOKENIZER in files:
        return _read_tokenizer_json(files[_TOKENIZER], vocab_size), {}
    if _SENTENCEPIECE in files:
        from .tokenizer_sentencepiece import read_sentencepiece

        tokenizer = read_sentencepiece(files[_SENTENCEPIECE], settings)
        return tokenizer, {"add_bos_token": True, "add_eos_token": False}
    if "vocab.json" in files and "merges.txt" in files:
        from .tokenizer_bpe import read_vocab_merges

        return read_vocab_merges(files, config), {}
    if "vocab.txt" in files:
        from .tokenizer_wordpiece import read_vocab_txt

        return read_vocab_txt(files["vocab.txt"], settings), {
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
        }
    if _TEKKEN in files:
        from .tokenizer_bpe import read_tekken

        return read_tekken(files[_TEKKEN])
    raise UnsupportedModel(
        "none of tokenizer.json, tokenizer.model, vocab.json with merges.txt, vocab.txt and "
        "tekken.json is there, so text cannot become tokens; look for a repository of this model "
        "that has one"
    )


def _optional(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return read_json_object(name, files[name]) if name in files else {}


def _vocab_size(config: dict[str, Any]) -> int | None:
    value = config.get("vocab_size")
    return value if isinstance(value, int) and value > 0 else None


def _read_tokenizer_json(path: Path, vocab_size: int | None) -> Tokenizer:
    data = read_json_object(_TOKENIZER, path)
    added = data.get("added_tokens")
    if vocab_size is not None and isinstance(added, list):
        # A token without an embedding, which some fine-tunes leave behind, can only crash the
        # model: its text is ordinary text.
        data["added_tokens"] = [
            token
            for token in added
            if not (isinstance(token, dict) and _number(token.get("id")) >= vocab_size)
        ]
    try:
        return Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises plain Exception
        raise CorruptFile(
            f"{_TOKENIZER} cannot be read ({str(error)[:200]}); pull the model again"
        ) from error


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _listed_tokens(
    files: Mapping[str, Path], settings: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """id → token settings, of tokens listed beside the tokenizer itself."""
    listed: dict[int, dict[str, Any]] = {}
    for content, number in _optional(files, "added_tokens.json").items():
        if isinstance(number, int):
            listed[number] = {"content": content}
    decoder = settings.get("added_tokens_decoder")
    for key, token in (decoder if isinstance(decoder, dict) else {}).items():
        if not key.isdigit() or not isinstance(token, dict):
            raise CorruptFile(f"{_SETTINGS} has a damaged added_tokens_decoder; pull it again")
        listed[int(key)] = token
    return listed


def _add_missing_tokens(
    tokenizer: Tokenizer, listed: dict[int, dict[str, Any]], vocab_size: int | None
) -> None:
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in sorted(listed.items()):
        content = token.get("content")
        if not isinstance(content, str) or not content or content in present:
            continue
        if vocab_size is not None and number >= vocab_size:
            continue  # no embedding, see above
        special = token.get("special", True) is True
        entry = AddedToken(
            content,
            special=special,
            single_word=token.get("single_word") is True,
            lstrip=token.get("lstrip") is True,
            rstrip=token.get("rstrip") is True,
            normalized=token.get("normalized", not special) is True,
        )
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([entry])
        if tokenizer.token_to_id(content) != number:
            raise CorruptFile(
                f"the added token {content[:80]!r} should be number {number} and would be "
                f"{tokenizer.token_to_id(content)}; pull the model again"
            )


def _mark_special(tokenizer: Tokenizer, special: dict[str, Any], ids: Sequence[int | None]) -> None:
    """Make the tokens that settings name whole and special, where the tokenizer has them."""
    named = [value for key, value in special.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = special.get(key)
        named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    texts = [token.get("content") if isinstance(token, dict) else token for token in named]
    texts += [tokenizer.id_to_token(number) for number in ids if number is not None]
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = {
        text: AddedToken(text, normalized=False)
        for text in texts
        if isinstance(text, str) and text not in present and tokenizer.token_to_id(text) is not None
    }
    tokenizer.add_special_tokens(list(missing.values()))


def _special_id(
    tokenizer: Tokenizer,
    kind: str,
    special: dict[str, Any],
    config: dict[str, Any],
    generation: dict[str, Any],
) -> int | None:
    """Id of the BOS or EOS token, None when the model has none."""
    key = f"{kind}_token"
    if key in special:
        token = special[key]
        if isinstance(token, dict):
            token = token.get("content")
        if token is None or token == "":
            return None
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            raise CorruptFile(
                f"the {key} {str(token)[:80]!r} is not in the tokenizer; pull the model again"
            )
        return number
    for source in (config, generation):
        for number in _ids(source, f"{kind}_token_id"):
            if tokenizer.id_to_token(number) is not None:
                return number
    return None


def _ids(source: dict[str, Any], key: str) -> list[int]:
    value = source.get(key)
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]


def _pair(tokenizer: Tokenizer, number: int | None) -> tuple[str, int] | None:
    token = None if number is None else tokenizer.id_to_token(number)
    return None if number is None or token is None else (token, number)
