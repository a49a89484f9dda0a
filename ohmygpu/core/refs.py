"""Model names: what a user may type, and what it means.

The grammar (spaces around it are ignored; everything is ASCII except paths):

    reference  = hub | short | file | pypi
    hub        = [prefix] org "/" name ["@" revision] [":" variant]
    prefix     = "hf.co/" | "huggingface.co/" | "hf://" | "hf:"   with or without "https://"
    short      = a word of SHORT_NAMES [":" variant]              smollm2, llama3.2:1b, smollm2:q4
    file       = "./…" | "../…" | "/…" | "~/…" | "." | ".." | "~"    a GGUF file or a model's folder
               | "file:" path | anything that ends in ".gguf"
    pypi       = "pypi:" package [("@" | "==") version] [":" variant]

    org, name  = letters, digits, "-", "_" and "."; at most 96 characters; no ".." and no "--";
                 ends in neither "-" nor "."
    revision   = a branch, tag or commit: letters, digits, ".", "_", "+", "-", and "/" between them
    variant    = letters, digits, "-", "_" and "."; ":latest" is the same as no variant

Pages of a model that people paste from the browser are hub references too:
`https://huggingface.co/org/name/tree/<revision>`, and `…/blob/<revision>/<file>` or
`…/resolve/<revision>/<file>`, where a GGUF file also chooses the variant.

What a variant means is the provider's business: for a SafeTensors repository a recipe (`:q4`),
for a GGUF repository one of its files (`:Q4_K_M`). Paths are taken literally: they have no
revision and no variant. Names compare without regard to case; their case is kept for show.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import InvalidName

MAX_REFERENCE_CHARACTERS = 1024
MAX_PATH_CHARACTERS = 4096
MAX_SEGMENT_CHARACTERS = 96
LATEST = "latest"

SHORT_NAMES: dict[str, str] = {
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2:135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2:360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2:1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm": "HuggingFaceTB/SmolLM-135M-Instruct",
    "smollm:135m": "HuggingFaceTB/SmolLM-135M-Instruct",
    "smollm:360m": "HuggingFaceTB/SmolLM-360M-Instruct",
    "smollm:1.7b": "HuggingFaceTB/SmolLM-1.7B-Instruct",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "tinyllama:1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "llama3.2": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.2:1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2:3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3.1": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1:8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3:8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama2": "meta-llama/Llama-2-7b-chat-hf",
    "llama2:7b": "meta-llama/Llama-2-7b-chat-hf",
    "codellama": "codellama/CodeLlama-7b-Instruct-hf",
    "codellama:7b": "codellama/CodeLlama-7b-Instruct-hf",
    "falcon3": "tiiuae/Falcon3-7B-Instruct",
    "falcon3:1b": "tiiuae/Falcon3-1B-Instruct",
    "falcon3:3b": "tiiuae/Falcon3-3B-Instruct",
    "falcon3:7b": "tiiuae/Falcon3-7B-Instruct",
    "deepseek-r1:8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "all-minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "all-minilm:22m": "sentence-transformers/all-MiniLM-L6-v2",
    "all-minilm:33m": "sentence-transformers/all-MiniLM-L12-v2",
    "mxbai-embed-large": "mixedbread-ai/mxbai-embed-large-v1",
    "qwen3-embedding:0.6b": "Qwen/Qwen3-Embedding-0.6B",
    "qwen3-embedding:4b": "Qwen/Qwen3-Embedding-4B",
    "qwen3-embedding:8b": "Qwen/Qwen3-Embedding-8B",
}
"""Short name → hub reference, for models of the architectures we convert."""

_ORG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9._+/-]+")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_HUB_PREFIX = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://|hf:", re.IGNORECASE
)
_PATH_START = re.compile(r"\.{0,2}[/\\]|~|file:|[A-Za-z]:[/\\]|\.{1,2}\Z")
_NOT_MODELS = ("datasets", "spaces", "collections", "papers", "docs", "blog", "models", "api")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\Z")
_QUANT = re.compile(
    r"(?:UD-)?(?:I?Q|TQ)[1-8](?:_[0-9A-Z]{1,3}){0,4}|BF16|FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Where a model comes from.

    `repo` is `org/name` for the provider hub, an absolute path for file, a normalised package name
    for pypi.
    """

    provider: str  # hub | file | pypi
    repo: str
    kind: str = "llm"
    variant: str | None = None
    revision: str | None = None

    @staticmethod
    def parse(text: str) -> ModelRef:
        """Reference from what a user typed (grammar: module docstring). Raises InvalidName.

        A relative path is resolved against the working directory at once, so the reference means
        the same in another process.
        """
        text = _clean(text)
        if match := _HUB_PREFIX.match(text):
            return _parse_hub_page(text, text[match.end() :])
        if text[:5].lower() == "pypi:":
            return _parse_pypi(text, text[5:])
        if "://" in text and not text.lower().startswith("file:"):
            raise InvalidName(
                f"{_show(text)} is not a page we can pull from: give a huggingface.co address, "
                "org/name, a file or a folder",
                name=text,
            )
        if _PATH_START.match(text) or text.lower().endswith(".gguf"):
            return ModelRef("file", _absolute(text))
        if expanded := expand_short_name(text):
            return expanded
        return _parse_hub(text, text)

    @property
    def name(self) -> str:
        """The name it is installed under unless the user or the provider chooses another."""
        if self.provider == "file":
            path = Path(self.repo)
            is_gguf = path.suffix.lower() == ".gguf"
            return name_from_stem(path.stem if is_gguf else path.name)
        return self.repo

    @property
    def key(self) -> str:
        """`name` as compared: lower case."""
        return self.name.lower()

    @property
    def source(self) -> str:
        """Where the bytes come from, without revision and variant: equal for the same source."""
        return self.repo if self.provider == "file" else f"{self.provider}:{self.repo.lower()}"

    @property
    def display(self) -> str:
        """Canonical text; `ModelRef.parse(ref.display) == ref`."""
        prefix = {"hub": "", "pypi": "pypi:", "file": "file:"}[self.provider]
        if self.provider == "hub" and self.repo.lower().endswith(".gguf"):
            prefix = "hf.co/"
        if self.provider == "file" and _PATH_START.match(self.repo):
            prefix = ""
        revision = f"@{self.revision}" if self.revision else ""
        variant = f":{self.variant}" if self.variant else ""
        return f"{prefix}{self.repo}{revision}{variant}"

    def __str__(self) -> str:
        return self.display


