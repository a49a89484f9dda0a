"""Reads GGUF files, strictly: nothing in the file is believed before it is checked.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian;
one file or several (`name-00001-of-00003.gguf`, as llama-gguf-split writes them). The header is
parsed once, every count and length held against the bytes that are left, so that memory stays
proportional to what the file really contains. Weights are read a few rows at a time.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ohmygpu.core.errors import CorruptFile, InvalidRequest, UnsupportedModel

from .gguf_blocks import BLOCK_TYPES
from .source import Bytes, read_raw

MAX_KEY_BYTES = 65_535  # the specification's own limit
MAX_TENSOR_NAME_BYTES = 256
MAX_DIMENSIONS = 4
MAX_TENSORS = 1 << 20
MAX_STRINGS = 1 << 22  # strings in one array: eight times the largest vocabulary there is
MAX_ALIGNMENT = 1 << 16
DEFAULT_ALIGNMENT = 32

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRUCT_CODES = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B"}
_STRUCT_CODES |= {10: "<Q", 11: "<q", 12: "<d"}

# Every tensor type ggml has had, so that a message can name the ones we cannot read.
_TYPE_NAMES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1"}
_TYPE_NAMES |= {10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}
_TYPE_NAMES |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"}
_TYPE_NAMES |= {22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
_TYPE_NAMES |= {29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
_TYPE_NAMES |= {41: "Q1_0"}

PLAIN_TYPES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
"""Bytes of one element of the types that are not stored in blocks."""

_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` has rows first (the file stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int  # bytes from the start of its file
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows when seen as a matrix (N, K); elements when it has one axis only."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of `rows`."""
        return self.nbytes // self.rows


