"""Installed models whose graph is a few bytes: enough for whatever only lists and describes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ohmygpu.client import ModelInfo
from ohmygpu.core.records import (
    GRAPH_FILE,
    TEMPLATE_FILE,
    Artifact,
    CompiledModel,
    InstallRecord,
    Revision,
)
from ohmygpu.core.repository import Repository

COMPILED = CompiledModel(
    family="llama",
    converter_version=1,
    recipe="q8",
    target="cpu",
    context_length=2048,
    vocab_size=49152,
    layers=30,
    kv_heads=3,
    head_dim=64,
    kv_dtype="float32",
    parameters=134_515_008,
    weights_bytes=5,
    source_format="safetensors",
    quantization="q8",
    hidden_size=576,
    heads=9,
    feed_forward_length=1536,
    rope_theta=10000.0,
    norm_epsilon=1e-5,
    bos_token_id=1,
    eos_token_ids=(2,),
    license="apache-2.0",
    files={GRAPH_FILE: 5},
)


def install_fake(
    home: Path, name: str = "org/tiny", *, has_template: bool = True, **changes: Any
) -> ModelInfo:
    """Put a model into the store below `home`; `changes` are fields of its record."""
    repository = Repository(home)
    variant = str(changes.get("variant", "q8"))
    key = hashlib.sha256(f"{name}:{variant}".encode()).hexdigest()
    folder = repository.new_compiled()
    (folder / GRAPH_FILE).write_bytes(b"graph")
    if has_template:
        (folder / TEMPLATE_FILE).write_text("{{ messages }}", encoding="utf-8")
    COMPILED.save(folder)
    repository.commit_compiled(folder, key)
    record = InstallRecord(
        provider="hub",
        name=name,
        variant=variant,
        is_default=True,
        source_ref=name,
        revision=Revision("main", "a" * 40),
        artifacts=(Artifact("model.safetensors", 269_060_552, "b" * 64, "safetensors"),),
        compiled_key=key,
        recipe="q8",
        family="llama",
        compiled_bytes=138_000_000,
        installed_at="2026-11-01T12:00:00Z",
    )
    stored = repository.write_record(replace(record, **changes))
    location = str(repository.compiled_path(key))
    return ModelInfo.from_disk(
        stored, COMPILED, has_template=has_template, location=location, problem=None
    )
