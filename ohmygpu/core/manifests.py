"""The manifests: one JSON file per installed model, `<provider>/<org>/<name>/<variant>.json`.

All parts of the path are lower case; a name without an org has `_` in its place. Reading takes no
lock and needs no writable disk; one damaged manifest never hides the others.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import Conflict, CorruptFile, InvalidName, ModelNotFound
from .records import Artifact, InstallRecord
from .refs import ModelRef, check_name, expand_short_name, normalise_name

NO_ORG = "_"
PROVIDERS = ("hub", "file", "pypi")
MAX_MANIFEST_BYTES = 16 * 1024 * 1024

_HEX64 = re.compile(r"[0-9a-f]{64}")
_VARIANT = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")
_log = logging.getLogger(__name__)
_reported: set[tuple[Path, str]] = set()


@dataclass(frozen=True, slots=True)
class DamagedManifest:
    """A manifest that cannot be read: where it is, the model its path names, and why."""

    path: Path
    provider: str
    name: str  # lower case: only the path is left to tell it
    variant: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scan:
    """All manifests: the records in the order of their names, and what could not be read."""

    records: tuple[InstallRecord, ...]
    damaged: tuple[DamagedManifest, ...]


def manifest_path(folder: Path, record: InstallRecord) -> Path:
    """Where `record` is stored below `folder`. Raises InvalidName when its name cannot be one."""
    org, _, name = check_name(record.name).lower().rpartition("/")
    if record.provider not in PROVIDERS or not _VARIANT.fullmatch(record.variant):
        raise InvalidName(f"{record.full_name!r} cannot be the name of an installed model")
    return folder / record.provider / (org or NO_ORG) / name / f"{record.variant}.json"


def scan(folder: Path) -> Scan:
    """Read all manifests below `folder`. Exactly one record of each name is its default."""
    records: list[InstallRecord] = []
    damaged: list[DamagedManifest] = []
    for path in sorted(folder.glob("*/*/*/*.json")):
        if path.name.startswith("."):
            continue
        try:
            records.append(_read(folder, path))
        except FileNotFoundError:
            continue  # removed since it was listed
        except (CorruptFile, OSError) as error:
            provider, org, name = path.relative_to(folder).parts[:3]
            full = name if org == NO_ORG else f"{org}/{name}"
            damaged.append(DamagedManifest(path, provider, full, path.stem, str(error)))
            if (path, str(error)) not in _reported:  # look-ups are frequent: say it once
                _reported.add((path, str(error)))
                _log.warning("the manifest %s is damaged: %s", path, error)
    return Scan(_with_one_default(records), tuple(damaged))


def find(found: Scan, text: str) -> InstallRecord:
    """The installed model that `text` names, in any of the ways a name can be written.

    Raises InvalidName when it cannot be a name, CorruptFile when its manifest is damaged,
    ModelNotFound, with suggestions, when it is not installed.
    """
    invalid: InvalidName | None = None
    wanted: list[tuple[str, str | None, str | None]] = []
    try:
        wanted.append((*normalise_name(text), None))
    except InvalidName as error:
        invalid = error
    reference: ModelRef | None = None
    try:
        reference = expand_short_name(text.strip()) or ModelRef.parse(text)
    except InvalidName:
        if invalid is not None:
            raise invalid from None
    if reference is not None and reference.provider == "hub":
        variant = reference.variant.lower() if reference.variant else None
        wanted.append((reference.key, variant, reference.revision))
    for name, variant, revision in wanted:
        named = [record for record in found.records if record.name.lower() == name]
        if match := _choose(named, variant, revision):
            return match
        for entry in found.damaged:
            if entry.name == name and variant in (None, entry.variant):
                raise CorruptFile(
                    f"the record of {entry.name}:{entry.variant} is damaged ({entry.reason}); pull "
                    "the model again, or remove it with omg model rm"
                )
    if reference is not None and reference.provider != "hub":
        same = [record for record in found.records if source_of(record) == reference.source]
        variant = reference.variant.lower() if reference.variant else None
        if match := _choose(same, variant, reference.revision):
            return match
    raise _not_found(found.records, text.strip())


def salvage(found: Scan, text: str) -> InstallRecord:
    """A stand-in for the damaged record that `text` names, made of its path alone, to remove it.

    Raises ModelNotFound when `text` names none.
    """
    name, variant = normalise_name(text)
    for entry in found.damaged:
        if entry.name == name and variant in (None, entry.variant) and entry.provider in PROVIDERS:
            return InstallRecord(
                provider=entry.provider,
                name=entry.name,
                variant=entry.variant,
                is_default=True,
                source_ref="",
                revision=None,
                artifacts=(),
                compiled_key="",
                recipe="",
                family="",
                compiled_bytes=0,
                installed_at="",
            )
    raise _not_found(found.records, text)


def check_free(found: Scan, record: InstallRecord) -> None:
    """Raise Conflict when another model already has the name that `record` wants."""
    for other in found.records:
        if other.name.lower() != record.name.lower():
            continue
        same_variant = other.variant == record.variant
        if other.provider == record.provider and not same_variant:
            continue  # another variant of the same model
        if other.provider == record.provider and source_of(other) == source_of(record):
            continue  # a newer pull of the same source
        if other.provider == record.provider and other.artifacts == record.artifacts:
            continue  # the same bytes from another place
        raise Conflict(
            f"the name {record.name} is taken by {other.full_name} (from {other.source_ref}); "
            f"install under another name with --name, or remove that one first: "
            f"omg model rm {other.full_name}",
            name=record.name,
            taken_by=other.source_ref,
        )


def encode(record: InstallRecord) -> bytes:
    """The manifest's content."""
    return (json.dumps(record.to_dict(), indent=1, sort_keys=True) + "\n").encode("utf-8")


