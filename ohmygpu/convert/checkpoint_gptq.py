"""Linear layers as GPTQ and AWQ store them: qweight, qzeros, scales and, with act-order, g_idx.

N outputs, K inputs, G groups, P = 32 / bits codes in an int32, low bits first:

    GPTQ  qweight (K / P, N)   qzeros (G, N / P)   scales (G, N)   g_idx (K)
    AWQ   qweight (K, N / P)   qzeros (G, N / P)   scales (G, N)

GPTQ's first format stores zero points less one, which readers add to the whole int32 (so that
what a writer let wrap around comes back). AWQ's GEMM layout interleaves the eight outputs of an
int32. Both as in the quantisers themselves: AutoGPTQ / GPTQModel, AutoAWQ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .checkpoint import Checkpoint
from .checkpoint_integers import Groups, IntegerMatrix, companions, in_order, pack
from .safetensors import SafetensorsSource
from .source import Bytes

# Output c of eight is in these bits of AWQ's int32, counted in fours.
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
_SUFFIXES = {"qweight": True, "qzeros": True, "scales": True, "g_idx": False}


class _Stored:
    """The tensors of one layer, read when first needed and kept until released."""

    def __init__(self, source: SafetensorsSource, prefix: str) -> None:
        self.prefix = prefix
        self.names = companions(prefix, _SUFFIXES, source.tensors)
        self._source = source
        self._codes: NDArray[np.int32] | None = None
        for suffix, name in self.names.items():
            info = source.tensors[name]
            wanted = 1 if suffix == "g_idx" else 2
            is_integer = info.dtype in ("I32", "U32")
            if len(info.shape) != wanted or is_integer == (suffix == "scales"):
                raise self.damaged(f"{suffix} is {info.dtype} {list(info.shape)}")

    def shape(self, suffix: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._source.tensors[self.names[suffix]].shape

    def integers(self, suffix: str) -> NDArray[np.int32]:
        """A whole stored tensor of int32."""
        return self._source.read_stored(self.names[suffix]).view(np.int32)

    def codes(self) -> NDArray[np.int32]:
        """qweight, kept: its rows are inputs, so every output needs all of it."""
        if self._codes is None:
            self._codes = self.integers("qweight")
        return self._codes

    def release(self) -> None:
        """Forget qweight."""
        self._codes = None

    def groups(self, checkpoint: Checkpoint, columns: int, nibbles: tuple[int, ...]) -> Groups:
        """Scales and zero points by output; `nibbles`: places of the outputs in an int32."""
        bits = 32 // len(nibbles)
        scales = self._source.read(self.names["scales"]).T
        zeros = self.integers("qzeros")
        if checkpoint.zero_point_shift:
            ones = sum(checkpoint.zero_point_shift << (bits * place) for place in range(32 // bits))
            zeros = (zeros.view(np.uint32) + np.uint32(ones)).view(np.int32)
        words = zeros.view(np.uint32)[..., None]
        shifts = np.array(nibbles, np.uint32) * np.uint32(bits)
        split = (words >> shifts) & np.uint32((1 << bits) - 1)  # (G, N / P, P)
        by_output = split.reshape(len(zeros), -1)[:, : len(scales)].T.astype(np.int32)
        if "g_idx" in self.names:
            of_column = self.integers("g_idx").astype(np.int64)
        else:
            of_column = in_order(columns, scales.shape[1], checkpoint.group)
        return Groups(np.ascontiguousarray(scales), np.ascontiguousarray(by_output), of_column)

    def damaged(self, what: str) -> CorruptFile:
        """An error about this layer."""
        return CorruptFile(
            f"the quantised layer {self.prefix[:200]} is damaged: {what}; pull the model again",
            tensor=self.prefix,
        )


def gptq_matrices(source: SafetensorsSource, checkpoint: Checkpoint) -> list[IntegerMatrix]:
    """The layers of a GPTQ checkpoint."""
    return [_gptq_matrix(_Stored(source, name), checkpoint) for name in _prefixes(source)]


def awq_matrices(source: SafetensorsSource, checkpoint: Checkpoint) -> list[IntegerMatrix]:
    """The layers of an AWQ checkpoint in the GEMM layout."""
    return [_awq_matrix(_Stored(source, name), checkpoint) for name in _prefixes(source)]


def _prefixes(source: SafetensorsSource) -> list[str]:
    ending = ".qweight"
    return [name.removesuffix(ending) for name in source.tensors if name.endswith(ending)]


def _gptq_matrix(stored: _Stored, checkpoint: Checkpoint) -> IntegerMatrix:
    words, rows = stored.shape("qweight")
    columns = stored.shape("g_idx")[0] if "g_idx" in stored.names else words * 32 // checkpoint.bits
    bits = words * 32 // max(columns, 1)  # a layer may have other bits than most
    if bits not in (4, 8) or bits * columns != words * 32:
        raise UnsupportedModel(
            f"the layer {stored.prefix[:200]} is quantised to {words * 32 / max(columns, 1):g} "
            "bits; 4 and 8 can be read: pull the original weights or a GGUF file instead"
        )
    codes_per_word = 32 // bits
    _check_groups(stored, rows, codes_per_word)

    def packed(start: int, stop: int) -> Bytes:
        part = np.ascontiguousarray(stored.codes()[:, start:stop].T, dtype="<i4")
        return part.view(np.uint8)  # (R, K / P * 4): an int32's bytes hold its codes in order

    return IntegerMatrix(
        name=f"{stored.prefix}.weight",
        shape=(rows, columns),
        bits=bits,
        dtype=f"GPTQ_INT{bits}",
        parts=tuple(stored.names.values()),
        packed=packed,
        groups=lambda: stored.groups(checkpoint, columns, tuple(range(codes_per_word))),
        forget=stored.release,
    )


def _awq_matrix(stored: _Stored, checkpoint: Checkpoint) -> IntegerMatrix:
    columns, words = stored.shape("qweight")
    rows = words * 8
    if columns % 2:
        raise stored.damaged(f"it has {columns} inputs")
    _check_groups(stored, rows, 8)

    def packed(start: int, stop: int) -> Bytes:
        first, last = start // 8, -(-stop // 8)
        part = stored.codes()[:, first:last].view(np.uint32)
        codes = np.empty(((last - first) * 8, columns), np.uint8)
        for output, nibble in enumerate(_AWQ_NIBBLES):
            codes[output::8] = ((part >> np.uint32(4 * nibble)) & np.uint32(15)).T
        return pack(codes[start - first * 8 : stop - first * 8], 4)

    return IntegerMatrix(
        name=f"{stored.prefix}.weight",
        shape=(rows, columns),
        bits=4,
        dtype="AWQ_INT4",
        parts=tuple(stored.names.values()),
        packed=packed,
        groups=lambda: stored.groups(checkpoint, columns, _AWQ_NIBBLES),
        forget=stored.release,
    )


def _check_groups(stored: _Stored, rows: int, codes_per_word: int) -> None:
    count = stored.shape("scales")[0]
    expected = (count, -(-rows // codes_per_word))
    if stored.shape("scales") != (count, rows) or stored.shape("qzeros") != expected:
        raise stored.damaged("its scales and zero points have other sizes than its weights")
