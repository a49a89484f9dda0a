from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.errors import CorruptFile
from ohmygpu.core.records import (
    COMPILE_FILE,
    Artifact,
    CompiledModel,
    InstallRecord,
    Revision,
    RunSpec,
)

RECORD = InstallRecord(
    provider="hub",
    name="Org/Name",
    variant="q8",
    is_default=True,
    source_ref="Org/Name@v1",
    revision=Revision("v1", "c" * 40),
    artifacts=(Artifact("model.safetensors", 5, "a" * 64, "safetensors"),),
    compiled_key="b" * 64,
    recipe="q8",
    family="llama",
    compiled_bytes=9,
    installed_at="2026-01-02T03:04:05Z",
)


def compiled_model(**changes: Any) -> CompiledModel:
    values: dict[str, Any] = {}
    samples = {"str": "x", "int": 1, "float": 1.5, "int | None": 1, "tuple[int, ...]": (2, 3)}
    for field in dataclasses.fields(CompiledModel):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            values[field.name] = samples[str(field.type)]
    return CompiledModel(**(values | changes))


def test_a_record_survives_json() -> None:
    assert InstallRecord.from_dict(json.loads(json.dumps(RECORD.to_dict()))) == RECORD


def test_a_record_without_revision_survives_json() -> None:
    record = dataclasses.replace(RECORD, revision=None)
    assert InstallRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_names_of_a_record() -> None:
    assert RECORD.full_name == "Org/Name:q8"
    assert RECORD.digest == "b" * 64


def test_a_record_from_before_reasons_were_kept_is_read() -> None:
    data = RECORD.to_dict()
    del data["recipe_reason"]
    assert InstallRecord.from_dict(data).recipe_reason == ""


@pytest.mark.parametrize(
    "field",
    [
        field.name
        for field in dataclasses.fields(InstallRecord)
        if field.default is dataclasses.MISSING
    ],
)
def test_a_record_that_lacks_a_field_is_corrupt(field: str) -> None:
    data = RECORD.to_dict()
    del data[field]
    with pytest.raises(CorruptFile):
        InstallRecord.from_dict(data)


@pytest.mark.parametrize(
    ("field", "value"), [("artifacts", 3), ("artifacts", [{"x": 1}]), ("revision", "v1")]
)
def test_a_record_with_a_wrong_shape_is_corrupt(field: str, value: object) -> None:
    with pytest.raises(CorruptFile):
        InstallRecord.from_dict(RECORD.to_dict() | {field: value})


def test_a_compiled_model_is_read_as_it_was_saved(tmp_path: Path) -> None:
    compiled = compiled_model(files={"model.onnx": 3}, generation={"temperature": 0.2})
    compiled.save(tmp_path)
    assert CompiledModel.load(tmp_path) == compiled


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"eos_token_ids": [1], "unknown": 1}'])
def test_a_damaged_compile_file_says_to_pull_again(tmp_path: Path, text: str) -> None:
    (tmp_path / COMPILE_FILE).write_text(text)
    with pytest.raises(CorruptFile, match="pull it again"):
        CompiledModel.load(tmp_path)


def test_a_missing_compile_file_says_to_pull_again(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"compile\.json: No such file.*pull it again") as caught:
        CompiledModel.load(tmp_path)
    assert str(tmp_path) not in caught.value.message


def test_a_run_spec_survives_json() -> None:
    spec = RunSpec(model="m", folder="/f", slots=3, threads=2)
    assert RunSpec.from_json(spec.to_json()) == spec
    assert "\n" not in spec.to_json()
