"""Which files of a folder of model files are needed, wherever the folder is.

The same rules for a hub repository, a folder on disk and a folder inside a package: weights as
SafeTensors (one file, or an index with its shards) or as GGUF (one quantisation, perhaps sharded),
with the config and the tokenizer. Pickled weights are never chosen: loading them runs code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from .errors import CorruptFile, InvalidRequest, ModelNotFound, UnsupportedModel
from .refs import name_from_stem, quant_label
from .sentence_files import LENGTH_FILE, MODULES_FILE, PROMPTS_FILE, sentence_files

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 32 << 20

_CONFIG_FILES = (CONFIG_FILE, "generation_config.json")
_SENTENCE_FILES = (MODULES_FILE, LENGTH_FILE, PROMPTS_FILE)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)
# Only of use where there is no tokenizer.json, which holds all of them.
_SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?:gguf|safetensors)\Z")
_NOT_A_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
# Small and good first, then what costs more memory, then what costs more accuracy.
# fmt: off
_PREFERRED = (
    "Q4_K_M", "Q4_0", "Q4_1", "Q8_0", "Q4_K_S", "Q5_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q6_K",
    "Q4_K", "Q5_K", "Q3_K_M", "Q3_K_L", "Q3_K_S", "IQ4_NL", "IQ4_XS", "F16", "BF16", "F32", "Q2_K",
)
# fmt: on

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)

Read = Callable[[str, int], bytes]
"""(filename, most bytes) → the file's content; raises CorruptFile when it is longer."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The files to use. The fields mean what they mean in `provider.Resolved`."""

    filenames: tuple[str, ...]
    source_format: str  # safetensors | gguf
    variant: str | None
    default_variant: str | None
    config: dict[str, Any] | None


Select = Callable[[Collection[str], str | None, Read, str], Selection]
"""`select_files`, or another choice with the same arguments."""


def check_filename(name: str) -> str:
    """`name` itself when it is a plain relative path with `/`; raises CorruptFile otherwise."""
    if escapes(name) or "\\" in name or len(name) > 512 or not name.isprintable():
        raise CorruptFile(f"the model lists a file with the unsafe name {name[:80]!r}; refused")
    return name


def escapes(name: str) -> bool:
    """Whether `name` could lead out of the folder it is joined to, on any system."""
    parts = re.split(r"[/\\]", name)
    return not name or ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in name


def artifact_format(name: str) -> str:
    """safetensors, gguf, config, tokenizer or other, from a file's name."""
    base = name.rsplit("/", 1)[-1]
    for suffix in ("safetensors", "gguf"):
        if base.lower().endswith("." + suffix):
            return suffix
    if base in _TOKENIZER_FILES or base in _SLOW_TOKENIZER_FILES or base.endswith(".jinja"):
        return "tokenizer"
    is_config = base in (*_CONFIG_FILES, *_SENTENCE_FILES, INDEX_FILE)
    return "config" if is_config else "other"


def select_files(names: Collection[str], variant: str | None, read: Read, where: str) -> Selection:
    """The files needed from a folder with `names`.

    `variant` chooses a GGUF quantisation, else it is a recipe for SafeTensors and passed on.
    `where` names the folder in messages. Raises UnsupportedModel when there is nothing to
    convert, CorruptFile when what is there contradicts itself, ModelNotFound for a variant that
    does not exist, InvalidRequest when there are several models to choose from.
    """
    for name in names:
        if escapes(name):
            raise CorruptFile(f"{where} lists a file with the unsafe name {name[:80]!r}; refused")
    ggufs = _gguf_variants(names)
    weights = _safetensors_weights(names, read, where)
    if ggufs and (not weights or (variant and _matches(ggufs, variant))):
        return _select_gguf(ggufs, variant, where)
    if not weights:
        raise _nothing_to_convert(names, read, where)
    if CONFIG_FILE not in names:
        raise UnsupportedModel(
            f"{where} has SafeTensors weights but no {CONFIG_FILE}, so its architecture is unknown"
        )
    config = parse_json_object(read(CONFIG_FILE, MAX_CONFIG_BYTES), CONFIG_FILE, where)
    chosen = [name for name in (*_CONFIG_FILES, *_TOKENIZER_FILES) if name in names]
    if "tokenizer.json" not in names:
        chosen += [name for name in _SLOW_TOKENIZER_FILES if name in names]
    chosen += sentence_files(names, read, where)
    return Selection(
        filenames=tuple(map(check_filename, (*chosen, *weights))),
        source_format="safetensors",
        variant=variant.lower() if variant else None,
        default_variant=None,
        config=config,
    )


