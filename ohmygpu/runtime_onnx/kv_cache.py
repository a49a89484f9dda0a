"""Where keys and values live: one buffer (slots, K, T, D) per layer and part, bound in place.

Past and present of a run are the same memory, a run of consecutive rows of that buffer, so nothing
is ever copied to grow. A *slot* is the scheduler's name for a sequence's place; the *row* is where
it lies in the buffer. A batched decode needs its rows side by side:

- HostKVCache moves them there by swapping rows. A swap reads and writes two sequences' KV about
  three times, what attention reads anyway in as many steps, and happens at most once for each
  sequence that ends; rows left in between would cost a full row of every matrix product each step.
- DeviceKVCache runs over the gaps: on a GPU the extra rows are nearly free and rows cannot be
  copied without a kernel of our own. A row in a gap writes its garbage just past its valid tokens.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import OutOfMemory
from ohmygpu.core.records import CompiledModel
from ohmygpu.core.sizes import human_bytes

Array = NDArray[Any]

_ONNX_TYPES = {"float16": 10, "bfloat16": 16}  # of what GPUs compute in; TensorProto's numbers
_HALF_BYTES = 2


class KVCache(Protocol):
    """Slots of keys and values. `extent[slot]` counts the slot's valid positions."""

    context_tokens: int  # T, the buffer length
    slots: int
    can_copy: bool
    device: str  # "cpu" | "cuda"
    extent: list[int]

    def row(self, slot: int) -> int:
        """The row that holds a slot now."""
        ...

    def arrange(self, slots: Sequence[int]) -> tuple[int, int]:
        """(first row, rows) of a run of rows holding all `slots`, moved together if need be."""
        ...

    def slot_at(self, row: int) -> int:
        """The slot in a row."""
        ...

    def bind(self, binding: Any, first_row: int, rows: int) -> None:
        """Bind past and present of `rows` rows of every layer to an IOBinding."""
        ...

    def copy(self, source_slot: int, slot: int, start: int, stop: int) -> None:
        """Copy the positions [start, stop) of one slot to another."""
        ...

    def release(self, slot: int, keep: int) -> None:
        """Give the memory of a slot's positions from `keep` on back; they read as zero then."""
        ...


def tensor_names(layers: int) -> list[tuple[str, str]]:
    """(past, present) names of the graph's KV tensors, in buffer order."""
    return [
        (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}")
        for layer in range(layers)
        for part in ("key", "value")
    ]


def _layout(compiled: CompiledModel) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """(past, present) names of the KV tensors, and their (K, D), in buffer order."""
    if compiled.exported is None:
        names = tensor_names(compiled.layers)
        return names, [(compiled.kv_heads, compiled.head_dim)] * len(names)
    cache = compiled.exported.cache
    return [(past, present) for past, present, *_ in cache], [(k, d) for *_, k, d in cache]


class HostKVCache:
    """KV in this process's memory: mapped for the whole context at once, resident where written."""

    device = "cpu"
    can_copy = True

    def __init__(self, compiled: CompiledModel, slots: int, context_tokens: int) -> None:
        self.slots = slots
        self.context_tokens = context_tokens
        self.extent = [0] * slots
        self._names, sizes = _layout(compiled)
        self._rows = list(range(slots))  # slot → row
        self._slots = list(range(slots))  # row → slot
        self._dtype = np.dtype(compiled.kv_dtype)
        self._maps: list[mmap.mmap] = []
        self._tensors: list[Array] = []  # (slots, K, T, D) each
        for heads, width in sizes:
            shape = (slots, heads, context_tokens, width)
            mapping = _map_lazily(prod(shape) * self._dtype.itemsize)
            self._maps.append(mapping)
            self._tensors.append(np.frombuffer(mapping, self._dtype).reshape(shape))

    def row(self, slot: int) -> int:
        """The row that holds a slot now."""
        return self._rows[slot]

    def slot_at(self, row: int) -> int:
        """The slot in a row."""
        return self._slots[row]

    def rows_of(self, slot: int) -> list[Array]:
        """A slot's keys and values, in buffer order: views (K, T, D) to read and write."""
        return [tensor[self._rows[slot]] for tensor in self._tensors]

    def bind(self, binding: Any, first_row: int, rows: int) -> None:
        """Bind past and present of `rows` rows of every layer to an IOBinding."""
        for (past, present), tensor in zip(self._names, self._tensors, strict=True):
            view = tensor[first_row : first_row + rows]  # contiguous: (rows, K, T, D)
            place = (self.device, 0, self._dtype.type, view.shape, view.ctypes.data)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def arrange(self, slots: Sequence[int]) -> tuple[int, int]:
        """Swap rows until `slots` lie side by side; returns (first row, rows).

        They gather where most of them are already.
        """
        count = len(slots)
        taken = sorted(self._rows[slot] for slot in slots)
        if taken[-1] - taken[0] == count - 1:
            return taken[0], count
        starts = range(self.slots - count + 1)
        inside = [sum(start <= row < start + count for row in taken) for start in starts]
        first = max(starts, key=lambda start: inside[start])
        outside = [row for row in taken if not first <= row < first + count]
        holes = [row for row in range(first, first + count) if row not in taken]
        for row, hole in zip(outside, holes, strict=True):
            self._swap(row, hole)
        return first, count

    def copy(self, source_slot: int, slot: int, start: int, stop: int) -> None:
        """Copy the positions [start, stop) of one slot to another."""
        source, target = self._rows[source_slot], self._rows[slot]
        for tensor in self._tensors:
            tensor[target, :, start:stop] = tensor[source, :, start:stop]
        self.extent[slot] = stop

    def release(self, slot: int, keep: int) -> None:
        """Give the pages of a slot's positions from `keep` on back to the system."""
        self.extent[slot] = min(self.extent[slot], keep)
        advise = getattr(mmap, "MADV_DONTNEED", None)
        if advise is None:  # Windows keeps the pages until the model is unloaded
            return
        for mapping, tensor in zip(self._maps, self._tensors, strict=True):
            _, heads, tokens, width = tensor.shape
            head_bytes = tokens * width * self._dtype.itemsize
            first = self._rows[slot] * heads
            for head in range(first, first + heads):
                start = head * head_bytes + keep * width * self._dtype.itemsize
                start += -start % mmap.PAGESIZE
                stop = (head + 1) * head_bytes
                stop -= stop % mmap.PAGESIZE
                if stop > start:
                    mapping.madvise(advise, start, stop - start)

    def _swap(self, row: int, other: int) -> None:
        """Exchange two rows, with the positions that are valid in either."""
        slot, other_slot = self._slots[row], self._slots[other]
        length, other_length = self.extent[slot], self.extent[other_slot]
        for tensor in self._tensors:
            held = tensor[row, :, :length].copy()
            tensor[row, :, :other_length] = tensor[other, :, :other_length]
            tensor[other, :, :length] = held
        self._rows[slot], self._rows[other_slot] = other, row
        self._slots[row], self._slots[other] = other_slot, slot


