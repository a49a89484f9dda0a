"""Chooses the next token from logits: penalties, biases, filters, temperature, a seeded draw.

Order of operations, llama.cpp's default chain except that biases come after the penalties, so that
a bias is exactly what is added:

    repetition, frequency, presence penalty → logit_bias → top_k → typical_p → top_p → min_p
    → temperature → draw

The filters see the distribution at temperature 1, each renormalised over what the one before left.
At temperature 0 the answer is the largest logit after penalties and biases; ties go to the lowest
id.

Every row is computed from its own logits with one-dimensional operations and from its own random
stream, one number per drawn token. So a sequence draws the same tokens alone and in any batch.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ohmygpu.core.errors import InvalidRequest, RuntimeFailure
from ohmygpu.runtime_api import SamplingParams

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5  # a temperature that small leaves no second token any chance
_BLOCK = 128  # logits whose sum or maximum is looked at as one


class SamplerState:
    """What the sampling of one sequence remembers: its random stream and the tokens it penalises.

    `prompt_ids` count as penalised text where they fall into the repetition window. Raises
    InvalidRequest when `logit_bias` names a token that the vocabulary does not have.
    """

    __slots__ = ("_bias_ids", "_biases", "_counts", "_random", "_window", "greedy", "params")

    def __init__(
        self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int] = ()
    ) -> None:
        for token_id in params.logit_bias:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequest(
                    f"logit_bias names token {token_id}; this model has the tokens 0 to "
                    f"{vocab_size - 1}",
                    param="logit_bias",
                )
        self.params = params
        self.greedy = params.temperature < GREEDY_BELOW
        # PCG64 wants a non-negative seed: two's complement keeps all 64-bit seeds apart
        seed = None if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._bias_ids = np.array(list(params.logit_bias.keys()), dtype=np.int64)
        self._biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        self._counts: dict[int, int] | None = None  # token id → how often it is in the window
        self._window: deque[int] | None = None
        if _penalises(params):
            window = params.repetition_window
            recent = prompt_ids[-window:] if window > 0 else prompt_ids
            self._counts = dict(Counter(recent))
            self._window = deque(recent) if window > 0 else None

    def accept(self, token_id: int) -> None:
        """Remember a token of the text, so that the penalties see it."""
        if self._counts is None:
            return
        self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._window is None:
            return
        self._window.append(token_id)
        if len(self._window) > self.params.repetition_window:
            oldest = self._window.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases apply, so that logits are not taken as they are."""
        return self._counts is not None or self._biases.size > 0

    def adjusted(self, row: Floats) -> Floats:
        """A copy of the logits (V,) with penalties and biases applied.

        The repetition penalty divides positive logits and multiplies negative ones (Keskar et al.
        2019, CTRL); the others subtract as the OpenAI API defines.
        """
        row = row.copy()
        if self._counts:
            params = self.params
            ids = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            seen = row[ids]
            scale = np.float32(params.repetition_penalty)
            seen = np.where(seen > 0, seen / scale, seen * scale)
            seen -= counts * np.float32(params.frequency_penalty)
            row[ids] = seen - np.float32(params.presence_penalty)
        if self._biases.size:
            row[self._bias_ids] += self._biases
        return row

    def draw(self) -> float:
        """The next number of the sequence's random stream, in [0, 1)."""
        return float(self._random.random())


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_window != 0 and (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def sample_rows(logits: Floats, states: Sequence[SamplerState]) -> Ints:
    """Next token ids, int64 (R,), from logits float32 (R, V), which stay as they are.

    The caller tells each state its token with `accept`. Raises RuntimeFailure when rows hold NaN or
    no finite logit; `details["rows"]` lists them, and nothing has been drawn for any row.
    """
    with np.errstate(over="ignore"):  # logits far below the largest become -inf: weight 0
        rows = [
            state.adjusted(row) if state.changes_logits else row
            for row, state in zip(logits, states, strict=True)
        ]
        if any(state.changes_logits for state in states):
            tokens = np.array([row.argmax() for row in rows], dtype=np.int64)
        else:
            tokens = logits.argmax(axis=1).astype(np.int64, copy=False)
        _check_finite([row[token] for row, token in zip(rows, tokens, strict=True)])
        for index, state in enumerate(states):
            if not state.greedy:
                tokens[index] = _sample(rows[index], rows[index][tokens[index]], state)
        return tokens


def _check_finite(largest: list[np.float32]) -> None:
    """Raise RuntimeFailure if a row's largest logit, which a NaN always is, is not finite."""
    bad = [row for row, logit in enumerate(largest) if not np.isfinite(logit)]
    if bad:
        raise RuntimeFailure(
            "the model computed logits that are not numbers; its weights may be damaged: "
            "remove it with omg model rm and pull it again, or compile it with another recipe",
            rows=bad,
        )


def _sample(row: Floats, largest: np.float32, state: SamplerState) -> int:
    """One drawn token id from logits (V,) whose maximum is `largest`."""
    temperature = state.params.temperature
    ids = _candidates(row, largest, state.params)
    if ids is None:
        return _draw_blocks(_weights(row, largest, temperature), state.draw())
    left = row[ids]
    return int(ids[_draw(_weights(left, left.max(), temperature), state.draw())])


def _weights(logits: Floats, largest: np.float32, temperature: float) -> Floats:
    """exp((logit - largest) / temperature), so the largest is 1: probabilities up to a factor."""
    weights = logits - largest
    if temperature != 1.0:
        weights *= np.float32(1.0 / temperature)
    np.exp(weights, out=weights)
    return weights


def _draw(weights: Floats, uniform: float) -> int:
    """Index drawn with probability proportional to weights (n,)."""
    total = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(total, uniform * total[-1], side="right"))
    return min(index, int(np.searchsorted(total, total[-1])))  # rounding up to the total itself