def normalise_name(text: str) -> tuple[str, str | None]:
    """Installed name as looked up: (lower-case name, lower-case variant or None for the default).

    `Org/Name:latest` → `("org/name", None)`; the prefixes of the hub are dropped. Raises
    InvalidName on what cannot be the name of an installed model.
    """
    text = _clean(text)
    if match := _HUB_PREFIX.match(text):
        text = text[match.end() :]
    name, _, variant = text.partition(":")
    name = name.strip("/") if name.strip("/") else name
    check_name(name)
    variant_or_none = _variant(text, variant)
    return name.lower(), variant_or_none.lower() if variant_or_none else None


def check_name(name: str) -> str:
    """`name` itself when a model can be installed under it: `name` or `org/name`. InvalidName."""
    parts = name.split("/")
    if len(parts) > 2:
        raise InvalidName(f"{_show(name)} has too many slashes; write name or org/name", name=name)
    if len(parts) == 2:
        _check_segment(name, parts[0], _ORG)
        if _HUB_PREFIX.match(name):
            raise InvalidName(f"{_show(name)} lacks a part; write org/name", name=name)
    _check_segment(name, parts[-1], _SEGMENT)
    return name


def name_from_stem(stem: str) -> str:
    """A valid name from a file's or folder's own: every run of other characters becomes one `-`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[: MAX_SEGMENT_CHARACTERS * 2]
    name = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", name)).strip("-.")
    name = name[:MAX_SEGMENT_CHARACTERS].rstrip("-.")
    return name if _SEGMENT.fullmatch(name) else "model"


def quant_label(filename: str) -> str | None:
    """The quantisation a GGUF file's name tells, as written there; None when it tells none.

    `SmolLM2-135M-Instruct.Q4_1.gguf` → `Q4_1`; `x-UD-Q4_K_XL-00001-of-00002.gguf` → `UD-Q4_K_XL`.
    """
    stem = filename.rsplit("/", 1)[-1][:MAX_PATH_CHARACTERS]
    stem = _SHARD.sub("", re.sub(r"\.gguf\Z", "", stem, flags=re.IGNORECASE))
    label = None
    for match in _QUANT.finditer(stem):
        before, after = stem[: match.start()][-1:], stem[match.end() :][:1]
        if before in ("", ".", "-", "_") and after in ("", ".", "-", "_"):
            label = match.group()
    return label


def expand_short_name(text: str) -> ModelRef | None:
    """The reference a short name stands for, or None: `smollm2`, `smollm2:360m`, `smollm2:q4`."""
    parts = text.lower().split(":")
    for size in (2, 1):
        target = SHORT_NAMES.get(":".join(parts[:size]))
        if target is not None and len(parts) >= size and len(parts) <= size + 1:
            variant = _variant(text, text.split(":")[size]) if len(parts) > size else None
            return ModelRef("hub", target, variant=variant)
    return None


def _clean(text: str) -> str:
    text = text.strip(" \t\r\n")
    if not text:
        raise InvalidName("the model's name is empty; write org/name, a path or a short name")
    is_path = _PATH_START.match(text) is not None
    limit = MAX_PATH_CHARACTERS if is_path else MAX_REFERENCE_CHARACTERS
    if len(text) > limit:
        raise InvalidName(f"the model's name has {len(text)} characters; {limit} is the most")
    if _CONTROL.search(text) or not (is_path or text.isprintable()):
        raise InvalidName(f"{_show(text)} contains control characters or other invisible ones")
    return text


def _show(text: str) -> str:
    """`text` in quotes, safe for one line of a terminal or a log, at most 80 characters of it."""
    shown = "".join(char if char.isprintable() else "?" for char in text[:80])
    return f'"{shown}…"' if len(text) > 80 else f'"{shown}"'


def _absolute(text: str) -> str:
    if text.lower().startswith("file:"):
        text = text[5:]
        if text.startswith("//"):
            text = unquote(text[2:].removeprefix("localhost"))
            if not text.startswith("/") or "\0" in text:
                raise InvalidName("a file address needs an absolute path: file:///folder/file.gguf")
    if not text:
        raise InvalidName("the path is empty; write file:/folder/file.gguf or ./file.gguf")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # "~someone" without such a user
        raise InvalidName(f"{_show(text)}: no such home folder; write the full path") from error
    # Not resolve(): a link's own name says more than that of the blob it points to.
    return os.path.normpath(path.absolute())


def _parse_hub_page(text: str, rest: str) -> ModelRef:
    """Reference from what follows the hub's address: `org/name…`, or a page of the model."""
    page = urlsplit("//hub/" + rest)
    path = page.path.strip("/")
    parts = path.split("/")
    if parts[0].lower() in _NOT_MODELS:
        raise InvalidName(
            f"{_show(text)} is not a model's page; open the model's own page, it is "
            "huggingface.co/org/name",
            name=text,
        )
    if len(parts) < 4 or parts[2] not in ("tree", "blob", "resolve", "raw", "commit"):
        return _parse_hub(text, path)
    ref = _parse_hub(text, "/".join(parts[:2]))
    # A branch's slashes come percent-encoded in a page's address, except in refs/pr/N.
    length = 6 if parts[3:5] == ["refs", "pr"] else 4
    revision = unquote("/".join(parts[3:length]))
    filename = unquote(parts[-1]) if len(parts) > length else ""
    variant = None
    if parts[2] != "tree" and filename.lower().endswith(".gguf"):
        variant = quant_label(filename) or filename[: -len(".gguf")]
    return ModelRef(
        "hub",
        ref.repo,
        variant=_variant(text, variant or ""),
        revision=_revision(text, revision) if revision != "main" else None,
    )


