"""What the inputs of a model's layers look like, measured on text the model wrote itself.

    generate → text of SEQUENCES x TOKENS tokens, sampled from the float32 graph
    gather   → for each input x of a linear layer, over the text: `moments`, the sum of x xᵀ / |x|²,
               (K, K), and `squares`, the sum of x², (K,), in one file

The sums of all layers together can be many times what fits in memory, so layers are gathered a few
at a time, by the graphs that the compile wrote for it, each over the whole text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core import hardware
from ohmygpu.core.errors import InvalidRequest
from ohmygpu.core.records import (
    CALIBRATION_INDEX,
    CALIBRATION_PARTS,
    CompiledModel,
)

from .kv_cache import HostKVCache
from .model import check_files
from .session import open_streamed

SEQUENCES = 16
TOKENS = 384  # of each sequence
_SEED = 20240

Report = Callable[[int, int], None]
"""Called with (done, total) units of work."""
Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateJob:
    """Which float32 compile to look into, and the folder for the sums."""

    folder: str
    output: str
    threads: int = 0  # 0 = one per physical core

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> CalibrateJob:
        """From JSON. Raises InvalidRequest when fields are missing or unknown."""
        try:
            return CalibrateJob(**data)
        except TypeError as error:
            raise InvalidRequest(f"not a calibration job: {error}") from error


def calibrate(job: CalibrateJob, report: Report = lambda done, total: None) -> int:
    """Write one .npz file per layer input and an index of them; returns how many.

    The index maps the name of each weight that multiplies an input to the input's file.
    """
    folder, output = Path(job.folder), Path(job.output)
    compiled = check_files(folder)
    threads = job.threads or hardware.physical_cores()
    parts = json.loads((folder / CALIBRATION_PARTS).read_text(encoding="utf-8"))
    total = TOKENS + len(parts) * SEQUENCES
    text = generate(folder, compiled, threads, lambda done: report(done, total))
    index: dict[str, str] = {}
    for number, part in enumerate(parts):

        def advance(done: int, number: int = number) -> None:
            report(TOKENS + number * SEQUENCES + done, total)

        session = open_streamed(folder, threads, part["graph"])
        columns = {value: entry["columns"] for value, entry in part["values"].items()}
        for value, sums in _gather(session, columns, text, advance).items():
            name = f"{len(set(index.values()))}.npz"
            np.savez(output / name, moments=sums.moments, squares=sums.squares)
            index |= dict.fromkeys(part["values"][value]["weights"], name)
    (output / CALIBRATION_INDEX).write_text(json.dumps(index), encoding="utf-8")
    return len(set(index.values()))


def generate(
    folder: Path, compiled: CompiledModel, threads: int, report: Callable[[int], None]
) -> Tokens:
    """Text of the model's own, (SEQUENCES, TOKENS) ids: each starts with a random token."""
    length = min(TOKENS, compiled.context_length)
    session = open_streamed(folder, threads)
    cache = HostKVCache(compiled, SEQUENCES, length)
    rng = np.random.default_rng(_SEED)
    text = np.zeros((SEQUENCES, length), np.int64)
    text[:, 0] = rng.integers(0, compiled.vocab_size, SEQUENCES)
    logits = np.empty((SEQUENCES, compiled.vocab_size), np.float32)
    for place in range(1, length):
        binding = session.io_binding()
        cache.bind(binding, 0, SEQUENCES)
        for name, array in _inputs(text[:, place - 1 : place], place, SEQUENCES):
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        session.run_with_iobinding(binding)
        text[:, place] = _sampled(logits, rng)
        report(place + 1)
    return text


def _sampled(logits: NDArray[np.float32], rng: np.random.Generator) -> Tokens:
    """A token for each row, from the distribution as it is."""
    noise = rng.gumbel(size=logits.shape).astype(np.float32)  # argmax of the sum samples softmax
    tokens: Tokens = (logits + noise).argmax(axis=1)
    return tokens


def _inputs(tokens: Tokens, total: int, rows: int) -> list[tuple[str, NDArray[Any]]]:
    """Inputs of a run after which all `rows` sequences have `total` tokens."""
    return [
        ("input_ids", np.ascontiguousarray(tokens)),
        ("seqlens_k", np.full(rows, total - 1, np.int32)),
        ("total_sequence_length", np.array(total, np.int32)),
        ("logit_rows", np.arange(rows, dtype=np.int64)),
    ]


class _Sums:
    """What is added up of one layer's inputs."""

    def __init__(self, columns: int) -> None:
        self.moments = np.zeros((columns, columns), np.float32)
        self.squares = np.zeros(columns, np.float32)

    def add(self, x: NDArray[np.float32]) -> None:
        """Take the inputs x, (S, K)."""
        squares = x * x
        self.squares += squares.sum(axis=0)
        length = np.sqrt(squares.sum(axis=1, keepdims=True))
        x = x / np.maximum(length, np.float32(1e-20))
        self.moments += x.T @ x


def _gather(
    session: Any, columns: Mapping[str, int], text: Tokens, report: Callable[[int], None]
) -> dict[str, _Sums]:
    """The sums over the text for each value that the graph shows, by name."""
    sums = {value: _Sums(count) for value, count in columns.items()}
    declared = session.get_inputs()
    for number, row in enumerate(text):
        known = dict(_inputs(row[None], len(row), 1))
        feeds = {
            node.name: known[node.name]
            if node.name in known
            else np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)  # an empty past
            for node in declared
        }
        for value, x in zip(sums, session.run(list(sums), feeds), strict=True):
            sums[value].add(x.reshape(-1, x.shape[-1]))
        report(number + 1)
    return sums
