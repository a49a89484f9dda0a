"""Round weights to 8 or 4 bits in groups, in the layout MatMulNBits reads. Pure functions.

A group of G weights along a row becomes integer codes c and one scale s; the weight it stands for
is s * (c - 2**(bits - 1)).
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


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of codes and scales: codes (N, groups, G * bits / 8) uint8, scales (N, groups)."""

    codes: Bytes
    scales: NDArray[Any]  # float32 or float16


def quantize_rows(
    rows: Float32, bits: int, group: int, scale_dtype: np.dtype[Any] | type = np.float32
) -> Quantized:
    """Quantise `rows`, (N, K) float32, with symmetric groups of `group` along K.

    Scales are rounded to `scale_dtype` before the codes are chosen. A last group that K does not
    fill is padded with zeros. A group with a NaN or an infinity gets a scale that is not finite.
    """
    groups = _groups(rows, group)  # (N, K / G, G)
    quantize = {8: _quantize_8, 4: _quantize_4}[bits]
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity show in the scales
        return quantize(groups, scale_dtype)


def dequantize_rows(quantized: Quantized, bits: int, columns: int) -> Float32:
    """The weights that the codes stand for, (N, columns) float32."""
    codes = quantized.codes
    if bits == 4:
        codes = np.stack((codes & 0x0F, codes >> 4), axis=-1).reshape(*codes.shape[:2], -1)
    values = codes.astype(np.float32) - np.float32(1 << (bits - 1))
    values *= quantized.scales.astype(np.float32)[..., None]
    return values.reshape(len(codes), -1)[:, :columns]


def _groups(rows: Float32, group: int) -> Float32:
    count, columns = rows.shape
    missing = -columns % group
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    return np.ascontiguousarray(rows).reshape(count, -1, group)


def _quantize_8(groups: Float32, scale_dtype: np.dtype[Any] | type) -> Quantized:
    largest = np.maximum(groups.max(axis=-1), -groups.min(axis=-1))
    scales = (largest / np.float32(127)).astype(scale_dtype)
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
    high, low = groups.max(axis=-1), groups.min(axis=-1)
    extreme = np.where(high > -low, high, low)  # (N, K / G)
    units = groups * _inverse(extreme)[..., None]  # the largest is 1: no overflow below
    best_fit = np.zeros_like(extreme)
    best_gain = np.full_like(extreme, -1)
    for step in _Q4_STEPS:
        codes = _clipped(units * np.float32(-step))
        product = np.einsum("nkg,nkg->nk", codes, units)
        norm = np.maximum(np.einsum("nkg,nkg->nk", codes, codes), np.float32(1))
        # The squared error after the refit is |w|^2 - product^2 / norm: the largest gain wins.
        gain = product * product / norm
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_fit, product / norm, where=better)
    scales = (best_fit * extreme).astype(scale_dtype)
    codes = _clipped(groups * _inverse(scales)[..., None])
    packed = (codes + np.float32(8)).astype(np.uint8)
    packed = packed[..., 0::2] | (packed[..., 1::2] << np.uint8(4))
    return Quantized(packed, scales)


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
