"""Chooses the next token from logits. Signatures first; the bodies follow in the next commit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..runtime_api import SamplingParams


class SamplerState:
    """What one sequence's sampling remembers: its random stream and the tokens it penalises."""

    def __init__(
        self, params: SamplingParams, vocab_size: int, prompt_ids: Sequence[int] = ()
    ) -> None:
        raise NotImplementedError

    def accept(self, token_id: int) -> None:
        """Remember a chosen token."""
        raise NotImplementedError


def sample_rows(logits: np.ndarray, states: Sequence[SamplerState]) -> np.ndarray:
    """Next token ids, int64 (R,), from logits float32 (R, V); leaves `logits` as they are.

    Raises RuntimeFailure with details["rows"] when rows hold NaN; no random number is drawn then.
    """
    raise NotImplementedError