def check_tokenizer(names: Collection[str], where: str) -> None:
    """Raise UnsupportedModel unless `names` has a tokenizer that can be read."""
    alone = {"tokenizer.json", "tokenizer.model", "vocab.txt", "tekken.json"}
    if not alone.intersection(names) and not {"vocab.json", "merges.txt"}.issubset(names):
        raise UnsupportedModel(
            f"{where} has no tokenizer.json, tokenizer.model, vocab.json with merges.txt, "
            "vocab.txt or tekken.json, so text cannot become tokens; look for a repository of this "
            "model that has one"
        )


def parse_json_object(data: bytes, name: str, where: str) -> dict[str, Any]:
    """`data` as a JSON object; raises CorruptFile naming the file otherwise."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{name} of {where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{name} of {where} is not a JSON object")
    return value


def _safetensors_weights(names: Collection[str], read: Read, where: str) -> list[str]:
    """The index and its shards, or the one file; empty when there are none."""
    if INDEX_FILE in names:
        return [INDEX_FILE, *_indexed_shards(names, read, where)]
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    found = sorted(
        name
        for name in names
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("adapter_")
    )
    shards = [name for name in found if _SHARD.fullmatch(name)]
    if shards:
        _check_complete(shards, where)
        return shards
    return found if len(found) == 1 else []


def _indexed_shards(names: Collection[str], read: Read, where: str) -> list[str]:
    index = parse_json_object(read(INDEX_FILE, MAX_INDEX_BYTES), INDEX_FILE, where)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{INDEX_FILE} of {where} has no weight_map")
    shards = set()
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CorruptFile(f"{INDEX_FILE} of {where} names no file for {tensor[:80]!r}")
        shards.add(shard)
    for shard in sorted(shards):
        check_filename(shard)
        if not shard.endswith(".safetensors"):
            raise UnsupportedModel(
                f"{INDEX_FILE} of {where} names {shard!r}, which is not a SafeTensors file"
            )
        if "/" in shard:
            raise CorruptFile(
                f"{INDEX_FILE} of {where} names {shard!r}, which is not a file beside it"
            )
        if shard not in names:
            raise CorruptFile(f"{INDEX_FILE} of {where} names {shard!r}, which does not exist")
    return sorted(shards)


def _check_complete(shards: Collection[str], where: str) -> None:
    """Raise CorruptFile unless `shards` are all the parts of one file."""
    matches = [match for name in shards if (match := _SHARD.fullmatch(name))]
    counts = {int(match["count"]) for match in matches}
    numbers = sorted(int(match["number"]) for match in matches)
    if len(counts) != 1 or len({match["stem"] for match in matches}) != 1:
        raise CorruptFile(f"{where} mixes the shards of different files")
    missing = sorted(set(range(1, counts.pop() + 1)) - set(numbers))
    if missing:
        raise CorruptFile(f"{where} lacks part {missing[0]} of {matches[0]['stem']}")


def parts_of(name: str, names: Callable[[], Collection[str]], where: str) -> list[str]:
    """The file `name`, or all parts of the split file it is a part of, from the folder's `names`.

    Raises CorruptFile, naming it, for a part that is not among them.
    """
    part = _SHARD.fullmatch(name)
    if part is None:
        return [name]
    matches = (_SHARD.fullmatch(other) for other in sorted(names()))
    same = [m for m in matches if m and (m["stem"], m["count"]) == (part["stem"], part["count"])]
    parts = [m.string for m in same if m.string.endswith(name.rpartition(".")[2])]
    _check_complete(parts, where)
    return parts


def _gguf_variants(names: Collection[str]) -> dict[str, list[str]]:
    """File stem (without folder and shard number) → its file or its shards, in order."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        base = name.rsplit("/", 1)[-1]
        if not base.lower().endswith(".gguf") or _NOT_A_MODEL.search(base):
            continue
        shard = _SHARD.fullmatch(name)
        found.setdefault(shard["stem"] if shard else name[: -len(".gguf")], []).append(name)
    return found


def _label(stem: str) -> str | None:
    """The quantisation a stem tells, in its file's name or else in its folder's."""
    folder, _, base = stem.rpartition("/")
    return quant_label(base) or (quant_label(folder) if folder else None)


