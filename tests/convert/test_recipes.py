"""Which recipe a model gets when nobody asks for one."""

from __future__ import annotations

import pytest

from ohmygpu.convert.recipes import SMALL_FLOAT_BYTES, default_recipe, target


@pytest.mark.parametrize("source_format", ["gguf", "safetensors"])
def test_a_small_model_stays_unquantised_on_a_cpu(source_format: str) -> None:
    assert default_recipe(source_format, target("cpu"), SMALL_FLOAT_BYTES) == "f32"


@pytest.mark.parametrize(("source_format", "recipe"), [("gguf", "exact"), ("safetensors", "q8")])
def test_a_larger_one_is_quantised_as_its_source_suggests(source_format: str, recipe: str) -> None:
    assert default_recipe(source_format, target("cpu"), SMALL_FLOAT_BYTES + 1) == recipe


@pytest.mark.parametrize(("source_format", "recipe"), [("gguf", "exact"), ("safetensors", "q8")])
def test_a_gpu_has_no_float32_attention(source_format: str, recipe: str) -> None:
    assert default_recipe(source_format, target("cuda"), 1) == recipe
