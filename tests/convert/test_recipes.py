"""Which recipe a model gets when nobody asks for one."""

from __future__ import annotations

import pytest

from ohmygpu.convert.recipes import RECIPES, SMALL_FLOAT_BYTES, default_recipe, explain, target


@pytest.mark.parametrize("has_blocks", [True, False])
def test_a_small_model_stays_unquantised_on_a_cpu(has_blocks: bool) -> None:
    assert default_recipe(has_blocks, target("cpu"), SMALL_FLOAT_BYTES) == "f32"


@pytest.mark.parametrize(("has_blocks", "recipe"), [(True, "exact"), (False, "q8")])
def test_a_larger_one_is_quantised_as_its_source_suggests(has_blocks: bool, recipe: str) -> None:
    assert default_recipe(has_blocks, target("cpu"), SMALL_FLOAT_BYTES + 1) == recipe


@pytest.mark.parametrize(("has_blocks", "recipe"), [(True, "exact"), (False, "q8")])
def test_a_gpu_has_no_float32_attention(has_blocks: bool, recipe: str) -> None:
    assert default_recipe(has_blocks, target("cuda"), 1) == recipe


def test_every_default_is_explained() -> None:
    reasons = {
        default_recipe(has_blocks, target(name), size): explain(
            default_recipe(has_blocks, target(name), size), size
        )
        for has_blocks in (True, False)
        for name in ("cpu", "cuda")
        for size in (540_000_000, SMALL_FLOAT_BYTES + 1)
    }
    assert set(reasons) <= set(RECIPES)
    assert len(set(reasons.values())) == len(reasons)
    assert "540 MB" in explain("f32", 540_000_000)
