from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from ohmygpu.runtime_onnx import divergence
from ohmygpu.runtime_onnx.divergence import Comparison

ROWS, VOCAB = 37, 11


def softmax(row: NDArray[np.float32]) -> list[float]:
    largest = max(map(float, row))
    weights = [math.exp(float(value) - largest) for value in row]
    return [weight / math.fsum(weights) for weight in weights]


def random_logits(seed: int, scale: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    return reference, reference + rng.normal(0, scale, (ROWS, VOCAB)).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 5.0])
@pytest.mark.parametrize("block", [1, 3 * VOCAB, 1 << 22])
def test_the_statistics_are_those_of_their_definitions(
    scale: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "_BLOCK_ELEMENTS", block)
    reference, logits = random_logits(1, scale)
    following = np.random.default_rng(2).integers(0, VOCAB, ROWS)
    comparison = Comparison()
    comparison.add(reference[:20], logits[:20], following[:20])
    comparison.add(reference[20:], logits[20:], following[20:])
    found = comparison.summary()
    wanted = [softmax(row) for row in reference]
    given = [softmax(row) for row in logits]
    kl = [
        math.fsum(p * math.log(p / q) for p, q in zip(*pair, strict=True))
        for pair in zip(wanted, given, strict=True)
    ]
    same = [p.index(max(p)) == q.index(max(q)) for p, q in zip(wanted, given, strict=True)]
    assert found["tokens"] == comparison.positions == ROWS
    assert found["kl_mean"] == pytest.approx(math.fsum(kl) / ROWS, rel=1e-6, abs=1e-15)
    assert found["kl_median"] == pytest.approx(sorted(kl)[ROWS // 2], rel=1e-6, abs=1e-15)
    assert sorted(kl)[-2] <= found["kl_p99"] * (1 + 1e-6) <= sorted(kl)[-1] * (1 + 2e-6)
    assert found["top1_agreement"] == sum(same) / ROWS
    for name, rows in (("perplexity", given), ("reference_perplexity", wanted)):
        losses = [-math.log(row[token]) for row, token in zip(rows, following, strict=True)]
        assert found[name] == pytest.approx(math.exp(math.fsum(losses) / ROWS), rel=1e-9)


def test_the_divergence_of_a_model_from_itself_is_nothing() -> None:
    reference, _ = random_logits(3, 0.0)
    comparison = Comparison()
    comparison.add(reference, reference.copy(), np.zeros(ROWS, np.int64))
    found = comparison.summary()
    assert (found["kl_mean"], found["kl_p99"], found["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert found["perplexity"] == found["reference_perplexity"]


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    reference, _ = random_logits(4, 0.0)
    comparison = Comparison()
    comparison.add(reference, reference + np.float32(64), np.zeros(ROWS, np.int64))
    assert comparison.summary()["kl_mean"] < 1e-10


def test_tokens_that_are_impossible_in_float32_add_nothing() -> None:
    reference = np.array([[0.0, 0.0, -np.inf]], np.float32)
    logits = np.array([[0.0, 0.0, -np.inf], [0.0, 0.0, 0.0]], np.float32)
    comparison = Comparison()
    comparison.add(np.repeat(reference, 2, axis=0), logits, np.zeros(2, np.int64))
    assert comparison.summary()["kl_mean"] == pytest.approx((0 + math.log(3 / 2)) / 2)


def test_the_direction_is_from_float32_to_the_graph() -> None:
    certain, open_minded = np.array([[20.0, 0.0]], np.float32), np.zeros((1, 2), np.float32)
    there, back = Comparison(), Comparison()
    there.add(certain, open_minded, np.zeros(1, np.int64))
    back.add(open_minded, certain, np.zeros(1, np.int64))
    assert there.summary()["kl_mean"] == pytest.approx(math.log(2), rel=1e-6)
    assert back.summary()["kl_mean"] == pytest.approx(10 - math.log(2), rel=1e-6)
