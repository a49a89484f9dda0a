"""Reads SafeTensors files, strictly, and whole models made of them.

Format: https://github.com/huggingface/safetensors#format, one file or several with an index. As
the reference reader does, this one refuses an overlong header, keys that appear twice, and tensors
that overlap, leave holes or end before the file does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, UnsupportedModel
from ohmygpu.core.model_files import MAX_INDEX_BYTES
from ohmygpu.core.safetensors_header import header_bytes, may_be_table

from .source import (
    BlockLayout,
    Bytes,
    Float32,
    Place,
    QuantizedBlocks,
    SourceFormat,
    TensorInfo,
    read_raw,
    read_whole,
)

MAX_JSON_BYTES = MAX_INDEX_BYTES  # config.json and the index
MAX_DIMENSIONS = 64  # numpy's

_DTYPES: dict[str, Any] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,  # scales: powers of two
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
    "BOOL": "<u1",
}
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_PLAIN_NAME = re.compile(r"[\w.+-]{1,255}")
_INDEX_SUFFIX = ".safetensors.index.json"
_ONE_FILE = "model.safetensors"


def to_float32(raw: Bytes, dtype: str) -> Float32:
    """Rows of raw little-endian values, (R, row bytes) → (R, values) float32."""
    if dtype == "BF16":  # the upper half of a float32
        wide = raw.view("<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype.startswith("F8_"):  # a table is several times faster than casting
        return np.take(_byte_values(dtype), raw)
    values: Float32 = raw.view(_DTYPES[dtype]).astype(np.float32)
    return values


@cache
def _byte_values(dtype: str) -> Float32:
    """The value of each of the 256 bytes of an 8-bit float type."""
    values: Float32 = np.arange(256, dtype=np.uint8).view(_DTYPES[dtype]).astype(np.float32)
    return values


@dataclass(frozen=True, slots=True)
class _Stored:
    info: TensorInfo
    offset: int  # bytes from the start of the file
    nbytes: int


class SafetensorsFile:
    """One parsed SafeTensors file. Raises CorruptFile or UnsupportedModel, naming the file."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise CorruptFile(f"{name} cannot be opened: {error.strerror}") from error
        try:
            self._stored = self._parse(path.stat().st_size)
        except BaseException:
            self._file.close()
            raise

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors by name."""
        return {name: stored.info for name, stored in self._stored.items()}

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._stored[name].nbytes

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop along the first axis as float32; a scalar is one row."""
        info = self._stored[name].info
        values = to_float32(self._raw_rows(name, start, stop), info.dtype)
        return values.reshape(stop - start, *info.shape[1:])

    def read_stored(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop in the type they are stored in."""
        info = self._stored[name].info
        values: NDArray[Any] = self._raw_rows(name, start, stop).view(_DTYPES[info.dtype])
        return values.reshape(stop - start, *info.shape[1:])

    def _raw_rows(self, name: str, start: int, stop: int) -> Bytes:
        stored = self._stored[name]
        rows = stored.info.shape[0] if stored.info.shape else 1
        row_bytes = stored.nbytes // rows if rows else 0
        offset = stored.offset + start * row_bytes
        return read_raw(self._file, self.name, offset, stop - start, row_bytes)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def _corrupt(self, what: str) -> CorruptFile:
        return CorruptFile(f"{self.name} is not a sound SafeTensors file: {what}; pull it again")

    def _parse(self, size: int) -> dict[str, _Stored]:
        start = self._file.read(8)
        length = header_bytes(start, size)
        if length is None:
            claimed = int.from_bytes(start, "little")
            raise self._corrupt(f"its header claims {claimed} bytes of a file of {size}")
        text = self._file.read(length)
        if text[:1] != b"{" or not may_be_table(text):
            raise self._corrupt("its header is not a JSON object with an entry for each tensor")
        header = _parse_json(text, self._corrupt, unique=True)
        header.pop("__metadata__", None)
        data_bytes = size - 8 - length
        stored = {name: self._entry(name, entry) for name, entry in header.items()}
        end = 0
        for item in sorted(stored.values(), key=lambda item: (item.offset, item.nbytes)):
            if item.offset != end:
                raise self._corrupt(
                    f"tensor {item.info.name[:80]!r} starts at byte {item.offset} where {end} "
                    "bytes of data are accounted for"
                )
            end += item.nbytes
        if end != data_bytes:
            raise self._corrupt(f"it has {data_bytes} bytes of data where its tensors take {end}")
        return {name: self._placed(item, item.offset + 8 + length) for name, item in stored.items()}

    def _placed(self, item: _Stored, offset: int) -> _Stored:
        return _Stored(replace(item.info, place=Place(self._path, offset)), offset, item.nbytes)

    def _entry(self, name: str, entry: Any) -> _Stored:
        shown = repr(name[:80])
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._corrupt(f"tensor {shown} does not have dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise self._corrupt(f"the shape or data_offsets of tensor {shown} are not numbers")
        if len(shape) > MAX_DIMENSIONS:
            raise self._corrupt(f"tensor {shown} has {len(shape)} dimensions")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise UnsupportedModel(
                f"tensor {shown} of {self.name} has the data type {str(dtype)[:40]!r}; "
                f"these can be read: {', '.join(_DTYPES)}"
            )
        nbytes = prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise self._corrupt(
                f"tensor {shown} needs {nbytes} bytes and has {offsets[1] - offsets[0]}"
            )
        return _Stored(TensorInfo(name, tuple(shape), dtype), offsets[0], nbytes)


class SafetensorsSource:
    """Source over `config.json` and SafeTensors files; see `source.Source` for its methods."""

    format: SourceFormat = "safetensors"

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self.config = _read_config(files)
        names, listed = _weight_files(files)
        self._opened: list[SafetensorsFile] = []
        self._where: dict[str, SafetensorsFile] = {}
        try:
            for name in names:
                self._add(SafetensorsFile(name, files[name]))
            for tensor, name in listed.items():
                if tensor not in self._where or self._where[tensor].name != name:
                    raise CorruptFile(
                        f"{name} lacks the tensor {tensor[:80]!r} that the index says it has; "
                        "pull the model again"
                    )
        except BaseException:
            self.close()
            raise
        self.tensors: dict[str, TensorInfo] = {}
        for file in self._opened:
            self.tensors |= file.tensors
        self.total_bytes = sum(file.nbytes(name) for name, file in self._where.items())
        self.quantization = self._dominant_dtype().lower()

    def read(self, name: str) -> Float32:
        """A whole tensor as float32."""
        return read_whole(self, name)

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop as float32."""
        return self._where[name].read_rows(name, start, stop)

    def read_stored(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows start:stop in the type they are stored in: the codes of a quantised layer."""
        shape = self.tensors[name].shape
        stop = (shape[0] if shape else 1) if stop is None else stop
        return self._where[name].read_stored(name, start, stop)

    def block_layout(self, name: str) -> BlockLayout | None:
        """None: SafeTensors weights are not stored in blocks."""
        return None

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        """None: SafeTensors weights are not stored in blocks."""
        return None

    def close(self) -> None:
        """Close the files; idempotent."""
        for file in self._opened:
            file.close()

    def _add(self, file: SafetensorsFile) -> None:
        self._opened.append(file)
        for tensor in file.tensors:
            if tensor in self._where:
                raise CorruptFile(
                    f"tensor {tensor[:80]!r} is in {self._where[tensor].name} and in {file.name}; "
                    "pull the model again"
                )
            self._where[tensor] = file

    def _dominant_dtype(self) -> str:
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            sizes[info.dtype] += info.elements
        return sizes.most_common(1)[0][0] if sizes else "F32"


def read_json_object(name: str, path: Path) -> dict[str, Any]:
    """A JSON file whose top is an object. Raises CorruptFile naming it."""

    def corrupt(what: str) -> CorruptFile:
        return CorruptFile(f"{name} is damaged: {what}; pull the model again")

    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise corrupt(f"it is larger than {MAX_JSON_BYTES} bytes")
        return _parse_json(path.read_bytes(), corrupt)
    except OSError as error:
        raise CorruptFile(f"{name} cannot be read: {error.strerror}") from error


def _parse_json(text: bytes, corrupt: Any, *, unique: bool = False) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise corrupt(f"the key {twice[:80]!r} appears twice")
        return found

    try:
        data = json.loads(text.decode("utf-8-sig"), object_pairs_hook=once if unique else None)
    except (ValueError, RecursionError) as error:
        raise corrupt(f"not valid JSON ({str(error)[:120]})") from error
    if not isinstance(data, dict):
        raise corrupt("not a JSON object")
    return data


def _read_config(files: Mapping[str, Path]) -> dict[str, Any]:
    if "config.json" not in files:
        if "adapter_config.json" in files:
            raise UnsupportedModel(
                "this is an adapter (LoRA), not a whole model; pull the model it was trained on"
            )
        raise UnsupportedModel(
            "config.json is missing: SafeTensors weights need it to say which architecture they are"
        )
    config = read_json_object("config.json", files["config.json"])
    if not isinstance(config.get("model_type"), str):
        raise UnsupportedModel(
            "config.json does not say its model_type; this is not a model folder"
        )
    return config


def _weight_files(files: Mapping[str, Path]) -> tuple[list[str], dict[str, str]]:
    """Names of the weight files, and tensor → file as the index lists them (empty without one)."""
    indexes = [name for name in files if name.endswith(_INDEX_SUFFIX) and "/" not in name]
    if _ONE_FILE + ".index.json" in indexes:
        indexes = [_ONE_FILE + ".index.json"]
    names = sorted(name for name in files if name.endswith(".safetensors") and "/" not in name)
    if len(indexes) == 1:
        listed = _read_index(indexes[0], files[indexes[0]])
        wanted = sorted(set(listed.values()))
        _require(wanted, files, f"{indexes[0]} names it")
        return wanted, listed
    if _ONE_FILE in names:
        return [_ONE_FILE], {}
    if len(names) == 1 and _SHARD_NAME.fullmatch(names[0]) is None:
        return names, {}
    shards = [_SHARD_NAME.fullmatch(name) for name in names]
    stems = {(match[1], int(match[3])) for match in shards if match}
    if None in shards or len(stems) != 1:
        raise UnsupportedModel(
            f"there is no index that says which of {', '.join(names[:5])} belong to the model; "
            f"expected {_ONE_FILE} or {_ONE_FILE}.index.json"
        )
    stem, count = stems.pop()
    wanted = [f"{stem}-{part:05d}-of-{count:05d}.safetensors" for part in range(1, count + 1)]
    _require(wanted, files, f"the model is split into {count} files")
    return wanted, {}


def _require(names: list[str], files: Mapping[str, Path], reason: str) -> None:
    missing = [name for name in names if name not in files]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CorruptFile(f"{missing[0]}{more} is missing ({reason}); pull the model again")


def _read_index(name: str, path: Path) -> dict[str, str]:
    weight_map = read_json_object(name, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFile(f"{name} has no weight_map; pull the model again")
    for tensor, file in weight_map.items():
        if (
            not isinstance(file, str)
            or _PLAIN_NAME.fullmatch(file) is None
            or not file.endswith(".safetensors")
        ):
            raise CorruptFile(
                f"{name} places tensor {tensor[:80]!r} in {str(file)[:80]!r}, "
                "which is not the name of a SafeTensors file beside it"
            )
    return weight_map


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
