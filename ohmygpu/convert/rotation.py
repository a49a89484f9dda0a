"""Orthogonal matrices that spread outliers over many channels, cheap to apply.

Rounding activations to 8 bits with one scale per token is as bad as the token's largest value, and
in language models a few channels hold values tens of times larger than the others'. An orthogonal
matrix between a value and the weights that read it changes nothing but spreads each value over all
channels (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_MAX_BLOCK = 512  # of the Hadamard part: beyond that its product costs more than it spreads
_DIRECT_BLOCK = 64
_TOGETHER = 32


@cache
def hadamard(size: int) -> Float32:
    """The orthogonal, symmetric Hadamard matrix (size, size) of Sylvester; `size` a power of 2."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Float32 = matrix / np.sqrt(np.float32(size))
    return scaled


def hartley(size: int) -> Float32:
    """The orthogonal, symmetric matrix (size, size) of the discrete Hartley transform.

    Entry (j, k) is (cos t + sin t) / √size with t = 2π j k / size: dense for any size.
    """
    angles = 2 * np.pi * (np.outer(np.arange(size), np.arange(size)) % size) / size
    matrix: Float32 = ((np.cos(angles) + np.sin(angles)) / np.sqrt(size)).astype(np.float32)
    return matrix


def power_of_two(size: int, largest: int) -> int:
    """The largest power of 2 that divides `size`, at most `largest`."""
    return min(size & -size, largest)


class Rotation:
    """Q = diag(signs) (C ⊗ H), orthogonal, (size, size): C Hartley (m, m), H Hadamard (b, b).

    Rows are rotated as x Q: signs first, then cut into m blocks of b, H along the blocks, C across.
    The same size gives the same matrix on every machine.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.block = power_of_two(size, _MAX_BLOCK)  # b
        self.blocks = size // self.block  # m
        self.inner = hadamard(self.block)
        self.across = hartley(self.blocks)
        # RandomState is numpy's frozen generator: its numbers never change.
        draws = np.random.RandomState(size).randint(0, 2, size)
        self.signs = (2 * draws - 1).astype(np.float32)

    def rows(self, x: Float32) -> Float32:
        """x Q for each row of x, (N, size)."""
        spread = hadamard_rows(x * self.signs, self.block)
        parts = spread.reshape(-1, self.blocks, self.block)
        turned: Float32 = np.matmul(self.across, parts).reshape(x.shape)
        return turned


def hadamard_rows(x: Float32, block: int) -> Float32:
    """Each row of x, (N, K), with every `block` values multiplied by the Hadamard matrix.

    In two steps where the block is large: H(ab) = H(a) ⊗ H(b) takes a + b products instead of ab.
    """
    inner = block if block <= _DIRECT_BLOCK else _DIRECT_BLOCK // 2
    # In small pieces: a BLAS shares larger ones between threads of its own, and the callers' are
    # enough.
    together = power_of_two(x.size // inner, _TOGETHER)
    spread: Float32 = np.matmul(x.reshape(-1, together, inner), hadamard(inner))
    if block > inner:
        spread = np.matmul(hadamard(block // inner), spread.reshape(-1, block // inner, inner))
    return np.reshape(spread, x.shape)