def _parse_hub(text: str, rest: str) -> ModelRef:
    """Reference from `org/name[@revision][:variant]`, also with the two suffixes swapped."""
    head, _, tail = rest.partition("@")
    repo, _, variant = head.partition(":")
    revision, _, late_variant = tail.partition(":")
    if (variant and late_variant) or ("@" in rest and not revision):
        raise InvalidName(f"{_show(text)}: write org/name@revision:variant", name=text)
    repo = repo.rstrip("/")
    if "/" not in repo and rest != text:
        raise InvalidName(f"{_show(text)} lacks a part; write hf.co/org/name", name=text)
    if "/" not in repo:
        raise _unknown_short_name(text, repo)
    if repo.count("/") > 1:
        raise InvalidName(
            f"{_show(text)} has too many slashes; a model is org/name, a path starts with ./ or /",
            name=text,
        )
    return ModelRef(
        "hub",
        check_name(repo),
        variant=_variant(text, variant or late_variant),
        revision=_revision(text, revision) if revision else None,
    )


def _parse_pypi(text: str, rest: str) -> ModelRef:
    head, separator, tail = rest.replace("==", "@", 1).partition("@")
    package, _, variant = head.partition(":")
    version, _, late_variant = tail.partition(":")
    too_long = len(package) > MAX_SEGMENT_CHARACTERS
    if too_long or not _PACKAGE.fullmatch(package) or bool(separator) != bool(version):
        raise InvalidName(f"{_show(text)}: write pypi:package or pypi:package@version", name=text)
    return ModelRef(
        "pypi",
        re.sub(r"[-_.]+", "-", package).lower(),  # the normal form of the packaging standards
        variant=_variant(text, variant or late_variant),
        revision=_revision(text, version) if version else None,
    )


