"""The GGUF reader believes nothing: whatever is wrong, the answer is a clear refusal."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ohmygpu.convert.gguf import GgufFile, GgufModel
from ohmygpu.convert.source import open_source
from ohmygpu.core.errors import CorruptFile, InvalidRequest, UnsupportedModel
from tests.convert.gguf_files import llama_metadata, llama_tensors, write_gguf

STRING, ARRAY, UINT32 = 8, 9, 4
F32, IQ2_XXS = 0, 16


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def file_bytes(
    entries: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    data_bytes: int = 4096,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """A GGUF file by hand, so that a test can write what no writer would."""
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, entry_count)
    head += b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data_bytes)


def opened(folder: Path, data: bytes) -> GgufFile:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return GgufFile("model.gguf", path)


def test_metadata_and_tensors_are_read_as_written(tmp_path: Path) -> None:
    tensors = llama_tensors(np.random.default_rng(0))
    metadata = llama_metadata()
    file = GgufFile("m.gguf", write_gguf(tmp_path / "m.gguf", metadata, tensors))
    try:
        for key, value in metadata.items():
            found = file.metadata[key]
            if isinstance(value, float):
                assert found == float(np.float32(value))
            else:
                assert (found.tolist() if isinstance(found, np.ndarray) else found) == value
        for name, (data, type_name) in tensors.items():
            stored = file.tensors[name]
            assert stored.type_name == type_name
            rows = file.read_rows(stored, 1, stored.rows)
            np.testing.assert_array_equal(rows, data.reshape(stored.rows, -1).view(np.uint8)[1:])
    finally:
        file.close()


@pytest.mark.parametrize("version", [2, 3])
def test_versions_two_and_three_are_read(tmp_path: Path, version: int) -> None:
    opened(tmp_path, file_bytes(tensors=(tensor("a", (8,)),), version=version)).close()


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_other_versions_are_named(tmp_path: Path, version: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"version {version}"):
        opened(tmp_path, file_bytes(version=version))


def test_a_big_endian_file_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="big-endian"):
        opened(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64))


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "only 0 bytes"),
    "another kind of file": (b"PK\x03\x04" + bytes(60), "magic"),
    "tensor count": (file_bytes(counts=(2**63, 0)), "9223372036854775808 tensors"),
    "entry count": (file_bytes(counts=(0, 2**64 - 1)), "metadata entries"),
    "key length": (file_bytes((struct.pack("<Q", 2**63),), counts=(0, 1)), "bytes long"),
    "key past the end": (file_bytes((struct.pack("<Q", 60000),), counts=(0, 1)), "past the end"),
    "key text": (file_bytes((entry(b"\xff\xfe", UINT32, bytes(4)),)), "UTF-8"),
    "value text": (file_bytes((entry("k", STRING, text(b"\xff")),)), "UTF-8"),
    "value length": (file_bytes((entry("k", STRING, struct.pack("<Q", 2**62)),)), "past the end"),
    "value type": (file_bytes((entry("k", 77, bytes(8)),)), "unknown type 77"),
    "key twice": (file_bytes((entry("k", UINT32, bytes(4)),) * 2), "'k' appears twice"),
    "array count": (
        file_bytes((entry("k", ARRAY, struct.pack("<IQ", UINT32, 2**61)),)),
        "more than it can hold",
    ),
    "string array count": (
        file_bytes((entry("k", ARRAY, struct.pack("<IQ", STRING, 2**40)),)),
        "more than it can hold",
    ),
    "array in an array": (
        file_bytes((entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)),
        "unknown item type 9",
    ),
    "five dimensions": (file_bytes(tensors=(tensor("a", (1, 1, 1, 1, 1)),)), "5 dimensions"),
    "no dimension": (file_bytes(tensors=(tensor("a", ()),)), "0 dimensions"),
    "empty dimension": (file_bytes(tensors=(tensor("a", (4, 0)),)), "empty dimension"),
    "huge dimension": (file_bytes(tensors=(tensor("a", (2**63,)),)), "past the end"),
    "overflowing shape": (
        file_bytes(
            tensors=(
                tensor(
                    "a",
                    (2**32, 2**32),
                ),
            )
        ),
        "past the end",
    ),
    "offset": (file_bytes(tensors=(tensor("a", (8,), offset=2**40),)), "past the end"),
    "unaligned": (file_bytes(tensors=(tensor("a", (8,), offset=4),)), "not aligned"),
    "overlap": (
        file_bytes(tensors=(tensor("a", (64,)), tensor("b", (8,), offset=32))),
        "'b' overlaps",
    ),
    "name twice": (
        file_bytes(tensors=(tensor("a", (8,)), tensor("a", (8,), offset=32))),
        "'a' appears twice",
    ),
    "part of a block": (file_bytes(tensors=(tensor("a", (48,), 2),)), "not whole Q4_0 blocks"),
    "alignment": (
        file_bytes((entry("general.alignment", UINT32, struct.pack("<I", 24)),)),
        "power of two",
    ),
    "no alignment": (
        file_bytes((entry("general.alignment", UINT32, bytes(4)),)),
        "power of two",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_named(tmp_path: Path, damage: str) -> None:
    data, message = DAMAGE[damage]
    with pytest.raises(CorruptFile, match=re.escape(message)) as caught:
        opened(tmp_path, data)
    assert "model.gguf" in caught.value.message


@pytest.mark.parametrize(("kind", "shown"), [(IQ2_XXS, "IQ2_XXS"), (31, "31"), (4000, "4000")])
def test_a_block_type_without_a_decoder_is_named_with_its_tensor(
    tmp_path: Path, kind: int, shown: str
) -> None:
    with pytest.raises(UnsupportedModel, match=rf"'blk\.0\.w'.*{shown}.*Q4_K"):
        opened(tmp_path, file_bytes(tensors=(tensor("blk.0.w", (256,), kind),)))


def test_control_characters_of_names_stay_out_of_messages(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile) as caught:
        opened(tmp_path, file_bytes((entry("\x1b[31m\r\nfake", 77, bytes(8)),)))
    assert caught.value.message.isprintable()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    for length in [*range(0, 4000, 97), len(whole) // 2, len(whole) - 1]:
        with pytest.raises(CorruptFile):
            opened(tmp_path, whole[:length])


def test_a_file_cut_short_after_it_was_opened_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    source = open_source({"m.gguf": path})
    with path.open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(CorruptFile, match="pull the model again"):
        source.read("model.layers.1.mlp.down_proj.weight")
    source.close()


def test_mutated_files_are_refused_or_read_and_never_anything_else(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "whole.gguf")
    script = Path(__file__).with_name("fuzz_gguf.py")
    command = [sys.executable, str(script), str(path), str(tmp_path), "400", "11", "7616"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    counts = re.fullmatch(r"opened (\d+), refused (\d+), grown (\d+) MiB\n", result.stdout)
    assert counts is not None, result.stdout
    opened_count, refused, grown_mib = map(int, counts.groups())
    assert opened_count > 10
    assert refused > 100
    assert grown_mib < 100


def split(
    folder: Path, change: Callable[[int, dict[str, Any]], None] | None = None
) -> dict[str, Path]:
    """The tiny llama in three files, as llama-gguf-split writes them."""
    tensors = list(llama_tensors(np.random.default_rng(0)).items())
    files = {}
    for number in range(3):
        metadata = llama_metadata() if number == 0 else {}
        metadata |= {"split.no": number, "split.count": 3, "split.tensors.count": len(tensors)}
        if change:
            change(number, metadata)
        name = f"m-{number + 1:05d}-of-00003.gguf"
        files[name] = write_gguf(folder / f"blob{number}", metadata, dict(tensors[number::3]))
    return files


def test_a_split_model_reads_as_a_whole_one(tmp_path: Path) -> None:
    whole = open_source({"m.gguf": write_gguf(tmp_path / "m.gguf")})
    parts = open_source(split(tmp_path))
    assert set(parts.tensors) == set(whole.tensors)
    assert parts.config == whole.config
    for name in whole.tensors:
        np.testing.assert_array_equal(parts.read(name), whole.read(name))
    whole.close()
    parts.close()


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_missing_part_is_named(tmp_path: Path, lost: int) -> None:
    files = split(tmp_path)
    name = f"m-{lost:05d}-of-00003.gguf"
    del files[name]
    with pytest.raises(CorruptFile, match=f"{name} is missing"):
        open_source(files)


def test_parts_in_the_wrong_places_are_refused(tmp_path: Path) -> None:
    def swap(number: int, metadata: dict[str, Any]) -> None:
        metadata["split.no"] = (0, 2, 1)[number]

    with pytest.raises(CorruptFile, match="part 3 of 3, not part 2 of 3"):
        open_source(split(tmp_path, swap))


def test_parts_that_lack_tensors_are_refused(tmp_path: Path) -> None:
    def more(number: int, metadata: dict[str, Any]) -> None:
        metadata["split.tensors.count"] = 99

    with pytest.raises(CorruptFile, match="not 99"):
        open_source(split(tmp_path, more))


def test_files_that_are_not_parts_of_one_model_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(InvalidRequest, match="not the parts of one model"):
        GgufModel({"a.gguf": path, "b.gguf": path})


def test_a_part_alone_asks_for_the_others(tmp_path: Path) -> None:
    files = split(tmp_path)
    first = "m-00001-of-00003.gguf"
    with pytest.raises(CorruptFile, match=r"m-00002-of-00003\.gguf is missing"):
        open_source({first: files[first]})


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "model.pth"])
def test_files_without_readable_weights_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"[Ss]afe[Tt]ensors"):
        open_source({name: tmp_path / name})
