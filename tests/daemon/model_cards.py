"""Model cards for tests of the wire formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ohmygpu.core.records import Artifact, CompiledModel, InstallRecord, Revision
from ohmygpu.daemon.cards import ModelCard

DIGEST = "a1" * 32


def make_record(**changes: Any) -> InstallRecord:
    """An install record, SmolLM2's by default."""
    values: dict[str, Any] = {
        "provider": "hub",
        "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "variant": "q8",
        "is_default": True,
        "source_ref": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": Revision("main", "c" * 40),
        "artifacts": (Artifact("model.safetensors", 10, "b" * 64, "safetensors"),),
        "compiled_key": DIGEST,
        "recipe": "q8",
        "family": "llama",
        "compiled_bytes": 145_000_000,
        "installed_at": "2026-11-22T10:00:00.123456Z",
    }
    return InstallRecord(**{**values, **changes})


def make_compiled(**changes: Any) -> CompiledModel:
    """A compile.json, SmolLM2's by default."""
    values: dict[str, Any] = {
        "family": "llama",
        "converter_version": 1,
        "recipe": "q8",
        "target": "cpu",
        "context_length": 8192,
        "vocab_size": 49152,
        "layers": 30,
        "kv_heads": 3,
        "head_dim": 64,
        "kv_dtype": "float32",
        "parameters": 134_515_008,
        "weights_bytes": 140_000_000,
        "source_format": "safetensors",
        "quantization": "q8",
        "hidden_size": 576,
        "heads": 9,
        "feed_forward_length": 1536,
        "rope_theta": 100000.0,
        "norm_epsilon": 1e-5,
        "bos_token_id": 1,
        "eos_token_ids": (2, 0),
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "license": "apache-2.0",
    }
    return CompiledModel(**{**values, **changes})


def make_card(
    *, template: str = "{{ messages }}", folder: Path = Path("nowhere"), **changes: Any
) -> ModelCard:
    """A card; `changes` go to its record or its compile.json, whichever has the field."""
    of_record = {
        key: value for key, value in changes.items() if key in InstallRecord.__dataclass_fields__
    }
    of_compiled = {key: value for key, value in changes.items() if key not in of_record}
    return ModelCard(
        record=make_record(**of_record),
        compiled=make_compiled(**of_compiled),
        template=template,
        folder=folder,
    )
