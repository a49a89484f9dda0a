from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ohmygpu.convert.quantize import dequantize_rows, quantize_rows, unpack_nibbles


def rows(count: int = 64, columns: int = 256) -> NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal((count, columns)).astype(np.float32)


def relative_error(bits: int, weights: NDArray[np.float32]) -> float:
    back = dequantize_rows(quantize_rows(weights, bits, 32), bits, weights.shape[1])
    return float(np.linalg.norm(back - weights) / np.linalg.norm(weights))


def test_eight_bits_are_close_to_lossless() -> None:
    assert relative_error(8, rows()) < 0.006


def test_four_bits_beat_plain_rounding_to_nearest() -> None:
    weights = rows()
    groups = weights.reshape(64, -1, 32)
    step = np.abs(groups).max(-1, keepdims=True) / 7
    plain = np.linalg.norm(np.rint(groups / step) * step - groups) / np.linalg.norm(groups)
    assert relative_error(4, weights) < 0.85 * plain


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -127, 127), (4, -8, 7)])
def test_weights_on_the_grid_come_back_as_they_were(bits: int, low: int, high: int) -> None:
    codes = np.random.default_rng(1).integers(low, high + 1, (16, 4, 32))
    codes[..., 0] = low  # the group uses the whole range
    weights = (codes * np.float32(0.25)).astype(np.float32).reshape(16, 128)
    back = dequantize_rows(quantize_rows(weights, bits, 32), bits, 128)
    np.testing.assert_allclose(back, weights, rtol=1e-6, atol=1e-6)


def test_codes_are_packed_low_nibble_first() -> None:
    weights = np.zeros((1, 32), np.float32)
    weights[0, :3] = (-8, 7, 1)
    packed = quantize_rows(weights, 4, 32)
    assert packed.codes.shape == (1, 1, 16)
    assert list(packed.codes[0, 0, :2]) == [0 | 15 << 4, 9 | 8 << 4]


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_zeros_and_of_tiny_weights_stay_finite(bits: int) -> None:
    weights = np.zeros((3, 32), np.float32)
    weights[1] = 1e-42
    weights[2] = 3e38
    back = dequantize_rows(quantize_rows(weights, bits, 32), bits, 32)
    assert np.isfinite(back).all()
    assert not back[0].any()
    np.testing.assert_allclose(back[2], weights[2], rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_that_groups_do_not_divide_is_padded(bits: int) -> None:
    weights = rows(4, 40)
    packed = quantize_rows(weights, bits, 32)
    assert packed.codes.shape == (4, 2, 32 * bits // 8)
    back = dequantize_rows(packed, bits, 40)
    assert np.abs(back - weights).max() < (0.02 if bits == 8 else 0.3)


@pytest.mark.parametrize(("bits", "asymmetric"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_group_with_no_number_gets_a_scale_that_shows_it(
    bits: int, asymmetric: bool, bad: float
) -> None:
    weights = rows(2, 64)
    weights[1, 40] = bad
    scales = quantize_rows(weights, bits, 32, asymmetric=asymmetric).scales
    assert not np.isfinite(scales[1, 1])
    assert np.isfinite(scales[[0, 0, 1], [0, 1, 0]]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_half_precision_scales_are_what_the_codes_were_chosen_for(bits: int) -> None:
    weights = rows()
    packed = quantize_rows(weights, bits, 32, np.float16)
    assert packed.scales.dtype == np.float16
    assert np.linalg.norm(dequantize_rows(packed, bits, 256) - weights) <= 1.02 * np.linalg.norm(
        dequantize_rows(quantize_rows(weights, bits, 32), bits, 256) - weights
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_quantised_alone(bits: int) -> None:
    weights = rows()
    whole, piece = quantize_rows(weights, bits, 32), quantize_rows(weights[10:20], bits, 32)
    np.testing.assert_array_equal(whole.codes[10:20], piece.codes)
    np.testing.assert_array_equal(whole.scales[10:20], piece.scales)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_zero_points_halve_the_error_of_groups_of_one_sign(group: int) -> None:
    weights = np.abs(rows())
    errors = []
    for asymmetric in (False, True):
        quantized = quantize_rows(weights, 4, group, asymmetric=asymmetric)
        errors.append(np.linalg.norm(dequantize_rows(quantized, 4, 256) - weights))
    assert errors[1] < 0.6 * errors[0]


def test_asymmetric_groups_that_lie_on_a_grid_come_back_as_they_were() -> None:
    rng = np.random.default_rng(2)
    zero = rng.integers(0, 16, (16, 5, 1))
    codes = rng.integers(0, 16, (16, 5, 32))
    codes[..., 0], codes[..., 1] = 0, 15  # the group uses the whole range
    weights = ((codes - zero) * np.float32(0.25)).astype(np.float32).reshape(16, 160)
    quantized = quantize_rows(weights, 4, 32, asymmetric=True)
    assert quantized.zero_points is not None
    assert quantized.zero_points.shape == (16, 3)  # two to a byte
    np.testing.assert_array_equal(unpack_nibbles(quantized.zero_points)[:, :5], zero[..., 0])
    np.testing.assert_allclose(dequantize_rows(quantized, 4, 160), weights, rtol=1e-6)


def test_asymmetric_groups_of_zeros_of_one_sign_and_of_huge_weights_stay_finite() -> None:
    weights = np.zeros((4, 32), np.float32)
    weights[1] = 1e-42
    weights[2] = np.linspace(1e38, 3e38, 32)
    weights[3] = -np.linspace(1, 2, 32)
    back = dequantize_rows(quantize_rows(weights, 4, 32, asymmetric=True), 4, 32)
    assert np.isfinite(back).all()
    assert not back[0].any()
    np.testing.assert_allclose(back[2:], weights[2:], rtol=0.07)
