"""Round weights to 8 or 4 bits in groups, in the layout MatMulNBits reads. Pure functions.

A group of G weights along a row becomes integer codes c, one scale s and, where groups are
asymmetric, one integer zero point z; the weight it stands for is s * (c - z). Symmetric groups
have z = 2**(bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# How far the largest weight of a group may lie from the end of the 4-bit range: the steps that
# paid off when searched over real weights; the first is the plain rule "largest weight = -8".
_Q4_STEPS = (8.0, 7.5, 7.0, 8.6, 6.5)

# How much of an asymmetric group's range the codes span: what paid off over real weights. More
# steps, or zero points beside the nearest, take 1 to 3 % more off the error for twice the time.
_Q4_SPANS = (1.0, 0.92, 0.85, 0.78)


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of codes and scales: codes (N, groups, G * bits / 8) uint8, scales (N, groups).

    `zero_points`, of asymmetric 4-bit groups: (N, groups / 2 rounded up), two to a byte.
    """

    codes: Bytes
    scales: NDArray[Any]  # float32 or float16
    zero_points: Bytes | None = None


def quantize_rows(
    rows: Float32,
    bits: int,
    group: int,
    scale_dtype: np.dtype[Any] | type = np.float32,
    *,
    asymmetric: bool = False,
) -> Quantized:
    """Quantise `rows`, (N, K) float32, in groups of `group` along K.

    Groups are symmetric, or, of 4 bits, `asymmetric`. Scales are rounded to `scale_dtype` before
    the codes are chosen. A last group that K does not fill is padded with zeros. A group with a NaN
    or an infinity gets a scale that is not finite.
    """
    groups = _groups(rows, group)  # (N, K / G, G)
    if asymmetric:
        quantize = {4: _quantize_4_asymmetric}[bits]
    else:
        quantize = {8: _quantize_8, 4: _quantize_4}[bits]
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity show in the scales
        return quantize(groups, scale_dtype)


def dequantize_rows(quantized: Quantized, bits: int, columns: int) -> Float32:
    """The weights that the codes stand for, (N, columns) float32."""
    codes = quantized.codes
    if bits == 4:
        codes = unpack_nibbles(codes)
    values = codes.astype(np.float32)
    if quantized.zero_points is None:
        values -= np.float32(1 << (bits - 1))
    else:
        values -= unpack_nibbles(quantized.zero_points)[:, : codes.shape[1], None]
    values *= quantized.scales.astype(np.float32)[..., None]
    return values.reshape(len(codes), -1)[:, :columns]


def _groups(rows: Float32, group: int) -> Float32:
    count, columns = rows.shape
    missing = -columns % group
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return np.ascontiguousarray(rows).reshape(count, -1, group)


def _quantize_8(groups: Float32, scale_dtype: np.dtype[Any] | type) -> Quantized:
    scales = (_largest(groups) / np.float32(127)).astype(scale_dtype)
    work = groups * _inverse(scales)[..., None]
    np.rint(work, out=work)
    np.clip(work, -127, 127, out=work)
    work += np.float32(128)
    return Quantized(work.astype(np.uint8), scales)


def _quantize_4(groups: Float32, scale_dtype: np.dtype[Any] | type) -> Quantized:
    """Try a few scales per group and keep the one with the smallest squared error.

    The scale's sign puts the weight of largest magnitude at code 0, where the range reaches one
    step further (-8 … 7). After each rounding the scale is refitted to the codes by least squares.
    """
    low, high = _range(groups)
    extreme = np.where(high > -low, high, low)  # (N, K / G)
    units = groups * _inverse(extreme)[..., None]  # the largest is 1: no overflow below
    best_fit = np.zeros_like(extreme)
    best_gain = np.full_like(extreme, -1)
    codes = np.empty_like(units)
    for step in _Q4_STEPS:
        _clipped(np.multiply(units, np.float32(-step), out=codes))
        product = np.einsum("nkg,nkg->nk", codes, units)
        norm = np.maximum(np.einsum("nkg,nkg->nk", codes, codes), np.float32(1))
        # The squared error after the refit is |w|^2 - product^2 / norm: the largest gain wins.
        gain = product * product / norm
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_fit, product / norm, where=better)
    scales = (best_fit * extreme).astype(scale_dtype)
    _clipped(np.multiply(groups, _inverse(scales)[..., None], out=codes))
    codes += np.float32(8)
    return Quantized(pack_nibbles(codes.astype(np.uint8)), scales)


