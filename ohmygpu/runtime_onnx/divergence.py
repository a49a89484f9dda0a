"""Compares two models' next-token distributions, position by position."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Float64 = NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 22  # logits converted to float64 at a time: 32 MB


class Comparison:
    """Collects what two sets of logits say of the same positions; small whatever V is."""

    def __init__(self) -> None:
        self._divergence: list[Float64] = []
        self._same: list[NDArray[np.bool_]] = []
        self._reference_loss: list[Float64] = []
        self._loss: list[Float64] = []

    @property
    def positions(self) -> int:
        """Positions collected so far."""
        return sum(len(part) for part in self._divergence)

    def add(self, reference: Logits, logits: Logits, next_ids: NDArray[np.int64]) -> None:
        """Collect positions: two times logits (R, V), and the tokens (R,) that really follow.

        KL(p ‖ q) = Σ p log(p / q), in float64, since it may be a millionth of its terms.
        """
        step = max(1, _BLOCK_ELEMENTS // reference.shape[1])
        for start in range(0, len(next_ids), step):
            rows = slice(start, start + step)
            wanted, found = log_softmax(reference[rows]), log_softmax(logits[rows])
            following = next_ids[rows, None]
            self._reference_loss.append(-np.take_along_axis(wanted, following, 1)[:, 0])
            self._loss.append(-np.take_along_axis(found, following, 1)[:, 0])
            self._same.append(wanted.argmax(axis=1) == found.argmax(axis=1))
            with np.errstate(invalid="ignore"):
                difference = np.subtract(wanted, found, out=found)
            difference[np.isneginf(wanted)] = 0.0  # 0 log 0 adds nothing, whatever the other says
            self._divergence.append((np.exp(wanted, out=wanted) * difference).sum(axis=1))

    def summary(self) -> dict[str, Any]:
        """The statistics that a Fidelity holds, over everything collected (at least a position)."""
        divergence = np.concatenate(self._divergence)
        loss, reference_loss = np.concatenate(self._loss), np.concatenate(self._reference_loss)
        return {
            "kl_mean": float(divergence.mean()),
            "kl_median": float(np.median(divergence)),
            "kl_p99": float(np.quantile(divergence, 0.99)),
            "top1_agreement": float(np.concatenate(self._same).mean()),
            "perplexity": float(np.exp(loss.mean())),
            "reference_perplexity": float(np.exp(reference_loss.mean())),
            "tokens": len(divergence),
        }


def log_softmax(logits: Logits) -> Float64:
    """log softmax of each row (R, V), in float64."""
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    return values
