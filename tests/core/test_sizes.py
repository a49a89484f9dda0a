from __future__ import annotations

import pytest

from ohmygpu.core.sizes import human_bytes, human_count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1540, "1.54 kB"),
        (138_000_000, "138 MB"),
        (999_600_000, "1 GB"),
        (4_700_000_000, "4.7 GB"),
        (15.26e9, "15.3 GB"),
        (3e18, "3000 PB"),
    ],
)
def test_sizes_have_three_digits_and_a_decimal_unit(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12"), (134_515_008, "135M"), (1_543_714_304, "1.54B")]
)
def test_counts_read_like_model_names(count: int, text: str) -> None:
    assert human_count(count) == text
