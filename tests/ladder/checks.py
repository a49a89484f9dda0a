"""What every family is checked for. Each check gives its largest error; smaller is better."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from tests.onnx_run import OnnxRun

from .models import PROMPT, STEPS, Case, Float32, golden

_LENGTH = 48  # positions in the KV buffers


@dataclass
class Bench:
    """A case with its compiled graphs, each made once, under `folder`."""

    case: Case
    folder: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def compiled(self, recipe: str = "f32", target: str = "cpu") -> Path:
        """The folder of a graph of this case."""
        name = f"{recipe}-{target}"
        if name not in self._made:
            folder = self.folder / name
            folder.mkdir(parents=True)
            write_graph(
                self.case.source(),
                folder,
                recipes.recipe(recipe),
                recipes.target(target),
                lambda done, total: None,
            )
            self._made[name] = folder
        return self._made[name]

    def run(self, rows: int = 1, recipe: str = "f32", target: str = "cpu") -> OnnxRun:
        """A graph ready to run."""
        return OnnxRun(self.compiled(recipe, target), rows, _LENGTH)

    @property
    def wanted(self) -> Float32:
        """transformers' logits, (PROMPT + STEPS, V)."""
        return golden(self.case.family)[self.case.name]

    def all_logits(self, run: OnnxRun, chunks: tuple[int, ...] = ()) -> Float32:
        """Logits of the prompt, in chunks, then of single tokens."""
        ids = self.case.token_ids
        if run.asks_rope_length:  # the same frequencies in every chunk
            run.extra["rope_length"] = np.array([PROMPT], np.int32)
        logits = [run.prefill(ids[:PROMPT], chunks=chunks)]
        run.extra.clear()
        logits += [run.decode([ids[at]], [at + 1]) for at in range(PROMPT, PROMPT + STEPS)]
        return np.concatenate(logits)


def distance(found: Float32, wanted: Float32) -> float:
    """The larger of the largest and the mean-square difference, relative to the logits."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    assert np.abs(wanted).max() > 0.5  # the comparison means something
    largest = np.abs(found - wanted).max() / np.abs(wanted).max()
    overall = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    return float(max(largest, overall))


def prefill(bench: Bench) -> float:
    """The prompt in one run."""
    return distance(bench.all_logits(bench.run())[:PROMPT], bench.wanted[:PROMPT])


def prefill_by_position(bench: Bench) -> list[float]:
    """The error of each position of the prompt, to find what is wrong by."""
    found = bench.all_logits(bench.run())
    return [distance(found[at], bench.wanted[at]) for at in range(PROMPT)]


def chunked(bench: Bench) -> float:
    """The prompt in three runs."""
    return distance(bench.all_logits(bench.run(), (8, 5))[:PROMPT], bench.wanted[:PROMPT])


def decode(bench: Bench) -> float:
    """Single tokens after the prompt."""
    return distance(bench.all_logits(bench.run())[PROMPT:], bench.wanted[PROMPT:])


def ragged(bench: Bench) -> float:
    """Rows of different lengths decoded together, step by step.

    Against transformers' logits of the same positions or, where the RoPE of a position depends on
    how long its row is, against each row computed alone.
    """
    ids, lengths = bench.case.token_ids, (3, PROMPT, 2, 11)
    together = bench.run(len(lengths))
    for row, length in enumerate(lengths):
        together.prefill(ids[:length], row)
    alone = bench.run() if together.asks_rope_length else None
    found, wanted = [], []
    for step in range(1 if alone else STEPS):
        totals = [length + step + 1 for length in lengths]
        found.append(together.decode([ids[total - 1] for total in totals], totals))
        if alone is None:
            wanted.append(bench.wanted[[total - 1 for total in totals]])
    if alone is not None:
        for length in lengths:
            alone.prefill(ids[:length])
            wanted.append(alone.decode([ids[length]], [length + 1]))
    return distance(np.concatenate(found), np.concatenate(wanted))


def window(bench: Bench) -> float | None:
    """Positions that the first tokens are out of sight of, chunked and decoded."""
    if bench.case.window is None:
        return None
    found = bench.all_logits(bench.run(), (8, 5))
    seen = bench.case.window
    return distance(found[seen:], bench.wanted[seen:])


def q8(bench: Bench) -> float:
    """The 8-bit recipe: a prompt and single tokens."""
    return distance(bench.all_logits(bench.run(recipe="q8")), bench.wanted)


def f16(bench: Bench) -> float:
    """The float16 graph for GPUs, on the CPU's kernels."""
    return distance(bench.all_logits(bench.run(recipe="f16", target="cuda")), bench.wanted)


@dataclass(frozen=True)
class Check:
    """A check, and the error it may have. It gives None where it does not apply to a case."""

    measure: Callable[[Bench], float | None]
    tolerance: float


CHECKS: dict[str, Check] = {
    "prefill": Check(prefill, 2e-4),
    "chunked prefill": Check(chunked, 2e-4),
    "decode": Check(decode, 2e-4),
    "ragged batch": Check(ragged, 2e-4),
    "past the window": Check(window, 2e-4),
    "q8": Check(q8, 0.15),
    "float16": Check(f16, 0.02),
}
"""By the name of their column in docs/families.md."""
