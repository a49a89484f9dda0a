"""KV memory: laid out lazily, moved without loss, given back, and bound in place."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ohmygpu.core.errors import OutOfMemory
from ohmygpu.core.records import CompiledModel
from ohmygpu.runtime_onnx.kv_cache import (
    DeviceKVCache,
    HostKVCache,
    fit_device,
    tensor_names,
)

from .tiny_graph import HEAD_DIM, KV_HEADS, LAYERS, write_tiny_model

CONTEXT = 128


class FakeBinding:
    """Remembers what was bound: name → (shape, address)."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, int]] = {}
        self.outputs: dict[str, tuple[Any, int]] = {}

    def bind_input(
        self, name: str, device: str, number: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self.inputs[name] = (shape, address)

    def bind_output(
        self, name: str, device: str, number: int, dtype: Any, shape: Any, address: int
    ) -> None:
        self.outputs[name] = (shape, address)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), context=CONTEXT)


def fill(cache: HostKVCache, slot: int, length: int) -> None:
    """Write `length` positions that tell slot, tensor and position apart."""
    for number, tensor in enumerate(cache._tensors):
        positions = np.arange(length, dtype=np.float32)[:, None]
        tensor[cache.row(slot), :, :length] = 1000 * slot + 100_000 * number + positions
    cache.extent[slot] = length


def holds(cache: HostKVCache, slot: int, length: int, origin: int | None = None) -> bool:
    """Whether the first `length` positions are those that `fill` wrote for `origin`."""
    positions = np.arange(length, dtype=np.float32)[:, None]
    owner = slot if origin is None else origin
    return all(
        (tensor[cache.row(slot), :, :length] == 1000 * owner + 100_000 * number + positions).all()
        for number, tensor in enumerate(cache._tensors)
    )


def test_past_and_present_are_the_same_memory_at_the_rows_asked_for(
    compiled: CompiledModel,
) -> None:
    cache, binding = HostKVCache(compiled, 4, CONTEXT), FakeBinding()
    cache.bind(binding, 1, 2)
    row_bytes = KV_HEADS * CONTEXT * HEAD_DIM * 4
    for (past, present), tensor in zip(tensor_names(LAYERS), cache._tensors, strict=True):
        assert binding.inputs[past] == binding.outputs[present]
        shape, address = binding.inputs[past]
        assert shape == (2, KV_HEADS, CONTEXT, HEAD_DIM)
        assert address == tensor.ctypes.data + row_bytes


def test_slots_side_by_side_stay_where_they_are(compiled: CompiledModel) -> None:
    cache = HostKVCache(compiled, 4, CONTEXT)
    assert cache.arrange([2, 1]) == (1, 2)
    assert [cache.row(slot) for slot in range(4)] == [0, 1, 2, 3]


def test_scattered_slots_are_gathered_and_no_slot_loses_a_position(
    compiled: CompiledModel,
) -> None:
    cache = HostKVCache(compiled, 6, CONTEXT)
    lengths = [7, 30, 0, 12, 128, 5]
    for slot, length in enumerate(lengths):
        fill(cache, slot, length)
    for wanted in ([0, 5], [1, 3, 5], [0, 2, 4], [4], [0, 1, 2, 3, 4, 5], [5, 0, 3]):
        first, rows = cache.arrange(wanted)
        assert rows == len(wanted)
        assert {cache.row(slot) for slot in wanted} == set(range(first, first + rows))
        assert sorted(cache.row(slot) for slot in range(6)) == list(range(6))
        assert all(cache.slot_at(cache.row(slot)) == slot for slot in range(6))
        assert all(holds(cache, slot, length) for slot, length in enumerate(lengths))


def test_gathering_moves_as_few_rows_as_it_can(compiled: CompiledModel) -> None:
    cache = HostKVCache(compiled, 6, CONTEXT)
    cache.arrange([0, 3, 4, 5])
    assert [cache.row(slot) for slot in (3, 4, 5)] == [3, 4, 5]
    assert (cache.row(0), cache.row(2)) == (2, 0)


