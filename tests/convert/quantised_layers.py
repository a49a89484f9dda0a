"""Quantises matrices and packs them as GPTQ, AWQ and compressed-tensors do, by their definitions.

Written value by value, unlike the reader: code number i of a word goes to bits i * bits and up.
Each function gives the stored tensors of one layer (suffix → array) and the weights they stand
for, (N, K) float32.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Layer = tuple[dict[str, NDArray[Any]], Float32]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs each nibble of a word holds


def gptq_layer(
    weight: Float32,
    bits: int,
    group: int,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    shift: int = 1,
    seed: int = 0,
) -> Layer:
    """qweight, qzeros, scales, g_idx; `shift` is taken from the zero points (1: first format)."""
    _, columns = weight.shape
    of_column = np.arange(columns) // group
    if act_order:
        of_column = np.random.default_rng(seed).permutation(of_column)
    codes, zeros, scales, weights = _rounded(weight, of_column, bits, symmetric)
    return {
        "qweight": _words(codes.T, bits),  # along the inputs
        "qzeros": _words((zeros - shift) % (1 << bits), bits).T,  # along the outputs
        "scales": scales.T,
        "g_idx": of_column.astype(np.int32),
    }, weights


def awq_layer(weight: Float32, group: int) -> Layer:
    """qweight, qzeros, scales of the GEMM layout; 4 bits with zero points."""
    of_column = np.arange(weight.shape[1]) // group
    codes, zeros, scales, weights = _rounded(weight, of_column, 4, symmetric=False)
    order = [8 * (index // 8) + AWQ_ORDER[index % 8] for index in range(len(weight))]
    return {
        "qweight": _words(codes[order], 4).T,
        "qzeros": _words(zeros[order], 4).T,
        "scales": scales.T,
    }, weights


def packed_layer(
    weight: Float32, bits: int, group: int, *, symmetric: bool = True, act_order: bool = False
) -> Layer:
    """compressed-tensors' pack-quantized: weight_packed, weight_scale, weight_shape, …"""
    of_column = np.arange(weight.shape[1]) // group
    if act_order:
        of_column = np.random.default_rng(5).permutation(of_column)
    codes, zeros, scales, weights = _rounded(weight, of_column, bits, symmetric)
    stored = {
        "weight_packed": _words(codes.T, bits).T,
        "weight_scale": scales.astype(ml_dtypes.bfloat16),
        "weight_shape": np.array(weight.shape, np.int64),
    }
    weights = scales.astype(ml_dtypes.bfloat16).astype(np.float32)[:, of_column] * (
        codes.astype(np.float32) - zeros[:, of_column]
    )
    if not symmetric:
        stored["weight_zero_point"] = _words(zeros, bits)
    if act_order:
        stored["weight_g_idx"] = of_column.astype(np.int32)
    return stored, weights


def int8_layer(weight: Float32) -> Layer:
    """compressed-tensors' int-quantized: int8 weights, one scale for each row."""
    scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.clip(np.rint(weight / scales), -128, 127).astype(np.int8)
    return {"weight": codes, "weight_scale": scales}, codes.astype(np.float32) * scales


def float8_layer(
    weight: Float32, block: tuple[int, int] | None, suffix: str = "weight_scale_inv"
) -> Layer:
    """weight in F8_E4M3 with a scale for each block (None: one for all)."""
    rows, columns = weight.shape
    height, width = block or weight.shape
    scales = np.empty((-(-rows // height), -(-columns // width)), np.float32)
    codes = np.empty(weight.shape, ml_dtypes.float8_e4m3fn)
    weights = np.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scales[i, j] = np.abs(weight[place]).max() / 448
            codes[place] = weight[place] / scales[i, j]
            weights[place] = codes[place].astype(np.float32) * scales[i, j]
    stored = scales if block else scales.reshape(())
    return {"weight": codes, suffix: stored}, weights


def _rounded(
    weight: Float32, of_column: NDArray[np.int64], bits: int, symmetric: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float16], Float32]:
    """(codes (N, K), zeros (N, G), scales (N, G), the weights they stand for)."""
    top = (1 << bits) - 1
    count = int(of_column.max()) + 1
    scales = np.empty((len(weight), count), np.float16)
    zeros = np.empty((len(weight), count), np.int64)
    for group in range(count):
        part = weight[:, of_column == group]
        if symmetric:
            scales[:, group] = np.abs(part).max(axis=1) / (top / 2)
            zeros[:, group] = 1 << (bits - 1)
        else:
            low = np.minimum(part.min(axis=1), 0)
            scales[:, group] = (np.maximum(part.max(axis=1), 0) - low) / top
            zeros[:, group] = np.clip(np.rint(-low / scales[:, group]), 1, top)
    wide = scales.astype(np.float32)[:, of_column]
    codes = np.clip(np.rint(weight / wide) + zeros[:, of_column], 0, top).astype(np.int64)
    weights = wide * (codes - zeros[:, of_column]).astype(np.float32)
    return codes, zeros, scales, weights.astype(np.float32)


def _words(values: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """(M, …) codes → (M * bits / 32, …) int32, the first code in the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((-(-len(values) // per_word), *values.shape[1:]), np.uint64)
    for index, row in enumerate(values):
        words[index // per_word] |= row.astype(np.uint64) << np.uint64(bits * (index % per_word))
    return words.astype(np.uint32).view(np.int32)