class DeviceKVCache:
    """KV in GPU memory, allocated whole: `fit_device` chooses slots and context to match it.

    Written to ONNX Runtime's documented interface; it has not been run on a GPU.
    """

    device = "cuda"
    can_copy = False

    def __init__(self, compiled: CompiledModel, slots: int, context_tokens: int) -> None:
        import onnxruntime

        self.slots = slots
        self.context_tokens = context_tokens
        self.extent = [0] * slots
        self._names = tensor_names(compiled.layers)
        self._dtype = _ONNX_TYPES[compiled.kv_dtype]
        self._row_shape = (compiled.kv_heads, context_tokens, compiled.head_dim)
        self._row_bytes = prod(self._row_shape) * _HALF_BYTES
        self._buffers = [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [slots, *self._row_shape], self._dtype, self.device, 0
            )
            for _ in self._names
        ]

    def row(self, slot: int) -> int:
        """Slots never move: a slot's row is its number."""
        return slot

    def slot_at(self, row: int) -> int:
        """Slots never move: a row's slot is its number."""
        return row

    def arrange(self, slots: Sequence[int]) -> tuple[int, int]:
        """The run of rows from the first to the last of `slots`, gaps included."""
        return min(slots), max(slots) - min(slots) + 1

    def bind(self, binding: Any, first_row: int, rows: int) -> None:
        """Bind past and present of `rows` rows of every layer to an IOBinding."""
        shape = (rows, *self._row_shape)
        for (past, present), buffer in zip(self._names, self._buffers, strict=True):
            address = buffer.data_ptr() + first_row * self._row_bytes
            place = (self.device, 0, self._dtype, shape, address)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def copy(self, source_slot: int, slot: int, start: int, stop: int) -> None:
        """Never planned: `can_copy` is False."""
        raise RuntimeError("KV in GPU memory cannot be copied between slots")

    def release(self, slot: int, keep: int) -> None:
        """Forget positions; GPU memory is allocated once and stays."""
        self.extent[slot] = min(self.extent[slot], keep)


def fit_device(
    compiled: CompiledModel, slots: int, context_tokens: int, budget_bytes: int
) -> tuple[int, int]:
    """(slots, context_tokens) whose KV fits `budget_bytes` of GPU memory.

    Slots go first, down to one, then context, since a shorter context changes what a request may
    be. Raises OutOfMemory when not even 512 tokens fit.
    """
    per_token = compiled.kv_bytes_per_token
    slots = max(1, min(slots, budget_bytes // (per_token * context_tokens)))
    if per_token * context_tokens > budget_bytes:
        context_tokens = budget_bytes // per_token // 64 * 64
    if context_tokens < min(512, compiled.context_length):
        needed = per_token * 512
        raise OutOfMemory(
            f"the GPU has {human_bytes(max(0, budget_bytes))} left for the context and the model "
            f"needs at least {human_bytes(needed)}; unload other models or use a smaller one",
            needed_bytes=needed,
            free_bytes=max(0, budget_bytes),
        )
    return slots, context_tokens


def _map_lazily(size_bytes: int) -> mmap.mmap:
    """Anonymous memory that costs nothing until written, and no commit charge where allowed."""
    try:
        if not hasattr(mmap, "MAP_ANONYMOUS"):
            return mmap.mmap(-1, size_bytes)
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        return mmap.mmap(-1, size_bytes, flags=flags)
    except OSError as error:
        raise OutOfMemory(
            f"cannot map {human_bytes(size_bytes)} for the context ({error.strerror}); lower the "
            "number of slots or the context length",
            needed_bytes=size_bytes,
            free_bytes=0,
        ) from error
