"""4-bit rounding that knows the inputs: the layer's output is what has to stay close."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ohmygpu.convert.error_feedback import Feedback
from ohmygpu.convert.quantize import dequantize_rows, quantize_rows

Float32 = NDArray[np.float32]
RNG = np.random.default_rng(4)
COLUMNS = 128


def weights(rows: int = 96) -> Float32:
    return RNG.standard_normal((rows, COLUMNS)).astype(np.float32)


def inputs(correlated: bool) -> Float32:
    """2000 inputs (X, K); correlated ones have eight directions that carry most of them."""
    noise = RNG.standard_normal((2000, COLUMNS))
    if correlated:
        noise = 0.2 * noise + RNG.standard_normal((2000, 8)) @ RNG.standard_normal((8, COLUMNS))
    return noise.astype(np.float32)


def feedback_of(x: Float32) -> Feedback:
    return Feedback(x.T @ x, (x * x).sum(axis=0))


def output_error(rounded: Float32, wanted: Float32, x: Float32) -> float:
    return float(np.linalg.norm(x @ (rounded - wanted).T) / np.linalg.norm(x @ wanted.T))


@pytest.mark.parametrize("group", [32, 64])
def test_correlated_inputs_let_columns_make_up_for_each_other(group: int) -> None:
    rows, x = weights(), inputs(correlated=True)
    plain = dequantize_rows(quantize_rows(rows, 4, group, asymmetric=True), 4, COLUMNS)
    found = dequantize_rows(feedback_of(x).quantize(rows, group), 4, COLUMNS)
    assert output_error(found, rows, x) < 0.5 * output_error(plain, rows, x)


def test_uncorrelated_inputs_leave_nothing_to_gain_or_lose() -> None:
    rows = weights()
    plain = dequantize_rows(quantize_rows(rows, 4, 32, asymmetric=True), 4, COLUMNS)
    found = Feedback(np.eye(COLUMNS, dtype=np.float32) * 5, np.ones(COLUMNS, np.float32)).quantize(
        rows, 32
    )
    errors = [
        np.linalg.norm(dequantize_rows(found, 4, COLUMNS) - rows),
        np.linalg.norm(plain - rows),
    ]
    assert 0.9 < errors[0] / errors[1] < 1.05


def test_inputs_that_matter_more_are_met_better() -> None:
    rows, important = weights(), np.ones(COLUMNS, np.float32)
    important[::4] = 400
    found = dequantize_rows(Feedback(np.diag(important), important).quantize(rows, 32), 4, COLUMNS)
    errors = np.abs(found - rows)
    assert errors[:, ::4].mean() < 0.8 * errors[:, 1::4].mean()


def test_inputs_that_are_always_zero_change_nothing_else() -> None:
    rows, x = weights(), inputs(correlated=True)
    x[:, 5] = 0
    found = feedback_of(x).quantize(rows, 32)
    assert np.isfinite(found.scales).all()
    again = rows.copy()
    again[:, 5] = 1e6
    np.testing.assert_array_equal(feedback_of(x).quantize(again, 32).codes, found.codes)


def test_rows_are_independent_of_each_other() -> None:
    rows, x = weights(), inputs(correlated=True)
    feedback = feedback_of(x)
    whole, part = feedback.quantize(rows, 32), feedback.quantize(rows[10:20], 32)
    assert whole.zero_points is not None
    assert part.zero_points is not None
    np.testing.assert_array_equal(whole.codes[10:20], part.codes)
    np.testing.assert_array_equal(whole.zero_points[10:20], part.zero_points)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_no_number_shows_in_the_scales_of_its_row_alone(bad: float) -> None:
    rows, x = weights(8), inputs(correlated=True)
    rows[3, 40] = bad
    finite = np.isfinite(feedback_of(x).quantize(rows, 32).scales).all(axis=1)
    assert list(finite) == [True] * 3 + [False] + [True] * 4


def test_the_weights_given_stay_as_they_were() -> None:
    rows, x = weights(8), inputs(correlated=True)
    before = rows.copy()
    feedback_of(x).quantize(rows, 32)
    np.testing.assert_array_equal(rows, before)
