"""Runs a compiled graph by hand, with a KV buffer per row: what engine tests would hide."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ohmygpu.core.records import GRAPH_FILE

Float32 = NDArray[np.float32]
Ids = Sequence[int]


class OnnxRun:
    """A session over `folder` with KV buffers for `rows` rows of `length` tokens."""

    def __init__(
        self,
        folder: Path,
        rows: int = 1,
        length: int = 128,
        threads: int = 2,
        graph: str = GRAPH_FILE,
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(
            folder / graph, options, providers=["CPUExecutionProvider"]
        )
        caches = [node for node in self.session.get_inputs() if node.name.startswith("past_")]
        self.length = length
        self.dtype = np.float16 if caches[0].type == "tensor(float16)" else np.float32
        self.past = {
            node.name: np.zeros((rows, node.shape[1], length, node.shape[3]), self.dtype)
            for node in caches
        }
        self.asks_rope_length = any(
            node.name == "rope_length" for node in self.session.get_overridable_initializers()
        )
        self.extra: dict[str, NDArray[Any]] = {}  # optional inputs to pass in every run

    def run(
        self,
        ids: NDArray[np.int64],
        totals: Sequence[int],
        first_row: int = 0,
        logit_rows: Sequence[int] | None = None,
        total: int | None = None,
    ) -> Float32:
        """One run over rows first_row…; `totals` are their lengths after it. Logits (R, V)."""
        rows, new = ids.shape
        wanted = range(rows * new) if logit_rows is None else logit_rows
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "seqlens_k": np.array(totals, np.int32) - np.int32(1),
            "total_sequence_length": np.array(self.length if total is None else total, np.int32),
            "logit_rows": np.array(list(wanted), np.int64),
        }
        binding = self.session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name, value in self.extra.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        for name, cache in self.past.items():
            view = cache[first_row : first_row + rows]
            present = name.replace("past_key_values", "present")
            place = ("cpu", 0, self.dtype, view.shape, view.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(present, *place)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        logits: Float32 = binding.get_outputs()[-1].numpy()
        return logits

    def prefill(
        self, ids: Ids, row: int = 0, chunks: Sequence[int] = (), start: int = 0
    ) -> Float32:
        """Compute `ids` in row `row`, cut into `chunks` (then the rest); logits of all of them."""
        pieces, done = [], 0
        for size in [*chunks, len(ids)]:
            piece = list(ids[done : done + size])
            if piece:
                done += len(piece)
                pieces.append(self.run(np.array([piece]), [start + done], row))
        return np.concatenate(pieces)

    def fill(self, ids: Ids, row: int = 0) -> None:
        """Compute the KV of `ids` in row `row`, without logits."""
        self.run(np.array([ids]), [len(ids)], row, logit_rows=[])

    def decode(self, ids: Ids, totals: Sequence[int], first_row: int = 0) -> Float32:
        """One new token for each of len(ids) rows, of `totals` tokens with it; logits (B, V)."""
        return self.run(np.array(ids)[:, None], totals, first_row)
