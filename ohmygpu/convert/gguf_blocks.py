"""GGUF's block types: what each byte means, as float32 or as MatMulNBits codes.

Every type is described once, by a decoder that splits raw blocks into small integers, one scale
per group and, where the type has one, a minimum per group:

    weight = scale * integer + minimum

Both uses follow from it: `dequantize` evaluates the formula in float32 (each product is exact:
an 11-bit scale times at most 6 bits of sub-scale times at most 8 bits), `repack` shifts the
integers into unsigned codes without touching their values.

Layouts: the `block_*` structs of ggml (ggml-common.h); E8M0 and E2M1 of MXFP4: the OCP
Microscaling Formats specification 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile

from .source import BlockLayout, Bytes, Float32, QuantizedBlocks

Integers = NDArray[np.int8]

_SUPER = 256  # weights in a block of the K types

# Values of the 4-bit codes of IQ4_NL and IQ4_XS, and twice the values of E2M1 (MXFP4).
_NONLINEAR_4BIT = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8
)
_TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)
_MXFP4_TOP_EXPONENT = 252  # 12 * 2**(252 - 128) is still a float32


@dataclass(frozen=True, slots=True)
class Decoded:
    """Blocks split into parts; G groups of equal size in each of R rows of K weights."""

    integers: Integers  # (R, K)
    scales: Float32  # (R, G)
    minima: Float32 | None  # (R, G)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One GGUF block type and the MatMulNBits layout it maps to.

    A code is `integer + code_offset`; it must fit in `bits` unsigned bits.
    """

    name: str
    elements: int  # weights in a block
    nbytes: int  # bytes of a block
    bits: int
    group: int  # weights that share a scale
    code_offset: int
    has_minima: bool
    decode: Callable[[Bytes], Decoded]  # blocks (R, blocks in a row, nbytes)

    @property
    def layout(self) -> BlockLayout:
        """The layout `repack` gives."""
        return BlockLayout(self.bits, self.group, self.has_minima)


def dequantize(block_type: BlockType, raw: Bytes) -> Float32:
    """Rows of raw blocks, (R, row bytes) → weights, (R, K) float32."""
    decoded = _decode(block_type, raw)
    rows, groups = decoded.scales.shape
    weights = decoded.integers.astype(np.float32).reshape(rows, groups, block_type.group)
    weights *= decoded.scales[..., None]
    if decoded.minima is not None:
        weights += decoded.minima[..., None]
    return weights.reshape(rows, groups * block_type.group)


def repack(block_type: BlockType, raw: Bytes) -> QuantizedBlocks:
    """Rows of raw blocks, (R, row bytes) → the same weights as MatMulNBits codes."""
    decoded = _decode(block_type, raw)
    rows, groups = decoded.scales.shape
    # int8 + offset wraps to the right unsigned byte, also for offsets above 127
    codes = decoded.integers.view(np.uint8) + np.uint8(block_type.code_offset)
    correction = None
    if decoded.minima is not None:
        shift = (1 << (block_type.bits - 1)) - block_type.code_offset
        correction = decoded.minima + np.float32(shift) * decoded.scales
    return QuantizedBlocks(
        bits=block_type.bits,
        block_size=block_type.group,
        codes=_pack(codes.reshape(rows, groups, block_type.group), block_type.bits),
        scales=decoded.scales,
        correction=correction,
    )


def _decode(block_type: BlockType, raw: Bytes) -> Decoded:
    with np.errstate(invalid="ignore"):  # infinity times zero: refused just below
        decoded = block_type.decode(raw.reshape(raw.shape[0], -1, block_type.nbytes))
    for part in (decoded.scales, decoded.minima):
        if part is not None and not np.isfinite(part).all():
            raise CorruptFile(f"a {block_type.name} block has a scale that is not a finite number")
    return decoded


def _pack(codes: Bytes, bits: int) -> Bytes:
    """(R, G, group) codes → (R, G, group * bits / 8) bytes, low bits first."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    packed = codes[..., ::per_byte].copy()
    for index in range(1, per_byte):
        packed |= codes[..., index::per_byte] << np.uint8(bits * index)
    return packed


def _half(blocks: Bytes, offset: int) -> Float32:
    """The float16 at `offset` of each block as float32, (R, blocks)."""
    pair = np.ascontiguousarray(blocks[..., offset : offset + 2])
    return pair.view("<f2")[..., 0].astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """(…, n) bytes → (…, 2n): all low nibbles, then all high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def _bit_planes(packed: Bytes, bits: int) -> Bytes:
    """(…, n) bytes → (…, 8/bits, n): plane i holds bits i*bits… of every byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _flat(blocks: Bytes, integers: NDArray[np.uint8] | Integers) -> Integers:
    return integers.reshape(blocks.shape[0], -1).view(np.int8)


def _fifth_bits(packed: Bytes) -> Bytes:
    """4 bytes of Q5_0 and Q5_1 → the 32 fifth bits, each already worth 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Decoded:
    integers = _nibbles(blocks[..., 2:]) - np.uint8(8)
    return Decoded(_flat(blocks, integers), _half(blocks, 0), None)


