"""Tables of GGUF names held against what a file says it holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ohmygpu.convert.gguf import GgufModel, GgufTensor
from ohmygpu.convert.gguf_names import Table, entry, half_rotation, maybe, place
from ohmygpu.core.errors import CorruptFile, UnsupportedModel

TABLE: Table = {
    "top.weight": entry("top", "E"),
    "blk.N.w.weight": entry("layers.N.w", "FE"),
    "blk.N.b.bias": maybe("layers.N.b", "F"),
    "blk.N.x.weight": maybe("layers.N.x.{}", "XFE"),
}
SIZES = {"L": 2, "E": 32, "F": 3, "X": 2}


def model(shapes: dict[str, tuple[int, ...]], type_name: str = "F32") -> GgufModel:
    """What `place` looks at of a file with these tensors."""
    tensors = {name: GgufTensor(name, shape, type_name, 0, 0) for name, shape in shapes.items()}
    metadata = {"general.architecture": "test"}
    found: Any = SimpleNamespace(tensors=tensors, name="m.gguf", metadata=metadata)
    return cast(GgufModel, found)


WHOLE: dict[str, tuple[int, ...]] = {
    "top.weight": (32,),
    "blk.0.w.weight": (3, 32),
    "blk.1.w.weight": (3, 32),
}


def test_layers_and_experts_are_spelled_out() -> None:
    stacked = {f"blk.{layer}.x.weight": (2, 3, 32) for layer in range(2)}
    found = place(model(WHOLE | stacked), TABLE, SIZES)
    assert set(found) == {"top"} | {
        f"layers.{layer}.{part}" for layer in range(2) for part in ("w", "x.0", "x.1")
    }
    second = found["layers.1.x.1"]
    assert (second.gguf_name, second.shape, second.first_row) == ("blk.1.x.weight", (3, 32), 3)


def test_a_tensor_that_one_layer_has_is_in_all_layers() -> None:
    with pytest.raises(CorruptFile, match=r"lacks the tensor blk\.1\.b\.bias"):
        place(model(WHOLE | {"blk.0.b.bias": (3,)}), TABLE, SIZES)


def test_a_layer_beyond_the_last_is_unknown() -> None:
    with pytest.raises(UnsupportedModel, match=r"'blk\.2\.w\.weight'"):
        place(model(WHOLE | {"blk.2.w.weight": (3, 32)}), TABLE, SIZES)


def test_a_vector_cannot_be_stored_in_blocks() -> None:
    with pytest.raises(CorruptFile, match=r"top\.weight.*is a vector stored in Q4_0"):
        place(model(WHOLE, "Q4_0"), TABLE, SIZES)


def test_more_layers_than_the_file_has_tensors_cost_nothing() -> None:
    with pytest.raises(CorruptFile, match=r"lacks the tensor blk\.2\.w\.weight"):
        place(model(WHOLE), TABLE, SIZES | {"L": 1 << 24})


def test_absurdly_many_experts_are_refused_before_they_are_named() -> None:
    count = 1 << 24
    shapes = WHOLE | {f"blk.{layer}.x.weight": (count, 3, 32) for layer in range(2)}
    with pytest.raises(CorruptFile, match="holds 16777216 matrices"):
        place(model(shapes), TABLE, SIZES | {"X": count})


def test_halves_of_a_head_are_its_even_and_odd_rows() -> None:
    rows = half_rotation("H")({"H": 2, "D": 4})
    np.testing.assert_array_equal(rows, [0, 2, 1, 3, 4, 6, 5, 7])
