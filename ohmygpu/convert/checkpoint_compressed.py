"""Linear layers as compressed-tensors stores them: packed integers, whole integers or 8-bit floats.

N outputs, K inputs, G groups; codes are signed, and packed ones stored plus 2**(bits - 1):

    pack-quantized   weight_packed I32 (N, K * bits / 32)  weight_scale (N, G)  weight_shape (2)
                     weight_zero_point I32 (N * bits / 32, G)   weight_g_idx (K)
    int-quantized    weight I8 (N, K)   weight_scale (N, 1) or 1   weight_zero_point I8, likewise
    float-quantized  weight F8 (N, K)   weight_scale: see `checkpoint_float8`

Format: the compressed-tensors package's own compressors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .checkpoint import Checkpoint
from .checkpoint_float8 import float8_matrix
from .checkpoint_integers import Groups, IntegerMatrix, StoredMatrix, companions, in_order
from .safetensors import SafetensorsSource
from .source import Bytes, Float32

_PACKED = {
    "weight_packed": True,
    "weight_scale": True,
    "weight_shape": True,
    "weight_zero_point": False,
    "weight_g_idx": False,
}
_WHOLE = {"weight": True, "weight_scale": True, "weight_zero_point": False}


def compressed_matrices(source: SafetensorsSource, checkpoint: Checkpoint) -> list[StoredMatrix]:
    """The layers of a compressed-tensors checkpoint."""
    found: list[StoredMatrix] = []
    for name, info in source.tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "weight_packed":
            found.append(_packed_matrix(source, prefix, checkpoint))
        elif last == "weight" and f"{prefix}.weight_scale" in source.tensors:
            if info.dtype == "I8":
                found.append(_whole_matrix(source, prefix))
            else:
                found.append(float8_matrix(source, name, f"{prefix}.weight_scale", checkpoint))
    return found


def _packed_matrix(source: SafetensorsSource, prefix: str, checkpoint: Checkpoint) -> IntegerMatrix:
    names = companions(prefix, _PACKED, source.tensors)
    stored = source.tensors[names["weight_packed"]]
    if stored.dtype != "I32" or len(stored.shape) != 2:
        raise _damaged(prefix)
    rows, columns = _logical_shape(source, names["weight_shape"], prefix)
    # Rows are filled up to whole int32.
    bits = next((bits for bits in (4, 8) if stored.shape[1] == -(-columns * bits // 32)), 0)
    if not bits:
        raise UnsupportedModel(
            f"the layer {prefix[:200]} is quantised to other than 4 or 8 bits; pull the original "
            "weights or a GGUF file of this model instead"
        )
    if stored.shape[0] != rows or columns % 2:
        raise _damaged(prefix)

    def packed(start: int, stop: int) -> Bytes:
        words = source.read_stored(names["weight_packed"], start, stop)
        return words.view(np.uint8)[:, : columns * bits // 8]

    def groups() -> Groups:
        scales = source.read(names["weight_scale"])
        scales = scales.reshape(-1, 1) if scales.ndim < 2 else scales
        count = scales.shape[1]
        zeros = np.full((rows, count), 1 << (bits - 1), np.int32)
        if "weight_zero_point" in names:
            zeros = _packed_zeros(source, names["weight_zero_point"], bits)[:rows]
        of_column = in_order(columns, count, checkpoint.group)
        if "weight_g_idx" in names:
            stored_order = source.read_stored(names["weight_g_idx"]).astype(np.int64)
            if (stored_order != -1).any():  # -1: columns are in the order of their groups
                of_column = stored_order
        scales = np.broadcast_to(scales, (rows, count)) if len(scales) == 1 else scales
        return Groups(scales, zeros, of_column)

    return IntegerMatrix(
        name=f"{prefix}.weight",
        shape=(rows, columns),
        bits=bits,
        dtype=f"INT{bits}",
        parts=tuple(names.values()),
        packed=packed,
        groups=groups,
    )


def _whole_matrix(source: SafetensorsSource, prefix: str) -> IntegerMatrix:
    names = companions(prefix, _WHOLE, source.tensors)
    shape = source.tensors[names["weight"]].shape
    if len(shape) != 2 or 0 in shape:
        raise _damaged(prefix)
    rows, columns = shape

    def packed(start: int, stop: int) -> Bytes:
        codes: Bytes = source.read_stored(names["weight"], start, stop).view(np.uint8)
        return codes ^ np.uint8(128)  # two's complement → plus 128

    def per_row(values: Float32) -> Float32:
        """One value for the matrix, or one for each row, as (N, 1)."""
        if values.size not in (1, rows):
            raise _damaged(prefix)
        return np.broadcast_to(values.reshape(-1, 1), (rows, 1))

    def groups() -> Groups:
        zeros = np.zeros((1,), np.float32)
        if "weight_zero_point" in names:
            zeros = source.read(names["weight_zero_point"])
        return Groups(
            scales=per_row(source.read(names["weight_scale"])),
            zeros=per_row(zeros).astype(np.int32) + np.int32(128),
            of_column=np.zeros(columns, np.int64),
        )

    return IntegerMatrix(
        name=names["weight"],
        shape=(rows, columns),
        bits=8,
        dtype="INT8",
        parts=tuple(names.values()),
        packed=packed,
        groups=groups,
    )


def _logical_shape(source: SafetensorsSource, name: str, prefix: str) -> tuple[int, int]:
    info = source.tensors[name]
    if info.elements != 2 or info.dtype not in ("I64", "I32"):
        raise _damaged(prefix)
    rows, columns = (int(size) for size in source.read_stored(name).ravel())
    if rows <= 0 or columns <= 0:
        raise _damaged(prefix)
    return rows, columns


def _packed_zeros(source: SafetensorsSource, name: str, bits: int) -> NDArray[np.int32]:
    """Zero points, packed along the outputs: (N * bits / 32, G) → (N, G)."""
    words = source.read_stored(name)
    if words.dtype != np.int32 or words.ndim != 2:
        raise _damaged(name)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[None, :, None]
    split = (words.view(np.uint32)[:, None, :] >> shifts) & np.uint32((1 << bits) - 1)
    return split.reshape(-1, words.shape[1]).astype(np.int32)


def _damaged(prefix: str) -> CorruptFile:
    return CorruptFile(
        f"the parts of the quantised layer {prefix[:200]} do not fit each other; pull the model "
        "again",
        tensor=prefix,
    )