def _q4_1(blocks: Bytes) -> Decoded:
    return Decoded(_flat(blocks, _nibbles(blocks[..., 4:])), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> Decoded:
    integers = (_nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])) - np.uint8(16)
    return Decoded(_flat(blocks, integers), _half(blocks, 0), None)


def _q5_1(blocks: Bytes) -> Decoded:
    integers = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Decoded(_flat(blocks, integers), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> Decoded:
    return Decoded(_flat(blocks, blocks[..., 2:]), _half(blocks, 0), None)


def _two_bits(packed: Bytes) -> Bytes:
    """64 bytes of Q2_K, Q3_K and TQ2_0 → 256 two-bit values: (…, 2 halves, 4 planes, 32)."""
    return _bit_planes(packed.reshape(*packed.shape[:-1], 2, 32), 2)


def _q2_k(blocks: Bytes) -> Decoded:
    scales_and_minima = blocks[..., :16]
    scale = _half(blocks, 80)[..., None] * (scales_and_minima & np.uint8(15))
    minimum = -_half(blocks, 82)[..., None] * (scales_and_minima >> np.uint8(4))
    rows = blocks.shape[0]
    return Decoded(
        _flat(blocks, _two_bits(blocks[..., 16:80])),
        scale.reshape(rows, -1),
        minimum.reshape(rows, -1),
    )


def _q3_k(blocks: Bytes) -> Decoded:
    high = np.unpackbits(blocks[..., :32, None], axis=-1, bitorder="little")  # (…, 32, 8 planes)
    low = _two_bits(blocks[..., 32:96])
    # A set mask bit means that 4 is NOT subtracted.
    value = (low | (high.swapaxes(-1, -2).reshape(low.shape) << np.uint8(2))) - np.uint8(4)
    packed = blocks[..., 96:108]
    four = np.concatenate([packed[..., :8] & np.uint8(15), packed[..., :8] >> np.uint8(4)], axis=-1)
    two = _bit_planes(packed[..., 8:], 2).reshape(four.shape)
    sub_scale = (four | (two << np.uint8(4))).astype(np.int8) - np.int8(32)
    scale = _half(blocks, 108)[..., None] * sub_scale
    return Decoded(_flat(blocks, value), scale.reshape(blocks.shape[0], -1), None)


def _six_bit_pairs(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes of Q4_K and Q5_K → eight 6-bit sub-scales and eight 6-bit sub-minima."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    low_six, low_four, top_two = np.uint8(63), np.uint8(15), np.uint8(6)
    four = np.uint8(4)
    scales = [first & low_six, (third & low_four) | ((first >> top_two) << four)]
    minima = [second & low_six, (third >> four) | ((second >> top_two) << four)]
    return np.concatenate(scales, axis=-1), np.concatenate(minima, axis=-1)


def _scales_and_minima(blocks: Bytes) -> tuple[Float32, Float32]:
    sub_scales, sub_minima = _six_bit_pairs(blocks[..., 4:16])
    scale = _half(blocks, 0)[..., None] * sub_scales
    minimum = -_half(blocks, 2)[..., None] * sub_minima
    return scale.reshape(blocks.shape[0], -1), minimum.reshape(blocks.shape[0], -1)


def _q4_k(blocks: Bytes) -> Decoded:
    packed = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    return Decoded(_flat(blocks, _nibbles(packed)), *_scales_and_minima(blocks))


def _q5_k(blocks: Bytes) -> Decoded:
    high = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little").swapaxes(-1, -2)
    low = _nibbles(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(high.shape)
    return Decoded(_flat(blocks, low | (high << np.uint8(4))), *_scales_and_minima(blocks))


def _q6_k(blocks: Bytes) -> Decoded:
    low = _nibbles(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))  # (…, 2 halves, 128)
    high = _bit_planes(blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 32), 2)
    value = (low | (high.reshape(low.shape) << np.uint8(4))) - np.uint8(32)
    sub_scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    scale = _half(blocks, 208)[..., None] * sub_scales
    return Decoded(_flat(blocks, value), scale.reshape(blocks.shape[0], -1), None)


def _iq4_nl(blocks: Bytes) -> Decoded:
    return Decoded(
        _flat(blocks, _NONLINEAR_4BIT[_nibbles(blocks[..., 2:])]), _half(blocks, 0), None
    )


def _iq4_xs(blocks: Bytes) -> Decoded:
    high = _bit_planes(blocks[..., 2:4], 2)  # (…, 4 planes, 2 bytes): sub-block = 4 * byte + plane
    high = high.swapaxes(-1, -2).reshape(*blocks.shape[:2], 8)
    low = _bit_planes(blocks[..., 4:8], 4).swapaxes(-1, -2).reshape(*blocks.shape[:2], 8)
    sub_scale = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    scale = _half(blocks, 0)[..., None] * sub_scale
    packed = blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16)
    integers = _NONLINEAR_4BIT[_nibbles(packed)]
    return Decoded(_flat(blocks, integers), scale.reshape(blocks.shape[0], -1), None)


