"""The opened input of a compile: weights and config in Hugging Face names, from any format.

`open_source` looks at the files and picks SafeTensors or GGUF. Both give the same thing: a config
as `config.json` would have it, and tensors under the names transformers uses, read a few rows at a
time so that the memory needed does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, InvalidRequest, UnsupportedModel
from ohmygpu.core.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG_FILE,
    PICKLE_SUFFIXES,
)

SourceFormat = Literal["safetensors", "gguf"]
Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

ROWS_CHUNK_ELEMENTS = 1 << 18  # weights worked on at once: 1 MiB as float32 stays in the cache


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a file a tensor's bytes lie: row by row, little-endian, from `offset` on."""

    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of the source: Hugging Face name, shape (rows first) and how it is stored.

    `dtype` is the stored type in the file formats' own spelling: F32, F16, BF16, F8_E4M3, I64, …
    or a GGUF block type such as Q4_K. `place` says where, if a file holds it just as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: Place | None = None

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """What `Source.blocks` would give for a tensor, known without reading it.

    `input_order`, where there is one, says which column of the weight each of the blocks' columns
    is: the product needs its input in that order too.
    """

    bits: int
    block_size: int
    has_correction: bool
    input_order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class QuantizedBlocks:
    """A weight matrix as integer codes with one scale per block, in MatMulNBits' order.

    The weight of row n, block b, element i is

        scales[n, b] * (code[n, b, i] - 2**(bits - 1)) + correction[n, b]

    A `correction` (of block types that store a minimum) enters a graph as a second, small product:
    y = MatMulNBits(x) + sums of x over each block @ correction.T.
    """

    bits: int
    block_size: int
    codes: Bytes  # (N, K / block_size, block_size * bits / 8), low bits first
    scales: Float32  # (N, K / block_size)
    correction: Float32 | None  # (N, K / block_size)

    def dequantize(self) -> Float32:
        """The weights, (N, K) float32."""
        rows, blocks, _ = self.codes.shape
        if self.bits == 8:
            values = self.codes
        else:
            per_byte = 8 // self.bits
            shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(self.bits)
            split = (self.codes[..., None] >> shifts) & np.uint8((1 << self.bits) - 1)
            values = split.reshape(rows, blocks, self.block_size)
        weights = values.astype(np.float32)
        weights -= np.float32(1 << (self.bits - 1))
        weights *= self.scales[..., None]
        if self.correction is not None:
            weights += self.correction[..., None]
        return weights.reshape(rows, blocks * self.block_size)


class Source(Protocol):
    """Opened weights and config. Not for use by several threads at once.

    Raises CorruptFile when a file turns out shorter or different from what its header says.
    """

    @property
    def format(self) -> SourceFormat:
        """Which file format the weights come from."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`, or its equal built from GGUF metadata; has `model_type`."""
        ...

    @property
    def files(self) -> Mapping[str, Path]:
        """The files it was opened from."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All weights by Hugging Face name."""
        ...

    @property
    def quantization(self) -> str:
        """How most weights are stored, as shown to users: "Q4_K_M", "bf16"."""
        ...

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights as stored."""
        ...

    def read(self, name: str) -> Float32:
        """A whole tensor as float32."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Float32:
        """Rows start:stop (along the first axis) as float32, without reading the others."""
        ...

    def block_layout(self, name: str) -> BlockLayout | None:
        """The layout `blocks` gives, or None when the tensor is not stored in blocks."""
        ...

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedBlocks | None:
        """Rows start:stop of a matrix as stored, losslessly, or None when not stored in blocks."""
        ...

    def close(self) -> None:
        """Close the files; idempotent."""
        ...


def open_source(files: Mapping[str, Path]) -> Source:
    """Open a model from its files (name in the repository → path on disk).

    Where a LoRA adapter is among them, it is merged into the model.
    Raises UnsupportedModel when there are no weights we can read, CorruptFile when a file does not
    hold what it should, InvalidRequest when the files are not one model.
    """
    adapter = {name: files[name] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name in files}
    model = {name: path for name, path in files.items() if name not in adapter}
    if len(adapter) == 2 and any(
        name == CONFIG_FILE or name.lower().endswith(".gguf") for name in model
    ):
        from .adapter import AdapterSource

        return AdapterSource(open_source(model), adapter)
    gguf = {name: path for name, path in files.items() if name.lower().endswith(".gguf")}
    safetensors = [name for name in files if name.lower().endswith(".safetensors")]
    if gguf and safetensors:
        raise InvalidRequest(
            f"both GGUF ({min(gguf)}) and SafeTensors ({min(safetensors)}) weights were given; "
            "name the GGUF file alone, or leave it out"
        )
    if gguf:
        from .gguf_source import GgufSource

        return GgufSource(gguf)
    if safetensors:
        from .checkpoint_source import open_checkpoint
        from .safetensors import SafetensorsSource

        return open_checkpoint(SafetensorsSource(files))
    pickles = [name for name in files if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise UnsupportedModel(
            f"the weights are in {min(pickles)}, a format that can run code when opened; "
            "only SafeTensors and GGUF are read: look for a conversion of this model"
        )
    raise UnsupportedModel(
        "no weights found: a model needs *.safetensors files with a config.json, or a *.gguf file"
    )


def read_whole(source: Source, name: str) -> Float32:
    """A whole tensor of `source`, read some rows at a time."""
    shape = source.tensors[name].shape
    if len(shape) < 2:
        return source.read_rows(name, 0, shape[0] if shape else 1).reshape(shape)
    values = np.empty(shape, dtype=np.float32)
    for start, stop in row_chunks(shape[0], prod(shape[1:])):
        values[start:stop] = source.read_rows(name, start, stop)
    return values


def row_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """(start, stop) pairs that cut `rows` rows into pieces of about ROWS_CHUNK_ELEMENTS weights."""
    step = max(1, ROWS_CHUNK_ELEMENTS // max(columns, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def read_raw(file: BufferedReader, file_name: str, offset: int, rows: int, row_bytes: int) -> Bytes:
    """Bytes of a file from `offset`, as (rows, row_bytes). Raises CorruptFile at its end."""
    raw = np.empty((rows, row_bytes), dtype=np.uint8)
    # A plain read, not a mapping: a file cut short under us is an error here, not a SIGBUS, and
    # the pages do not count as this process's memory.
    try:
        file.seek(offset)
        got = file.readinto(raw.data.cast("B")) if raw.size else 0
    except OSError as error:
        raise CorruptFile(f"{file_name} cannot be read: {error.strerror}") from error
    if got != raw.size:
        raise CorruptFile(f"{file_name} ends before its last tensor; pull the model again")
    return raw