def _quantize_4_asymmetric(groups: Float32, scale_dtype: np.dtype[Any] | type) -> Quantized:
    """Try a few spans per group and keep the one with the smallest squared error.

    The zero point is the integer nearest to where the group's range has zero; after each rounding
    the scale is refitted to the codes by least squares.
    """
    low, high = _range(groups)
    step = (high - low) / np.float32(15)  # (N, K / G)
    inverse = _inverse(step)
    zero = np.rint(-low * inverse)
    units = groups * inverse[..., None]  # of about the codes' size: no overflow below
    best_fit = np.zeros_like(step)
    best_gain = np.full_like(step, -1)
    codes = np.empty_like(units)
    # Bounds of every code: reading them is faster than repeating one for each short group.
    bounds = np.empty_like(units), np.empty_like(units)
    bounds[0][...] = -zero[..., None]
    np.add(bounds[0], np.float32(15), out=bounds[1])
    for span in _Q4_SPANS:
        _round_within(bounds, np.multiply(units, np.float32(1 / span), out=codes))
        product = np.einsum("nkg,nkg->nk", codes, units)
        norm = np.maximum(np.einsum("nkg,nkg->nk", codes, codes), np.float32(1))
        gain = product * product / norm  # as in `_quantize_4`
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_fit, product / norm, where=better)
    scales = (best_fit * step).astype(scale_dtype)
    _round_within(bounds, np.multiply(groups, _inverse(scales)[..., None], out=codes))
    codes -= bounds[0]
    packed = pack_nibbles(codes.astype(np.uint8))
    return Quantized(packed, scales, pack_nibbles(zero.astype(np.uint8)))


def _round_within(bounds: tuple[Float32, Float32], values: Float32) -> None:
    """Round `values` in place to integers within `bounds`."""
    np.rint(values, out=values)
    np.maximum(values, bounds[0], out=values)
    np.minimum(values, bounds[1], out=values)


# The bits of floats compare as integers do, and numpy finds the largest integer of a short row
# twice as fast as the largest float. NaN lies beyond infinity in that order, so it still shows.


def _largest(groups: Float32) -> Float32:
    """The largest magnitude of each group."""
    magnitudes: NDArray[np.uint32] = groups.view(np.uint32) & np.uint32(0x7FFFFFFF)
    largest: Float32 = magnitudes.max(axis=-1).view(np.float32)
    return largest


def _range(groups: Float32) -> tuple[Float32, Float32]:
    """The smallest value of each group, or 0, and the largest, or 0."""
    high = np.maximum(groups.view(np.int32).max(axis=-1), np.int32(0)).view(np.float32)
    most = groups.view(np.uint32).max(axis=-1)  # the most negative, where there is a negative one
    low = np.where(most >> np.uint32(31), most, np.uint32(0)).view(np.float32)
    return low + np.float32(0) * high, high  # NaN, of either sign, is in `low` at least


def pack_nibbles(values: Bytes) -> Bytes:
    """(…, n) values below 16 → (…, n / 2 rounded up) bytes, the first in the low half."""
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    pairs = np.ascontiguousarray(values).view("<u2")  # first + 256 * second
    packed: Bytes = (pairs | (pairs >> np.uint16(4))).astype(np.uint8)
    return packed


def unpack_nibbles(packed: Bytes) -> Bytes:
    """(…, n) bytes → (…, 2n) values below 16."""
    return np.stack((packed & 0x0F, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)


def _clipped(values: Float32) -> Float32:
    """Rounded in place to the codes -8 … 7, as float32."""
    np.rint(values, out=values)
    return np.clip(values, -8, 7, out=values)


def _inverse(scales: NDArray[Any]) -> Float32:
    """1 / scale, and 0 for a group that is zero or too small to have a normal scale."""
    wide = scales.astype(np.float32)
    smallest = np.finfo(np.float32).tiny
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(wide) < smallest, np.float32(0), np.float32(1) / wide)
