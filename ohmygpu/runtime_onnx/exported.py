"""Serves a graph that transformers exported, whose cache grows by concatenation, as a `Model`.

The KV interface between the engine and such a graph. What a sequence has so far lies in its slot of
a `HostKVCache`, so that prefixes are reused, copied and released as with any other model. For a run
the rows are gathered into one block, padded on the left to the longest, as transformers pads them;
the graph writes a block one position longer, and its last column goes back to the slots. As long as
the same sequences decode, that block is the next run's past and nothing is gathered.

What this costs: two blocks beside the slots, and every run copies the whole cache inside the graph
(Concat). Numbers are in docs/exported-models.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.records import CompiledModel, ExportedGraph

from .kv_cache import HostKVCache, KVCache
from .model import SCORES_BYTES, Logits

Array = NDArray[np.float32]


class _Block:
    """The keys and values of a few rows, one flat array per tensor that grows as needed."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self._sizes = sizes
        self._flat: list[Array] = [np.zeros(0, np.float32) for _ in sizes]

    def shaped(self, rows: int, length: int) -> list[Array]:
        """Views (rows, K, length, D); what they held before is lost."""
        views = []
        for index, (heads, width) in enumerate(self._sizes):
            needed = rows * heads * length * width
            if self._flat[index].size < max(needed, 1):
                self._flat[index] = np.zeros(max(1, needed + needed // 2), np.float32)
            views.append(self._flat[index][:needed].reshape(rows, heads, length, width))
        return views


class ExportedModel:
    """A session and its slots. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self, session: Any, compiled: CompiledModel, cache: HostKVCache, prefill_tokens: int
    ) -> None:
        graph = compiled.exported
        if graph is None:
            raise ValueError("not an exported model")
        self.vocab_size = compiled.vocab_size
        self.cache: KVCache = cache
        self._host = cache
        self._graph: ExportedGraph = graph
        self._session = session
        self._prefill_tokens = prefill_tokens
        self._heads = compiled.heads
        sizes = [(heads, width) for *_, heads, width in graph.cache]
        self._blocks = (_Block(sizes), _Block(sizes))  # a decode reads one and writes the other
        self._chunks = (_Block(sizes), _Block(sizes))  # a prompt's
        self._logits = np.zeros((cache.slots, compiled.vocab_size), np.float32)  # (R, V)
        self._running: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        """Slots and lengths of the rows in the first block, if a decode left them there."""
        self._length = 0  # positions in that block

    def logits(self, rows: int) -> Logits:
        """The first `rows` rows of logits, (R, V); overwritten by the next step."""
        return self._logits[:rows]

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        past: int,
        logits_row: int | None,
        rope_length: int = 0,
    ) -> None:
        """Compute `tokens` (S,) of `slot` after `past` positions.

        `logits_row` takes the logits of the last token. `rope_length` is never set: models whose
        RoPE depends on the length are not exported.
        """
        if self._running is not None and slot in self._running[0]:
            self._running = None  # what the block holds of this slot is another sequence's
        stop = past + len(tokens)
        step = max(1, min(self._prefill_tokens, SCORES_BYTES // (4 * self._heads * stop)))
        for start in range(past, stop, step):
            piece = tokens[start - past : start - past + step]
            self._prefill(slot, piece, start)
        if logits_row is not None:
            self._logits[logits_row] = self._last_logits[0]

    def _prefill(self, slot: int, tokens: Sequence[int], past: int) -> None:
        count, total = len(tokens), past + len(tokens)
        before = self._chunks[0].shaped(1, past)
        after = self._chunks[1].shaped(1, total)
        kept = self._host.rows_of(slot)  # (K, T, D) each
        for view, row in zip(before, kept, strict=True):
            view[0] = row[:, :past]
        self._last_logits = self._run(
            np.array([tokens], np.int64),
            np.ones((1, total), np.int64),
            np.arange(past, total, dtype=np.int64)[None],
            before,
            after,
        )
        for view, row in zip(after, kept, strict=True):
            row[:, past:total] = view[0, :, total - count :]
        self.cache.extent[slot] = total

    def decode(self, slots: Sequence[int], tokens: Sequence[int], pasts: Sequence[int]) -> None:
        """Compute one token for each of `slots` (B,) after its past; logits of the i-th → row i."""
        if self._graph.batches:
            self._decode(slots, tokens, pasts, 0)
            return
        for index, slot in enumerate(slots):
            self._decode([slot], tokens[index : index + 1], pasts[index : index + 1], index)

    def _decode(
        self, slots: Sequence[int], tokens: Sequence[int], pasts: Sequence[int], first: int
    ) -> None:
        before = self._gathered(slots, pasts)
        rows, length = len(slots), self._length
        after = self._blocks[1].shaped(rows, length + 1)
        lengths = np.array(pasts, np.int64)[:, None]  # (B, 1)
        mask = (np.arange(length + 1) >= length - lengths).astype(np.int64)  # (B, T+1)
        self._running = None  # until the run has ended well
        logits = self._run(np.array(tokens, np.int64)[:, None], mask, lengths, before, after)
        self._logits[first : first + rows] = logits
        for index, slot in enumerate(slots):
            for view, row in zip(after, self._host.rows_of(slot), strict=True):
                row[:, pasts[index]] = view[index, :, length]
            self.cache.extent[slot] = pasts[index] + 1
        self._blocks = (self._blocks[1], self._blocks[0])
        self._length = length + 1
        self._running = (tuple(slots), tuple(past + 1 for past in pasts))

    def _gathered(self, slots: Sequence[int], pasts: Sequence[int]) -> list[Array]:
        """Keys and values (B, K, T, D) of the slots, each row's last position at the end."""
        if self._running == (tuple(slots), tuple(pasts)):
            return self._blocks[0].shaped(len(slots), self._length)
        self._length = length = max(pasts)
        views = self._blocks[0].shaped(len(slots), length)
        for index, (slot, past) in enumerate(zip(slots, pasts, strict=True)):
            for view, row in zip(views, self._host.rows_of(slot), strict=True):
                # Whatever is masked has to be finite: zero times what is not would not be zero.
                view[index, :, : length - past] = 0.0
                view[index, :, length - past :] = row[:, :past]
        return views

    def _run(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        before: Sequence[Array],
        after: Sequence[Array],
    ) -> Logits:
        """The last tokens' logits (B, V); `after` is filled."""
        binding = self._session.io_binding()
        fed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        fed = {name: np.ascontiguousarray(fed[name]) for name in self._graph.inputs}
        for name, array in fed.items():
            binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        for (past, present, *_), old, new in zip(self._graph.cache, before, after, strict=True):
            binding.bind_input(past, "cpu", 0, np.float32, old.shape, _address(old))
            binding.bind_output(present, "cpu", 0, np.float32, new.shape, _address(new))
        rows, count = ids.shape
        shape = (rows, 1 if self._graph.last_only else count, self.vocab_size)
        logits = np.empty(prod(shape), np.float32).reshape(shape)
        binding.bind_output("logits", "cpu", 0, np.float32, shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits[:, -1]


def _address(array: Array) -> int:
    """Where an array's memory begins, also where it has no elements yet."""
    base = array if array.size else array.base
    return int(array.ctypes.data if base is None else base.ctypes.data)