def _check_segment(name: str, segment: str, pattern: re.Pattern[str]) -> None:
    if not segment:
        raise InvalidName(f"{_show(name)} lacks a part; write org/name", name=name)
    if len(segment) > MAX_SEGMENT_CHARACTERS:
        raise InvalidName(
            f"{_show(name)}: each part of a name has at most {MAX_SEGMENT_CHARACTERS} characters",
            name=name,
        )
    if not pattern.fullmatch(segment) or ".." in segment or "--" in segment or segment[-1] in "-.":
        raise InvalidName(
            f"{_show(name)} is not a model's name: each part has letters, digits, '-', '_' and "
            "'.', starts with a letter or digit, and has no '..' or '--'",
            name=name,
        )


def _variant(text: str, variant: str) -> str | None:
    if not variant or variant.lower() == LATEST:
        if text.endswith(":"):
            raise InvalidName(f"{_show(text)}: the variant after ':' is missing", name=text)
        return None
    too_long = len(variant) > MAX_SEGMENT_CHARACTERS
    if too_long or not _VARIANT.fullmatch(variant) or ".." in variant:
        raise InvalidName(
            f"{_show(text)}: a variant has letters, digits, '-', '_' and '.', like :q4 or :Q4_K_M",
            name=text,
        )
    return variant


def _revision(text: str, revision: str) -> str:
    parts = revision.split("/")
    if (
        len(revision) > 255
        or not _REVISION.fullmatch(revision)
        or any(part in ("", ".", "..") for part in parts)
        or ".." in revision
        or revision.startswith("-")
    ):
        raise InvalidName(
            f"{_show(text)}: a revision is a branch, tag or commit, like @main or @v1.0", name=text
        )
    return revision


def _unknown_short_name(text: str, name: str) -> InvalidName:
    near = difflib.get_close_matches(name.lower()[:96], SHORT_NAMES, n=3, cutoff=0.6)
    known = ", ".join(sorted({short.partition(":")[0] for short in SHORT_NAMES}))
    hint = f"write org/name as on huggingface.co, a path (./file.gguf), or one of {known}"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    return InvalidName(
        f"{_show(text)} is not a short name we know; {hint}",
        name=text,
        suggestions=near,
    )
