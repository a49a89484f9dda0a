"""Hadamard matrices: orthogonal, so nothing is lost, and every value is spread over many others.

Rounding activations to 8 bits with one scale per token is as bad as the token's largest value, and
in language models a few channels hold values tens of times larger than the others'. A Hadamard
matrix H between a value and the weights that read it changes nothing, since x Wᵀ = (x H) (W H)ᵀ,
but spreads each channel over all of its block (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_TOGETHER = 32


@cache
def hadamard(size: int) -> Float32:
    """The orthogonal, symmetric Hadamard matrix (size, size) of Sylvester; `size` a power of 2."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Float32 = matrix / np.sqrt(np.float32(size))
    return scaled


def power_of_two(size: int, largest: int) -> int:
    """The largest power of 2 that divides `size`, at most `largest`."""
    return min(size & -size, largest)


def spread_rows(x: Float32, block: int) -> Float32:
    """Each row of x, (N, K), with every `block` values multiplied by the Hadamard matrix."""
    # In small pieces: a BLAS shares larger ones between threads of its own, and the callers' are
    # enough.
    together = power_of_two(x.size // block, _TOGETHER)
    spread: Float32 = np.matmul(x.reshape(-1, together, block), hadamard(block))
    return np.reshape(spread, x.shape)