def test_a_copied_prefix_equals_its_source_and_leaves_the_rest_alone(
    compiled: CompiledModel,
) -> None:
    cache = HostKVCache(compiled, 3, CONTEXT)
    fill(cache, 0, 40)
    fill(cache, 2, 10)
    cache.copy(0, 1, 0, 25)
    cache.copy(0, 2, 10, 25)
    assert cache.extent == [40, 25, 25]
    assert holds(cache, 1, 25, origin=0)
    assert holds(cache, 2, 10)
    assert (cache._tensors[0][2, :, 10:25] == cache._tensors[0][0, :, 10:25]).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system keeps pages")
def test_released_positions_read_as_zero_and_kept_ones_stay(compiled: CompiledModel) -> None:
    cache = HostKVCache(compiled, 3, CONTEXT)
    for slot in range(3):
        fill(cache, slot, CONTEXT)
    cache.release(1, 70)
    assert cache.extent[1] == 70
    assert holds(cache, 0, CONTEXT)
    assert holds(cache, 1, 70)
    assert holds(cache, 2, CONTEXT)
    head_bytes = CONTEXT * HEAD_DIM * 4
    assert head_bytes == 2 * mmap.PAGESIZE  # a head's row ends on a page here
    page_tokens = mmap.PAGESIZE // (HEAD_DIM * 4)
    cache.release(1, 3)
    assert all((tensor[1, :, page_tokens:] == 0).all() for tensor in cache._tensors)
    assert holds(cache, 1, 3)
    assert holds(cache, 2, CONTEXT)


def test_a_mapped_context_is_not_resident_until_it_is_written(compiled: CompiledModel) -> None:
    cache = HostKVCache(compiled, 64, 32768)  # 64 slots: half a GiB of addresses
    mapped = sum(tensor.nbytes for tensor in cache._tensors)
    assert mapped == 64 * 32768 * compiled.kv_bytes_per_token
    status = Path("/proc/self/smaps_rollup")
    if status.exists():
        before = _private_bytes(status)
        fill(cache, 63, 100)
        assert _private_bytes(status) - before < mapped // 16


def _private_bytes(status: Path) -> int:
    lines = status.read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def test_a_gpu_gets_fewer_slots_before_it_gets_a_shorter_context(compiled: CompiledModel) -> None:
    row = 2048 * compiled.kv_bytes_per_token
    assert fit_device(compiled, 8, 2048, 100 * row) == (8, 2048)
    assert fit_device(compiled, 8, 2048, 3 * row) == (3, 2048)
    assert fit_device(compiled, 8, 2048, row // 2) == (1, 1024)
    with pytest.raises(OutOfMemory, match="unload other models"):
        fit_device(compiled, 8, 2048, row // 2048)


class RowsOnHost(DeviceKVCache):
    """The GPU's cache in memory that is here."""

    device = "cpu"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gpu_keeps_both_kinds_of_16_bit_floats(compiled: CompiledModel, dtype: str) -> None:
    halves = replace(compiled, kv_dtype=dtype)
    assert 2 * halves.kv_bytes_per_token == compiled.kv_bytes_per_token
    cache, binding = RowsOnHost(halves, 4, CONTEXT), FakeBinding()
    assert {buffer.data_type() for buffer in cache._buffers} == {f"tensor({dtype})"}
    cache.bind(binding, 1, 2)
    row_bytes = KV_HEADS * CONTEXT * HEAD_DIM * 2
    for (past, present), buffer in zip(tensor_names(LAYERS), cache._buffers, strict=True):
        place = ((2, KV_HEADS, CONTEXT, HEAD_DIM), buffer.data_ptr() + row_bytes)
        assert binding.inputs[past] == binding.outputs[present] == place
