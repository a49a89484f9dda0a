"""Which recipe a model gets when nobody asks for one."""

from __future__ import annotations

import pytest

from ohmygpu.convert.recipes import SMALL_FLOAT_BYTES, default_recipe, target


@pytest.mark.parametrize("has_blocks", [True, False])
def test_a_small_model_stays_unquantised_on_a_cpu(has_blocks: bool) -> None:
    assert default_recipe(has_blocks, target("cpu"), SMALL_FLOAT_BYTES) == "f32"


@pytest.mark.parametrize(("has_blocks", "recipe"), [(True, "exact"), (False, "q8")])
def test_a_larger_one_is_quantised_as_its_source_suggests(has_blocks: bool, recipe: str) -> None:
    assert default_recipe(has_blocks, target("cpu"), SMALL_FLOAT_BYTES + 1) == recipe


@pytest.mark.parametrize(("has_blocks", "recipe"), [(True, "exact"), (False, "q8")])
def test_a_gpu_has_no_float32_attention(has_blocks: bool, recipe: str) -> None:
    assert default_recipe(has_blocks, target("cuda"), 1) == recipe