def siblings(found: Scan, record: InstallRecord) -> list[InstallRecord]:
    """The other variants of the same name and provider, most recently installed first."""
    others = [
        other
        for other in found.records
        if other.provider == record.provider
        and other.name.lower() == record.name.lower()
        and other.variant != record.variant
    ]
    return sorted(others, key=lambda other: (other.installed_at, other.variant), reverse=True)


def _read(folder: Path, path: Path) -> InstallRecord:
    """The record at `path`. Raises CorruptFile when it is damaged or in another one's place."""
    if path.exists() and not path.is_file():
        raise CorruptFile("it is not a file")
    with path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise CorruptFile("it is far too large")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptFile("it is not valid JSON" if data else "it is empty") from error
    if not isinstance(content, dict):
        raise CorruptFile("it is not a JSON object")
    record = InstallRecord.from_dict(content)
    _check_types(record)
    try:
        expected = manifest_path(folder, record)
    except InvalidName as error:
        raise CorruptFile(str(error)) from error
    if expected != path:
        raise CorruptFile(f"it describes {record.full_name}, whose place is elsewhere")
    return record


def _check_types(record: InstallRecord) -> None:
    texts = ("provider", "name", "variant", "source_ref", "recipe", "family", "installed_at")
    for field in texts:
        if not isinstance(getattr(record, field), str):
            raise CorruptFile(f"{field} is not text")
    if not isinstance(record.is_default, bool) or not isinstance(record.compiled_bytes, int):
        raise CorruptFile("is_default or compiled_bytes has the wrong type")
    check_hex(record.compiled_key)
    for artifact in record.artifacts:
        _check_artifact(artifact)


def _check_artifact(artifact: Artifact) -> None:
    if not isinstance(artifact.filename, str) or not isinstance(artifact.format, str):
        raise CorruptFile("an artifact's name or format is not text")
    if not isinstance(artifact.size, int) or artifact.size < 0:
        raise CorruptFile("an artifact's size is not a number of bytes")
    check_hex(artifact.sha256)


def check_hex(digest: str) -> str:
    """`digest` itself when it is 64 lower-case hex digits; raises CorruptFile otherwise."""
    if not isinstance(digest, str) or not _HEX64.fullmatch(digest):
        raise CorruptFile("a digest is not 64 hex digits")
    return digest


def _with_one_default(records: Iterable[InstallRecord]) -> tuple[InstallRecord, ...]:
    """`records` with one default per name, whatever a kill between two writes left."""
    groups: dict[tuple[str, str], list[InstallRecord]] = {}
    for record in records:
        groups.setdefault((record.name.lower(), record.provider), []).append(record)
    result: list[InstallRecord] = []
    for _, group in sorted(groups.items()):
        marked = [record for record in group if record.is_default] or group
        default = max(marked, key=lambda record: (record.installed_at, record.variant))
        result += [
            record
            if record.is_default == (record is default)
            else replace(record, is_default=record is default)
            for record in group
        ]
    return tuple(result)


def _choose(
    records: list[InstallRecord], variant: str | None, revision: str | None
) -> InstallRecord | None:
    for record in sorted(records, key=lambda record: not record.is_default):
        if variant is None and not record.is_default and revision is None:
            continue
        if variant is not None and record.variant != variant:
            continue
        if revision is None or _is_revision(record, revision):
            return record
    return None


def _is_revision(record: InstallRecord, revision: str) -> bool:
    if record.revision is None:
        return False
    is_commit = len(revision) >= 7 and record.revision.resolved_commit.startswith(revision)
    return is_commit or record.revision.branch == revision


def source_of(record: InstallRecord) -> str:
    """Where a record's bytes come from: `ModelRef.source` of what it was pulled by."""
    found = source_of_reference(record.source_ref)
    adapter = record.adapter
    return found if adapter is None else f"{found} with {source_of_reference(adapter.source_ref)}"


def source_of_reference(text: str) -> str:
    """`ModelRef.source` of a reference, or the text itself when it is none."""
    try:
        return ModelRef.parse(text).source
    except InvalidName:
        return text


def _not_found(records: tuple[InstallRecord, ...], text: str) -> ModelNotFound:
    wanted = text.lower().removesuffix(":latest")
    names: dict[str, str] = {}
    for record in records:
        for shown in (record.name, record.full_name):
            names.setdefault(shown.lower(), shown)
            names.setdefault(shown.lower().rpartition("/")[2], shown)
    base = wanted.partition(":")[0]
    near = [record.full_name for record in records if record.name.lower() == base]
    near += [names[key] for key in difflib.get_close_matches(wanted[:200], names, n=3, cutoff=0.6)]
    near = list(dict.fromkeys(near))[:3]
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"omg model list shows what is, omg model pull {text} installs it"
    )
    return ModelNotFound(f'model "{text}" is not installed; {hint}', name=text, suggestions=near)
