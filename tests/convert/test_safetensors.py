"""SafeTensors models: read as the reference library wrote them, refused when anything is off."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ohmygpu.convert.safetensors import SafetensorsFile
from ohmygpu.convert.source import Source, open_source
from ohmygpu.core.errors import CorruptFile, InvalidRequest, OhMyGPUError, UnsupportedModel
from tests.convert.gguf_files import write_gguf
from tests.make_repo import make_repo, to_bfloat16

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8}
ONE = "model.safetensors"
INDEX = "model.safetensors.index.json"

Opener = Callable[..., Source]


@pytest.fixture
def opened() -> Iterator[Opener]:
    """open_source, closed after the test."""
    with ExitStack() as stack:

        def open_and_remember(files: dict[str, Path]) -> Source:
            source = open_source(files)
            stack.callback(source.close)
            return source

        yield open_and_remember


def folder_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def model(folder: Path, tensors: dict[str, Any], config: Any = CONFIG) -> dict[str, Path]:
    write_json(folder / "config.json", config)
    save_file(tensors, folder / ONE)
    return folder_files(folder)


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def spec(start: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


NUMPY_TYPES = "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
OTHER_TYPES = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


@pytest.mark.parametrize("dtype", [*NUMPY_TYPES.split(), *OTHER_TYPES])
def test_every_data_type_becomes_the_float32_it_stands_for(
    tmp_path: Path, opened: Opener, dtype: Any
) -> None:
    values = np.random.default_rng(0).uniform(0, 2, (5, 6)).astype(dtype)
    source = opened(model(tmp_path, {"w": values}))
    np.testing.assert_array_equal(source.read("w"), values.astype(np.float32))
    assert source.read("w").dtype == np.float32


def test_rows_are_those_of_the_whole(tmp_path: Path, opened: Opener) -> None:
    tensors = {
        "matrix": np.arange(48, dtype=np.float32).reshape(8, 6),
        "cube": np.arange(60, dtype=np.float32).reshape(3, 4, 5),
        "vector": np.arange(7, dtype=np.float32),
        "scalar": np.array(3.5, dtype=np.float32),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    source = opened(model(tmp_path, tensors))
    for name, values in tensors.items():
        np.testing.assert_array_equal(source.read(name), values)
        assert source.tensors[name].shape == values.shape
        assert source.blocks(name) is None
        assert source.block_layout(name) is None
    np.testing.assert_array_equal(source.read_rows("matrix", 2, 5), tensors["matrix"][2:5])
    np.testing.assert_array_equal(source.read_rows("cube", 1, 3), tensors["cube"][1:3])
    np.testing.assert_array_equal(source.read_rows("vector", 3, 4), [3.0])
    assert source.read_rows("matrix", 4, 4).shape == (0, 6)
    assert source.config == CONFIG
    assert source.format == "safetensors"


def test_the_shown_quantisation_is_the_type_of_most_weights(tmp_path: Path, opened: Opener) -> None:
    tensors = {"w": np.zeros((9, 9), ml_dtypes.bfloat16), "norm": np.zeros(9, np.float32)}
    source = opened(model(tmp_path, tensors))
    assert source.quantization == "bf16"
    assert source.total_bytes == 9 * 9 * 2 + 9 * 4


BROKEN: dict[str, tuple[Any, bytes, int | None, str]] = {
    "an absurd header length": ({}, b"", 2**63, "claims 9223372036854775808 bytes"),
    "a header longer than the file": ({}, b"", 1000, "claims 1000 bytes"),
    "no header": (b"", b"", 0, "claims 0 bytes"),
    "no JSON": (b"{nonsense", b"", None, "not valid JSON"),
    "no object": (b"[1, 2]", b"", None, "not a JSON object"),
    "deep JSON": (b'{"a":' * 50_000, b"", None, "not valid JSON"),
    "a key twice": (b'{"a":{}, "a":{}}', b"", None, "'a' appears twice"),
    "text that is not UTF-8": (b'{"\xff":1}', b"", None, "not valid JSON"),
    "a tensor that is no object": ({"w": 1}, b"", None, "dtype, shape and data_offsets"),
    "a missing field": ({"w": {"dtype": "F32", "shape": [1]}}, b"", None, "dtype, shape and"),
    "a negative shape": ({"w": spec(0, 4, shape=[-1])}, bytes(4), None, "not numbers"),
    "a true shape": ({"w": spec(0, 4, shape=[True])}, bytes(4), None, "not numbers"),
    "a shape of another size": ({"w": spec(0, 8, shape=[3])}, bytes(8), None, "needs 12 bytes"),
    "an overflowing shape": (
        {"w": spec(0, 8, shape=[2**62, 2**62])},
        bytes(8),
        None,
        "bytes and has 8",
    ),
    "offsets that run backwards": ({"w": spec(8, 4, shape=[1])}, bytes(8), None, "has -4"),
    "offsets past the end": ({"w": spec(0, 8)}, bytes(4), None, "4 bytes of data"),
    "data nobody claims": ({"w": spec(0, 4)}, bytes(8), None, "8 bytes of data"),
    "a hole": ({"a": spec(0, 4), "b": spec(8, 12)}, bytes(12), None, "'b' starts at byte 8"),
    "an overlap": ({"a": spec(0, 8), "b": spec(4, 12)}, bytes(12), None, "'b' starts at byte 4"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_damage_is_refused_and_named(tmp_path: Path, damage: str) -> None:
    header, data, length, message = BROKEN[damage]
    path = raw_file(tmp_path / ONE, header, data, length)
    with pytest.raises(CorruptFile, match=re.escape(message)) as caught:
        SafetensorsFile(ONE, path)
    assert ONE in caught.value.message


def test_an_unknown_data_type_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = raw_file(tmp_path / ONE, {"w": spec(0, 4, dtype="F4")}, bytes(4))
    with pytest.raises(UnsupportedModel, match=r"'w'.*'F4'.*BF16"):
        SafetensorsFile(ONE, path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.ones(4, np.float16)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / ONE).write_bytes(whole[:length])
        with pytest.raises(CorruptFile):
            SafetensorsFile(ONE, tmp_path / ONE)


def test_mutated_files_are_refused_or_read_and_never_anything_else(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.ones(4, np.float16)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    rng = random.Random(5)
    outcomes = set()
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(whole) - 70)] = rng.randrange(256)
        (tmp_path / ONE).write_bytes(damaged)
        try:
            file = SafetensorsFile(ONE, tmp_path / ONE)
            for name, info in file.tensors.items():
                file.read_rows(name, 0, info.shape[0] if info.shape else 1)
            file.close()
            outcomes.add("read")
        except OhMyGPUError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_file_cut_short_after_it_was_opened_is_an_error_not_a_crash(
    tmp_path: Path, opened: Opener
) -> None:
    source = opened(model(tmp_path, {"w": np.zeros((64, 64), np.float32)}))
    with (tmp_path / ONE).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptFile, match="pull the model again"):
        source.read("w")


def shards(folder: Path, weight_map: dict[str, Any] | None = None) -> dict[str, Path]:
    write_json(folder / "config.json", CONFIG)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": np.full((2, 2), 1, np.float32)}, folder / first)
    save_file({"b": np.full((2, 2), 2, np.float32)}, folder / second)
    write_json(folder / INDEX, {"weight_map": weight_map or {"a": first, "b": second}})
    return folder_files(folder)


def test_shards_read_as_one_model(tmp_path: Path, opened: Opener) -> None:
    files = shards(tmp_path)
    for given in (files, {name: path for name, path in files.items() if name != INDEX}):
        source = opened(given)
        assert source.read("a").sum() == 4
        assert source.read("b").sum() == 8


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, with_index: bool) -> None:
    files = shards(tmp_path)
    del files["model-00001-of-00002.safetensors"]
    if not with_index:
        del files[INDEX]
    with pytest.raises(CorruptFile, match=r"model-00001-of-00002\.safetensors is missing"):
        open_source(files)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "pytorch_model.bin",
        "",
        "x\n.safetensors",
        7,
        None,
    ],
)
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, name: Any) -> None:
    with pytest.raises(CorruptFile, match="not the name of a SafeTensors file beside it"):
        open_source(shards(tmp_path, {"a": name}))


def test_an_index_that_promises_other_tensors_is_refused(tmp_path: Path) -> None:
    files = shards(tmp_path, {"a": "model-00002-of-00002.safetensors"})
    with pytest.raises(CorruptFile, match="lacks the tensor 'a'"):
        open_source(files)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    files = shards(tmp_path)
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "model-00002-of-00002.safetensors")
    del files[INDEX]
    with pytest.raises(CorruptFile, match="'a' is in model-00001"):
        open_source(files)


def test_files_beside_model_safetensors_are_left_alone(tmp_path: Path, opened: Opener) -> None:
    files = model(tmp_path, {"a": np.zeros(3, np.float32)})
    files["model.fp16.safetensors"] = tmp_path / "never opened"
    assert set(opened(files).tensors) == {"a"}


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    files = {"config.json": write_json(tmp_path / "config.json", CONFIG)}
    files |= {f"{name}.safetensors": tmp_path / name for name in ("x", "y")}
    with pytest.raises(UnsupportedModel, match=r"x\.safetensors, y\.safetensors"):
        open_source(files)


CONFIGS: dict[str, tuple[Any, str]] = {
    "no model type": ({"hidden_size": 3}, "model_type"),
    "a list": ([1], "not a JSON object"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_cannot_be_used_says_why(tmp_path: Path, kind: str) -> None:
    config, message = CONFIGS[kind]
    with pytest.raises((UnsupportedModel, CorruptFile), match=message):
        open_source(model(tmp_path, {"a": np.zeros(3, np.float32)}, config))


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json is missing"):
        open_source({ONE: tmp_path / ONE})


def test_an_adapter_is_recognised(tmp_path: Path) -> None:
    files = dict.fromkeys(("adapter_config.json", "adapter_model.safetensors"), tmp_path)
    with pytest.raises(UnsupportedModel, match="LoRA"):
        open_source(files)


def test_two_formats_at_once_are_a_question_not_a_guess(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"m\.gguf.*model\.safetensors"):
        open_source({"m.gguf": tmp_path, ONE: tmp_path})


@pytest.mark.parametrize("count", [1, 3])
def test_a_gguf_turned_into_a_repository_is_the_same_model(
    tmp_path: Path, opened: Opener, count: int
) -> None:
    gguf = write_gguf(tmp_path / "m.gguf")
    make_repo(gguf, tmp_path / "repo", count)
    original, copy = opened({"m.gguf": gguf}), opened(folder_files(tmp_path / "repo"))
    assert set(copy.tensors) == set(original.tensors)
    for name in original.tensors:
        rounded = original.read(name).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(copy.read(name), rounded)
    for key, value in original.config.items():
        assert copy.config.get(key) == value


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    assert to_bfloat16(values) == values.astype(ml_dtypes.bfloat16).tobytes()


def test_headers_of_extreme_values_are_refused_or_read_and_never_anything_else(
    tmp_path: Path,
) -> None:
    extremes: tuple[object, ...] = (
        0,
        1,
        -1,
        3,
        4,
        60,
        2**31,
        2**63,
        2**64,
        10**400,
        0.5,
        True,
        None,
        "4",
        [],
        {},
    )
    fields = ("dtype", "shape", "data_offsets", "extra")
    rng = random.Random(11)
    outcomes = set()
    for _ in range(1000):
        header: dict[str, Any] = {"a": spec(0, 60, shape=[3, 5]), "b": spec(60, 64)}
        for _ in range(rng.randint(1, 2)):
            entry, field = header[rng.choice("ab")], rng.choice(fields)
            if rng.random() < 0.3:
                entry[field] = rng.choice(extremes)
            elif rng.random() < 0.2:
                entry.pop(field, None)
            elif isinstance(entry.get(field), list) and entry[field]:
                entry[field][rng.randrange(len(entry[field]))] = rng.choice(extremes)
            else:
                entry["shape"] = [rng.choice((1, 3, 5, 15)) for _ in range(rng.randint(0, 70))]
        path = raw_file(tmp_path / ONE, header, bytes(64))
        try:
            file = SafetensorsFile(ONE, path)
            for name, info in file.tensors.items():
                assert file.read_rows(name, 0, info.shape[0] if info.shape else 1).size <= 16
            file.close()
            outcomes.add("read")
        except OhMyGPUError as error:
            outcomes.add("refused" if len(error.message) < 1000 else "refused at length")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":[' + b"[]," * 500_000 + b"[]]}",
        b'{"a":[' + b"{}," * 500_000 + b"{}]}",
        b"{" + b",".join(b'"%x":0' % number for number in range(200_000)) + b"}",
        b'{"a":[' + b"1," * 800_000 + b"1]}",
    ],
    ids=["lists", "objects", "keys", "numbers"],
)
def test_a_long_header_that_is_no_table_is_not_even_parsed(
    tmp_path: Path, header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*_: Any, **__: Any) -> None:
        raise AssertionError("it would take twenty times its size")

    path = raw_file(tmp_path / ONE, header)
    monkeypatch.setattr(json, "loads", parsed)
    with pytest.raises(CorruptFile, match="not a JSON object with an entry for each tensor"):
        SafetensorsFile(ONE, path)


def test_a_long_header_of_many_tensors_is_read(tmp_path: Path) -> None:
    header = {f"t{number}": spec(4 * number, 4 * number + 4) for number in range(30_000)}
    assert len(json.dumps(header)) > 1 << 20
    file = SafetensorsFile(ONE, raw_file(tmp_path / ONE, header, bytes(120_000)))
    assert len(file.tensors) == 30_000
    file.close()