def _draw_blocks(weights: Floats, uniform: float) -> int:
    """As `_draw`, for a whole vocabulary: sums of blocks first, then inside one block."""
    starts = np.arange(0, weights.size, _BLOCK)
    sums = np.add.reduceat(weights, starts)
    total = np.cumsum(sums, dtype=np.float64)
    target = uniform * total[-1]
    block = min(
        int(np.searchsorted(total, target, side="right")), int(np.searchsorted(total, total[-1]))
    )
    before = total[block - 1] if block else 0.0
    start = block * _BLOCK
    inside = (target - before) / sums[block]
    return start + _draw(weights[start : start + _BLOCK], min(max(inside, 0.0), 1.0))


# --- filters -------------------------------------------------------------------------------------


def _candidates(row: Floats, largest: np.float32, params: SamplingParams) -> Ints | None:
    """Ids that the filters leave, ascending; None = all of them."""
    ids: Ints | None = None
    if 0 < params.top_k < row.size:
        ids = _top_k(row, params.top_k)
    if params.typical_p < 1.0:
        ids = _typical(row, ids, largest, params.typical_p)
    if params.top_p < 1.0:
        ids = _nucleus(row, ids, largest, params.top_p)
    if params.min_p > 0.0:
        values = row if ids is None else row[ids]
        # typical_p may have taken the largest logit, so the peak is that of what is left
        kept = np.flatnonzero(values >= values.max() + np.float32(np.log(params.min_p)))
        ids = kept if ids is None else ids[kept]
    return ids


def _top_k(row: Floats, k: int) -> Ints:
    """Ids of the k largest logits, ascending; of equal ones the lowest ids.

    The k-th largest of the blocks' maxima is a lower bound of the k-th largest logit, and few
    logits reach it: what has to be partitioned is small.
    """
    maxima = np.maximum.reduceat(row, np.arange(0, row.size, _BLOCK))
    if k > maxima.size:
        return _largest(row, k)
    bound = np.partition(maxima, maxima.size - k)[maxima.size - k]
    ids = np.flatnonzero(row >= bound)
    return ids[_largest(row[ids], k)]


def _largest(values: Floats, k: int) -> Ints:
    """Indices of the k largest values (n,), ascending; of equal ones the first. k < n or all."""
    if k >= values.size:
        return np.arange(values.size)
    kth = values[np.argpartition(values, values.size - k)[values.size - k]]
    keep = values > kth
    ties = np.flatnonzero(values == kth)
    keep[ties[: k - np.count_nonzero(keep)]] = True
    return np.flatnonzero(keep)


def _nucleus(row: Floats, ids: Ints | None, largest: np.float32, top_p: float) -> Ints:
    """The fewest ids whose probabilities reach top_p (Holtzman et al. 2020), ascending."""
    weights = _weights(row if ids is None else row[ids], largest, 1.0)
    total = float(weights.sum(dtype=np.float64))
    # all weights below this bound together miss less than 1 - top_p: the nucleus is above it
    above = np.flatnonzero(weights >= (1.0 - top_p) * total / weights.size)
    weights = weights[above]
    reached = np.cumsum(np.sort(weights)[::-1], dtype=np.float64)
    count = int(np.searchsorted(reached, top_p * total)) + 1
    kept = above[_largest(weights, count)]
    return kept if ids is None else ids[kept]


def _typical(row: Floats, ids: Ints | None, largest: np.float32, typical_p: float) -> Ints:
    """The fewest ids reaching typical_p whose surprise is nearest the entropy, ascending.

    Meister et al. 2023, Locally Typical Sampling.
    """
    shifted = (row if ids is None else row[ids]).astype(np.float64) - largest
    weights = np.exp(shifted)
    total = float(weights.sum())
    surprise = np.log(total) - shifted  # -log p
    entropy = float((weights * np.where(weights > 0, surprise, 0.0)).sum()) / total
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    count = int(np.searchsorted(np.cumsum(weights[order]), typical_p * total)) + 1
    kept = np.sort(order[:count])
    return kept if ids is None else ids[kept]