def _mxfp4(blocks: Bytes) -> Decoded:
    # E8M0 holds exponent + 127; one more halves the doubled E2M1 values. 2**-128 is a subnormal.
    exponent = blocks[..., 0].astype(np.int32)
    if (exponent > _MXFP4_TOP_EXPONENT).any():
        raise CorruptFile("an MXFP4 block has weights too large for a float32")
    scale = np.ldexp(np.float32(1), exponent - 128)
    return Decoded(_flat(blocks, _TWICE_E2M1[_nibbles(blocks[..., 1:])]), scale, None)


def _trits(packed: Bytes, count: int) -> Bytes:
    """(…, n) bytes → (…, count * n) digits 0, 1, 2: the first digit of all bytes, the second, …

    A byte holds its digits as a fraction of 256, the first one highest: multiplied by 3**i in a
    byte, the i-th is in front, and times 3 it is what carries into the next byte.
    """
    shifted = packed[..., None, :] * np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    digits = (shifted.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)
    return digits.astype(np.uint8).reshape(*packed.shape[:-1], -1)


def _tq1_0(blocks: Bytes) -> Decoded:
    parts = [
        _trits(blocks[..., :32], 5),
        _trits(blocks[..., 32:48], 5),
        _trits(blocks[..., 48:52], 4),
    ]
    value = np.concatenate(parts, axis=-1)
    scale = np.repeat(_half(blocks, 52), _SUPER // 64, axis=-1)
    return Decoded(_flat(blocks, value - np.uint8(1)), scale, None)


def _tq2_0(blocks: Bytes) -> Decoded:
    value = _two_bits(blocks[..., :64])
    if (value == 3).any():
        raise CorruptFile("a TQ2_0 block has a weight that is none of -1, 0, 1")
    scale = np.repeat(_half(blocks, 64), _SUPER // 64, axis=-1)
    return Decoded(_flat(blocks, value - np.uint8(1)), scale, None)


BLOCK_TYPES: dict[str, BlockType] = {
    entry.name: entry
    for entry in (
        BlockType("Q4_0", 32, 18, 4, 32, 8, False, _q4_0),
        BlockType("Q4_1", 32, 20, 4, 32, 0, True, _q4_1),
        BlockType("Q5_0", 32, 22, 8, 32, 128, False, _q5_0),
        BlockType("Q5_1", 32, 24, 8, 32, 112, True, _q5_1),
        BlockType("Q8_0", 32, 34, 8, 32, 128, False, _q8_0),
        BlockType("Q2_K", _SUPER, 84, 4, 16, 8, True, _q2_k),
        BlockType("Q3_K", _SUPER, 110, 4, 16, 8, False, _q3_k),
        BlockType("Q4_K", _SUPER, 144, 4, 32, 0, True, _q4_k),
        BlockType("Q5_K", _SUPER, 176, 8, 32, 112, True, _q5_k),
        BlockType("Q6_K", _SUPER, 210, 8, 16, 128, False, _q6_k),
        BlockType("IQ4_NL", 32, 18, 8, 32, 128, False, _iq4_nl),
        BlockType("IQ4_XS", _SUPER, 136, 8, 32, 128, False, _iq4_xs),
        BlockType("MXFP4", 32, 17, 8, 32, 128, False, _mxfp4),
        BlockType("TQ1_0", _SUPER, 54, 2, 64, 2, False, _tq1_0),
        BlockType("TQ2_0", _SUPER, 66, 2, 64, 2, False, _tq2_0),
    )
}
"""Block types by name, with the sizes, codes and offsets that make `repack` lossless."""
