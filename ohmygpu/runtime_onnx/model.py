"""The compiled graph with its KV cache: prompt chunks and batched decodes in, logits out.

Every array a run reads or writes is allocated once; on the CPU a decode of the same rows binds
nothing at all. The graph's contract is in the docstring of `core.records.CompiledModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile
from ohmygpu.core.records import CompiledModel

from .kv_cache import KVCache

Logits = NDArray[np.float32]

SCORES_BYTES = 256 << 20
"""Memory for scores of an attention that writes them out, float32 (heads, S, total length)."""

_MAX_BINDINGS = 256  # distinct (first row, rows) kept bound


class Model(Protocol):
    """What the engine asks of a model; rows of logits are numbered by the caller."""

    vocab_size: int
    cache: KVCache

    def prefill(
        self,
        slot: int,
        tokens: Sequence[int],
        past: int,
        logits_row: int | None,
        rope_length: int = 0,
    ) -> None:
        """Compute `tokens` (S,) after `past` positions; their last row's logits go to a row.

        `rope_length`: the length whose RoPE frequencies they get where it is more than their own.
        """
        ...

    def decode(self, slots: Sequence[int], tokens: Sequence[int], pasts: Sequence[int]) -> None:
        """Compute one token for each slot (B,); logits of the i-th go to row i."""
        ...

    def logits(self, rows: int) -> Logits:
        """The first `rows` rows, (R, V); overwritten by the next step."""
        ...


def check_files(folder: Path) -> CompiledModel:
    """Read compile.json and compare the sizes it lists.

    Raises CorruptFile, naming the file, when one is missing or has another size.
    """
    compiled = CompiledModel.load(folder)
    damage = compiled.damage(folder)
    if damage is not None:
        raise CorruptFile(f"{damage} in the compiled model; pull the model again")
    return compiled


class OnnxModel:
    """A session and its KV cache. Not thread-safe: the engine's thread owns it.

    `prompts` is the session of the graph that prompts go through; the same one where it is None.
    """

    def __init__(
        self,
        session: Any,
        compiled: CompiledModel,
        cache: KVCache,
        prefill_tokens: int,
        prompts: Any = None,
    ) -> None:
        self.vocab_size = compiled.vocab_size
        self.cache = cache
        self._session = session
        self._prompts = session if prompts is None else prompts
        self._ids = np.zeros(max(prefill_tokens, cache.slots), np.int64)  # (B*S,)
        self._lengths = np.zeros(cache.slots, np.int32)  # seqlens_k, (B,)
        self._total = np.zeros((), np.int32)
        self._score_heads = compiled.score_heads
        self._has_rope_length = compiled.rope_switch_tokens > 0
        self._rope_length = np.zeros(1, np.int32)
        self._rows = np.zeros(cache.slots, np.int64)  # logit_rows, (R,)
        self._logits = np.zeros((cache.slots, compiled.vocab_size), np.float32)  # (R, V)
        self._decode_bindings: dict[tuple[int, int, int], Any] = {}
        self._prefill_bindings: dict[int, Any] = {}

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

        `logits_row` takes the logits of the last token; None where the prompt goes on.
        `rope_length`: the length whose RoPE frequencies they get where it is more than their own.
        """
        self._rope_length[0] = rope_length
        stop = past + len(tokens)
        step = self._tokens_at_once(stop)
        for start in range(past, stop, step):
            piece = tokens[start - past : start - past + step]
            self._prefill(slot, piece, start, logits_row if start + step >= stop else None)

    def _tokens_at_once(self, total: int) -> int:
        """New tokens in a run, so that the scores of rows of length `total` fit SCORES_BYTES."""
        if not self._score_heads:
            return self._ids.size
        return max(1, SCORES_BYTES // (4 * self._score_heads * total))

    def _prefill(self, slot: int, tokens: Sequence[int], past: int, logits_row: int | None) -> None:
        count, total = len(tokens), past + len(tokens)
        self._ids[:count] = tokens
        self._lengths[0] = total - 1
        # The operator takes total == S for a prompt's first chunk and restarts at 0, so a later
        # chunk must differ; the true total of a later chunk always does.
        self._total[()] = total
        self._rows[0] = count - 1
        row = self.cache.row(slot)
        binding = self._bound(
            self._prefill_bindings, row, lambda: self._bind_cache(self._prompts, row, 1)
        )
        wanted = 0 if logits_row is None else 1
        self._bind_inputs(binding, (1, count), wanted)
        self._bind_logits(binding, logits_row or 0, wanted)
        self._prompts.run_with_iobinding(binding)
        self.cache.extent[slot] = total

    def decode(self, slots: Sequence[int], tokens: Sequence[int], pasts: Sequence[int]) -> None:
        """Compute one token for each of `slots` (B,) after its past; logits of the i-th → row i."""
        cache = self.cache
        first, rows = cache.arrange(slots)
        if rows > len(slots):  # rows in gaps write past what is valid, and give no logits
            for row in range(rows):
                self._lengths[row] = min(
                    cache.extent[cache.slot_at(first + row)], cache.context_tokens - 1
                )
            self._ids[:rows] = 0
        for index, slot in enumerate(slots):
            row = cache.row(slot) - first
            self._ids[row] = tokens[index]
            self._lengths[row] = pasts[index]
            self._rows[index] = row
            cache.extent[slot] = pasts[index] + 1
        self._total[()] = int(self._lengths[:rows].max()) + 1
        self._rope_length[0] = 0  # each row's own
        key = (first, rows, len(slots))
        binding = self._bound(self._decode_bindings, key, lambda: self._bind_decode(*key))
        if cache.device != "cpu":  # binding copies inputs to the device there
            self._bind_inputs(binding, (rows, 1), len(slots))
        self._session.run_with_iobinding(binding)

    def _bound(self, bindings: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
        binding = bindings.get(key)
        if binding is None:
            while len(bindings) >= _MAX_BINDINGS:  # the oldest goes
                del bindings[next(iter(bindings))]
            binding = bindings[key] = make()
        return binding

    def _bind_decode(self, first: int, rows: int, live: int) -> Any:
        binding = self._bind_cache(self._session, first, rows)
        self._bind_inputs(binding, (rows, 1), live)
        self._bind_logits(binding, 0, live)
        return binding

    def _bind_cache(self, session: Any, first: int, rows: int) -> Any:
        binding = session.io_binding()
        self.cache.bind(binding, first, rows)
        return binding

    def _bind_inputs(self, binding: Any, shape: tuple[int, int], logits: int) -> None:
        """Bind ids (B, S), lengths (B,), the total and `logits` row numbers."""
        rows = shape[0]
        inputs: list[tuple[str, NDArray[Any], tuple[int, ...]]] = [
            ("input_ids", self._ids, shape),
            ("seqlens_k", self._lengths, (rows,)),
            ("total_sequence_length", self._total, ()),
            ("logit_rows", self._rows, (logits,)),
        ]
        if self._has_rope_length:
            inputs.append(("rope_length", self._rope_length, (1,)))
        for name, array, dims in inputs:
            binding.bind_input(name, "cpu", 0, array.dtype.type, dims, array.ctypes.data)

    def _bind_logits(self, binding: Any, first: int, rows: int) -> None:
        target = self._logits[first : first + rows]
        binding.bind_output(
            "logits", "cpu", 0, np.float32, (rows, self.vocab_size), target.ctypes.data
        )
