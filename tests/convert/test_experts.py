"""Experts stacked out of what files store: the same rows and blocks, wherever they are cut."""

from __future__ import annotations

import numpy as np
import pytest

from ohmygpu.convert.experts import (
    ExpertReader,
    ExpertsSource,
    SlicePart,
    Stack,
    stack_tensors,
    widen,
)
from ohmygpu.convert.source import BlockLayout
from tests.memory_source import MemorySource, random_blocks

EXPERTS, INNER, HIDDEN = 3, 5, 64
PREFIX = "experts"


def names(kind: str) -> list[str]:
    return [f"{expert}.{kind}" for expert in range(EXPERTS)]


def stacked(origin: MemorySource) -> ExpertsSource:
    gate_up = [list(pair) for pair in zip(names("gate"), names("up"), strict=True)]
    stacks, used = stack_tensors(origin, gate_up, names("down"))
    return ExpertsSource(origin, {PREFIX: stacks}, used)


def floats() -> MemorySource:
    rng = np.random.default_rng(1)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    arrays = {
        name: rng.standard_normal(shape).astype(np.float32)
        for kind, shape in shapes.items()
        for name in names(kind)
    }
    return MemorySource({}, {**arrays, "norm": np.ones(HIDDEN, np.float32)})


def blocks_of(gate: tuple[int, int], down: tuple[int, int], minimums: bool = False) -> MemorySource:
    """Gate and down in blocks of (bits, size); up in 8-bit blocks of 32."""
    rng = np.random.default_rng(2)
    blocked = {}
    for expert in range(EXPERTS):
        blocked[f"{expert}.gate"] = random_blocks(rng, (INNER, HIDDEN), *gate, minimums)
        blocked[f"{expert}.up"] = random_blocks(rng, (INNER, HIDDEN), 8, 32, False)
        blocked[f"{expert}.down"] = random_blocks(rng, (HIDDEN, HIDDEN), *down, False)
    return MemorySource({}, {}, blocked)


def test_gate_and_up_alternate_and_experts_follow_each_other() -> None:
    origin = floats()
    source = stacked(origin)
    whole = source.read("experts.gate_up")
    assert whole.shape == source.tensors["experts.gate_up"].shape == (EXPERTS * 2 * INNER, HIDDEN)
    for expert in range(EXPERTS):
        part = whole[expert * 2 * INNER : (expert + 1) * 2 * INNER]
        np.testing.assert_array_equal(part[0::2], origin.arrays[f"{expert}.gate"])
        np.testing.assert_array_equal(part[1::2], origin.arrays[f"{expert}.up"])
    down = np.concatenate([origin.arrays[name] for name in names("down")])
    np.testing.assert_array_equal(source.read("experts.down"), down)


@pytest.mark.parametrize("step", [1, 3, 7, 10, 11])
def test_rows_cut_anywhere_are_those_of_the_whole(step: int) -> None:
    source = stacked(floats())
    whole = source.read("experts.gate_up")
    pieces = [
        source.read_rows("experts.gate_up", start, min(start + step, len(whole)))
        for start in range(0, len(whole), step)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_other_tensors_pass_through_and_the_parts_are_gone() -> None:
    source = stacked(floats())
    assert set(source.tensors) == {"norm", "experts.gate_up", "experts.down"}
    np.testing.assert_array_equal(source.read("norm"), np.ones(HIDDEN))
    assert source.block_layout("experts.gate_up") is None


@pytest.mark.parametrize("gate", [(4, 32), (4, 16), (8, 16), (8, 32)])
@pytest.mark.parametrize("down", [(4, 32), (8, 16)])
def test_blocks_of_different_types_are_held_as_they_are(
    gate: tuple[int, int], down: tuple[int, int]
) -> None:
    origin = blocks_of(gate, down)
    source = stacked(origin)
    layout = source.block_layout("experts.gate_up")
    assert layout == source.block_layout("experts.down")  # one for both
    assert layout == BlockLayout(8, min(gate[1], down[1]), False)
    for name in ("experts.gate_up", "experts.down"):
        stored = source.blocks(name)
        assert stored is not None
        np.testing.assert_array_equal(stored.dequantize(), source.read(name))
        cut = source.blocks(name, 4, 13)
        assert cut is not None
        np.testing.assert_array_equal(cut.dequantize(), source.read_rows(name, 4, 13))


def test_experts_with_minimums_say_so() -> None:
    layout = stacked(blocks_of((4, 32), (4, 32), minimums=True)).block_layout("experts.down")
    assert layout is not None
    assert layout.has_correction


def test_one_plain_tensor_makes_its_layer_plain() -> None:
    origin = blocks_of((4, 32), (4, 32))
    del origin.blocked["1.up"]
    source = stacked(origin)
    assert source.block_layout("experts.down") is None
    assert source.blocks("experts.gate_up") is None


def test_widening_changes_no_weight() -> None:
    blocks = random_blocks(np.random.default_rng(3), (4, 64), 4, 32, False)
    wide = widen(blocks, BlockLayout(8, 16, False))
    assert (wide.bits, wide.block_size, wide.codes.shape) == (8, 16, (4, 4, 16))
    np.testing.assert_array_equal(wide.dequantize(), blocks.dequantize())


def test_experts_in_one_tensor_are_read_one_at_a_time_and_transposed() -> None:
    rng = np.random.default_rng(4)
    values = rng.standard_normal((EXPERTS, HIDDEN, 2 * INNER)).astype(np.float32)
    origin = MemorySource({}, {"all": values})
    reads: list[tuple[int, int]] = []
    plain = origin.read_rows

    def counted(name: str, start: int, stop: int) -> np.ndarray:
        reads.append((start, stop))
        return plain(name, start, stop)

    origin.read_rows = counted  # type: ignore[method-assign]
    reader = ExpertReader(origin, "all")
    stack = Stack([[SlicePart(reader, n, 0, 2 * INNER, transposed=True)] for n in range(EXPERTS)])
    wanted = np.concatenate([values[expert].T for expert in range(EXPERTS)])
    found = [stack.read_rows(start, start + 2) for start in range(0, len(wanted), 2)]
    np.testing.assert_array_equal(np.concatenate(found), wanted)
    assert reads == [(0, 1), (1, 2), (2, 3)]


def test_biases_of_gate_and_up_alternate() -> None:
    gate = np.arange(6, dtype=np.float32).reshape(EXPERTS, 2)
    origin = floats()
    biased = MemorySource({}, {**origin.arrays, "gate_bias": gate, "up_bias": -gate})
    source = ExpertsSource(biased, {}, set(), {"bias": ["gate_bias", "up_bias"]})
    np.testing.assert_array_equal(source.read("bias")[1], [2, -2, 3, -3])
    assert source.tensors["bias"].shape == (EXPERTS, 4)
    assert "gate_bias" not in source.tensors