class GgufFile:
    """One parsed GGUF file.

    `metadata` values are bool, int, float, str, list[str] or, for arrays of numbers, a numpy array.
    Raises CorruptFile or UnsupportedModel, both naming the file.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise CorruptFile(f"{name} cannot be opened: {error.strerror}") from error
        try:
            size = path.stat().st_size
            if size < 24:
                raise CorruptFile(f"{name} is not a GGUF file: it has only {size} bytes")
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                header = _Header(name, mapped)
                header.parse()
            self.metadata: dict[str, Any] = header.metadata
            self.tensors: dict[str, GgufTensor] = header.tensors
        except BaseException:
            self._file.close()
            raise

    def read_rows(self, tensor: GgufTensor, start: int, stop: int) -> Bytes:
        """Raw bytes of rows start:stop, (stop - start, row bytes)."""
        row_bytes = tensor.row_bytes
        offset = tensor.offset + start * row_bytes
        return read_raw(self._file, self.name, offset, stop - start, row_bytes)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()


class _Header:
    """The parser: a position in the mapped file that never passes its end."""

    def __init__(self, name: str, mapped: mmap.mmap) -> None:
        self.name = name
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._mapped = mapped
        self._size = len(mapped)
        self._at = 0

    def parse(self) -> None:
        """Fill `metadata` and `tensors`."""
        if self._take(4, "the magic") != _MAGIC:
            raise self._corrupt("it does not start with the GGUF magic")
        version = self._number("I", "the version")
        if version & 0xFFFF == 0 and version:
            raise UnsupportedModel(
                f"{self.name} is a big-endian GGUF file; use a little-endian one"
            )
        if version not in (2, 3):
            raise UnsupportedModel(
                f"{self.name} is GGUF version {version}; versions 2 and 3 are read: "
                "look for a newer conversion of this model"
            )
        tensor_count = self._count("tensors", 24, MAX_TENSORS)
        for _ in range(self._count("metadata entries", 13, MAX_TENSORS)):
            self._entry()
        self._tensor_infos(tensor_count)

    def _corrupt(self, what: str) -> CorruptFile:
        return CorruptFile(f"{self.name} is not a sound GGUF file: {what}; pull the model again")

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._corrupt(f"{what} reaches past the end of the file")
        taken = self._mapped[self._at : self._at + count]
        self._at += count
        return taken

    def _number(self, code: str, what: str) -> int:
        layout = "<" + code
        return int(struct.unpack(layout, self._take(struct.calcsize(layout), what))[0])

    def _count(self, what: str, least_bytes: int, limit: int) -> int:
        """A 64-bit count of things of at least `least_bytes` each."""
        count = self._number("Q", f"the number of {what}")
        if count > limit or count * least_bytes > self._size - self._at:
            raise self._corrupt(f"it claims {count} {what}, more than it can hold")
        return count

    def _text(self, what: str, limit: int | None = None) -> str:
        length = self._number("Q", what)
        if limit is not None and length > limit:
            raise self._corrupt(f"{what} is {length} bytes long")
        try:
            return str(self._take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self._corrupt(f"{what} is not UTF-8 text") from error

    def _entry(self) -> None:
        key = self._text("a metadata key", MAX_KEY_BYTES)
        if key in self.metadata:
            raise self._corrupt(f"the metadata key {_shown(key)} appears twice")
        kind = self._number("I", f"the type of {_shown(key)}")
        self.metadata[key] = self._array(key) if kind == _ARRAY else self._value(key, kind)

    def _value(self, key: str, kind: int) -> bool | int | float | str:
        if kind == _STRING:
            return self._text(f"the value of {_shown(key)}")
        code = _STRUCT_CODES.get(kind)
        if code is None:
            raise self._corrupt(f"the metadata key {_shown(key)} has the unknown type {kind}")
        taken = self._take(struct.calcsize(code), f"the value of {_shown(key)}")
        value: int | float = struct.unpack(code, taken)[0]
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Any:
        kind = self._number("I", f"the type of {_shown(key)}")
        if kind == _STRING:
            count = self._count(f"strings in {_shown(key)}", 8, MAX_STRINGS)
            what = f"a string in {_shown(key)}"
            return [self._text(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._corrupt(f"the array {_shown(key)} has the unknown item type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        count = self._count(f"items in {_shown(key)}", dtype.itemsize, self._size)
        taken = self._take(count * dtype.itemsize, f"the array {_shown(key)}")
        return np.frombuffer(taken, dtype=dtype)

    def _tensor_infos(self, count: int) -> None:
        found = [self._tensor_info() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self._corrupt(
                f"general.alignment is {_shown(str(alignment))}, not a power of two"
            )
        data_start = -(-self._at // alignment) * alignment
        end = 0  # of the tensor before, to see overlaps
        for tensor in sorted(found, key=lambda entry: entry.offset):
            if tensor.offset % alignment:
                raise self._corrupt(f"tensor {_shown(tensor.name)} is not aligned")
            if tensor.offset < end:
                raise self._corrupt(f"tensor {_shown(tensor.name)} overlaps the one before it")
            end = tensor.offset + tensor.nbytes
            if end > self._size - data_start:
                raise self._corrupt(
                    f"tensor {_shown(tensor.name)} reaches past the end of the file"
                )
        for tensor in found:
            if tensor.name in self.tensors:
                raise self._corrupt(f"tensor {_shown(tensor.name)} appears twice")
            self.tensors[tensor.name] = GgufTensor(
                tensor.name,
                tensor.shape,
                tensor.type_name,
                data_start + tensor.offset,
                tensor.nbytes,
            )

    def _tensor_info(self) -> GgufTensor:
        name = self._text("a tensor name", MAX_TENSOR_NAME_BYTES)
        dimensions = self._number("I", f"the shape of {_shown(name)}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._corrupt(f"tensor {_shown(name)} has {dimensions} dimensions")
        shape = tuple(self._number("Q", f"the shape of {_shown(name)}") for _ in range(dimensions))
        type_id = self._number("I", f"the type of {_shown(name)}")
        offset = self._number("Q", f"the offset of {_shown(name)}")
        if 0 in shape:
            raise self._corrupt(f"tensor {_shown(name)} has an empty dimension")
        type_name = _TYPE_NAMES.get(type_id, f"number {type_id}")
        block = BLOCK_TYPES.get(type_name)
        if block is None and type_name not in PLAIN_TYPES:
            raise UnsupportedModel(
                f"tensor {_shown(name)} of {self.name} has the block type {type_name}, which "
                "cannot be read; pull another variant of this model (readable: "
                f"{', '.join(BLOCK_TYPES)}, F16, BF16, F32)"
            )
        elements, nbytes = (block.elements, block.nbytes) if block else (1, PLAIN_TYPES[type_name])
        if shape[0] % elements:
            raise self._corrupt(
                f"rows of tensor {_shown(name)} have {shape[0]} weights, "
                f"not whole {type_name} blocks"
            )
        return GgufTensor(name, shape[::-1], type_name, offset, prod(shape) // elements * nbytes)


class GgufModel:
    """A model in one GGUF file or in the parts of a split one, seen as a whole."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files: list[GgufFile] = []
        try:
            for name in _parts_in_order(files):
                self._files.append(GgufFile(name, files[name]))
            self.metadata = self._files[0].metadata
            self.name = self._files[0].name
            self._where = self._join()
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> dict[str, GgufTensor]:
        """All tensors by their GGUF name."""
        return {name: tensor for name, (_, tensor) in self._where.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Bytes:
        """Raw bytes of rows start:stop of a tensor, (stop - start, row bytes)."""
        file, tensor = self._where[name]
        return file.read_rows(tensor, start, stop)

    def close(self) -> None:
        """Close all files; idempotent."""
        for file in self._files:
            file.close()

    def _join(self) -> dict[str, tuple[GgufFile, GgufTensor]]:
        where: dict[str, tuple[GgufFile, GgufTensor]] = {}
        for position, file in enumerate(self._files):
            number, count = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1)
            if (number, max(count, 1)) != (position, len(self._files)):
                raise CorruptFile(
                    f"{file.name} says it is part {number + 1} of {count}, "
                    f"not part {position + 1} of {len(self._files)}; "
                    "give all parts under their own names"
                )
            for name, tensor in file.tensors.items():
                if name in where:
                    raise CorruptFile(
                        f"tensor {_shown(name)} is in {where[name][0].name} and in {file.name}; "
                        "pull the model again"
                    )
                where[name] = (file, tensor)
        expected = self.metadata.get("split.tensors.count", len(where))
        if len(self._files) > 1 and expected != len(where):
            raise CorruptFile(
                f"the parts of {self.name} hold {len(where)} tensors, not {expected}; "
                "pull the model again"
            )
        return where


def _parts_in_order(files: Mapping[str, Path]) -> list[str]:
    """The file names, first part first, after a check that they are all parts of one model."""
    if len(files) == 1:
        only = next(iter(files))
        match = _SPLIT_NAME.fullmatch(only)
        if match is None or int(match[3]) == 1:
            return [only]
    matches = {name: _SPLIT_NAME.fullmatch(name) for name in sorted(files)}
    stems = {(match[1], match[3]) for match in matches.values() if match}
    if len(stems) != 1 or None in matches.values():
        raise InvalidRequest(
            f"{', '.join(sorted(files))} are not the parts of one model; name one GGUF file"
        )
    stem, count = stems.pop()
    if int(count) > MAX_TENSORS or len(files) != int(count):
        names = (f"{stem}-{part:05d}-of-{count}.gguf" for part in range(1, int(count) + 1))
        lower = {name.lower() for name in files}
        missing = next((name for name in names if name.lower() not in lower), None)
        if missing is not None:
            raise CorruptFile(f"{missing} is missing: this model is split into {int(count)} files")
    return sorted(files, key=str.lower)


def _shown(text: str) -> str:
    """A name from the file, safe to print: no control characters, not too long."""
    return repr(text[:80])
