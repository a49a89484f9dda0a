"""Views of a source: rows cut, reordered and shifted without touching what they stand for."""

from __future__ import annotations

import numpy as np

from ohmygpu.convert.transposed import TransposedSource
from ohmygpu.convert.views import View, ViewedSource, with_class_prefix
from tests.memory_source import MemorySource, random_blocks

RNG = np.random.default_rng(3)
ARRAY = RNG.standard_normal((12, 32)).astype(np.float32)
BLOCKS = random_blocks(RNG, (12, 32), 4, 32, correction=True)
ORDER = np.array([5, 4, 11, 0, 7], np.int64)


def viewed() -> ViewedSource:
    source = MemorySource({}, {"a": ARRAY, "n": ARRAY[0]}, {"b": BLOCKS})
    views = {
        "same": View("a"),
        "cut": View("a", range(4, 9)),
        "ordered": View("a", ORDER),
        "shifted": View("n", offset=1.0),
        "blocks": View("b", ORDER),
        "block_cut": View("b", range(4, 9)),
    }
    return ViewedSource(source, views)


def test_shapes_are_those_of_the_rows_seen() -> None:
    shapes = {name: info.shape for name, info in viewed().tensors.items()}
    assert shapes == {
        "same": (12, 32),
        "cut": (5, 32),
        "ordered": (5, 32),
        "shifted": (32,),
        "blocks": (5, 32),
        "block_cut": (5, 32),
    }


def test_rows_come_in_the_order_of_the_view() -> None:
    source = viewed()
    np.testing.assert_array_equal(source.read("same"), ARRAY)
    np.testing.assert_array_equal(source.read("cut"), ARRAY[4:9])
    np.testing.assert_array_equal(source.read("ordered"), ARRAY[ORDER])
    np.testing.assert_array_equal(source.read_rows("ordered", 1, 4), ARRAY[ORDER[1:4]])
    np.testing.assert_array_equal(source.read_rows("cut", 2, 2), ARRAY[:0])
    np.testing.assert_array_equal(source.read("shifted"), ARRAY[0] + np.float32(1))


def test_blocks_stay_what_they_were() -> None:
    source, whole = viewed(), BLOCKS.dequantize()
    for name, rows in (("blocks", ORDER), ("block_cut", np.arange(4, 9))):
        blocks = source.blocks(name)
        assert blocks is not None
        np.testing.assert_array_equal(blocks.dequantize(), whole[rows])
        part = source.blocks(name, 1, 3)
        assert part is not None
        np.testing.assert_array_equal(part.dequantize(), whole[rows[1:3]])
    assert source.block_layout("blocks") is not None
    assert source.blocks("same") is None


def test_names_get_the_prefix_of_the_models_class_where_files_lack_it() -> None:
    expected = ["model.embed.weight", "model.norm.weight", "lm_head.weight"]
    source = MemorySource({}, {"embed.weight": ARRAY, "norm.weight": ARRAY[0], "mask": ARRAY})
    named = with_class_prefix(source, expected)
    assert list(named.tensors) == ["model.embed.weight", "model.norm.weight", "mask"]
    np.testing.assert_array_equal(named.read("model.embed.weight"), ARRAY)


def test_names_that_have_a_prefix_stay() -> None:
    source = MemorySource({}, {"model.embed.weight": ARRAY, "norm.weight": ARRAY[0]})
    assert with_class_prefix(source, ["model.embed.weight", "model.norm.weight"]) is source


def test_a_transposed_matrix_is_read_by_its_columns() -> None:
    source = TransposedSource(MemorySource({}, {"a": ARRAY, "n": ARRAY[0]}, {"b": BLOCKS}), {"a"})
    assert source.tensors["a"].shape == (32, 12)
    np.testing.assert_array_equal(source.read_rows("a", 3, 9), ARRAY[:, 3:9].T)
    np.testing.assert_array_equal(source.read("n"), ARRAY[0])
    np.testing.assert_array_equal(source.read("a"), ARRAY.T)
    np.testing.assert_array_equal(source.read_rows("b", 3, 9), BLOCKS.dequantize()[3:9])
    blocks = source.blocks("b", 3, 9)
    assert blocks is not None
    np.testing.assert_array_equal(blocks.codes, BLOCKS.codes[3:9])


def test_blocks_do_not_turn_round_with_their_matrix() -> None:
    source = TransposedSource(MemorySource({}, {}, {"b": BLOCKS}), {"b"})
    assert source.block_layout("b") is None
    assert source.blocks("b") is None
    np.testing.assert_array_equal(source.read_rows("b", 0, 5), BLOCKS.dequantize()[:, :5].T)