def _matches(ggufs: dict[str, list[str]], variant: str) -> list[str]:
    """Stems that `variant` means: a label, a label without its maker's prefix, or a file's name."""
    wanted = variant.lower().removesuffix(".gguf")
    labels = {stem: (_label(stem) or "").lower() for stem in ggufs}
    exact = [stem for stem, label in labels.items() if label == wanted]
    prefixed = [stem for stem, label in labels.items() if label == f"ud-{wanted}"]
    named = [stem for stem in ggufs if wanted in (stem.lower(), stem.lower().rsplit("/", 1)[-1])]
    return exact or prefixed or named


def _select_gguf(ggufs: dict[str, list[str]], variant: str | None, where: str) -> Selection:
    default = _default_stem(ggufs)
    choices = [_label(stem) or stem for stem in ggufs]
    if variant is None:
        if default is None:
            raise InvalidRequest(
                f"{where} has several models: {_listing(choices)}; choose one, as in "
                f"name:{choices[0].rsplit('/', 1)[-1]}",
                param="model",
                variants=choices[:50],
            )
        chosen = default
    else:
        matches = _matches(ggufs, variant)
        if not matches:
            raise ModelNotFound(
                f"{where} has no variant {variant!r}; it has {_listing(choices)}",
                name=variant,
                suggestions=choices[:50],
            )
        if len(matches) > 1:
            files = [stem.rsplit("/", 1)[-1] for stem in matches]
            raise InvalidRequest(
                f"{where} has several files for {variant!r}: {_listing(files)}; choose one by its "
                f"name, as in name:{files[0]}",
                param="model",
                variants=files[:50],
            )
        chosen = matches[0]
    files_of = ggufs[chosen]
    if _SHARD.fullmatch(files_of[0]):
        _check_complete(files_of, where)
    return Selection(
        filenames=tuple(map(check_filename, files_of)),
        source_format="gguf",
        variant=_variant_name(ggufs, chosen),
        default_variant=_variant_name(ggufs, default) if default else None,
        config=None,
    )


def _variant_name(ggufs: dict[str, list[str]], stem: str) -> str | None:
    """The variant to install `stem` as: its label, or its name where others share the label."""
    label = _label(stem)
    if label is not None and sum(_label(other) == label for other in ggufs) > 1:
        return name_from_stem(stem.rsplit("/", 1)[-1]).lower()
    return label.lower() if label else None


def _default_stem(ggufs: dict[str, list[str]]) -> str | None:
    """The stem the bare name means; None when the files are different models."""
    if len(ggufs) == 1:
        return next(iter(ggufs))
    by_label: dict[str, list[str]] = {}
    for stem in ggufs:
        by_label.setdefault((_label(stem) or "").upper(), []).append(stem)
    for label in (*_PREFERRED, *(f"UD-{label}" for label in _PREFERRED)):
        stems = by_label.get(label, [])
        if len(stems) == 1:
            return stems[0]
        if stems:
            return None
    unlabelled = by_label.get("", [])
    if len(unlabelled) > 1:
        return None
    return unlabelled[0] if unlabelled else sorted(ggufs)[0]


def _listing(choices: list[str]) -> str:
    shown = ", ".join(sorted(choices)[:20])
    return shown + (f" and {len(choices) - 20} more" if len(choices) > 20 else "")


def _nothing_to_convert(names: Collection[str], read: Read, where: str) -> UnsupportedModel:
    if any(name.startswith("adapter_") for name in names):
        base = "BASE"
        if ADAPTER_CONFIG in names:
            data = read(ADAPTER_CONFIG, MAX_CONFIG_BYTES)
            config = parse_json_object(data, ADAPTER_CONFIG, where)
            named = str(config.get("base_model_name_or_path") or "")
            base = named if _REPOSITORY.fullmatch(named) else base
        return UnsupportedModel(
            f"{where} is an adapter (LoRA), not a whole model; pull it with the model it was made "
            f"for: omg model pull {base} --adapter {where}"
        )
    if "model_index.json" in names:
        return UnsupportedModel(f"{where} is an image or video pipeline, not a language model")
    pickles = sorted(name for name in names if name.lower().endswith(PICKLE_SUFFIXES))
    if pickles:
        return UnsupportedModel(
            f"{where} has its weights only as {pickles[0]!r}, a format that can run code when it "
            "is loaded; look for a repository with SafeTensors or GGUF weights"
        )
    return UnsupportedModel(
        f"{where} has no SafeTensors or GGUF weights; there is nothing to convert"
    )
