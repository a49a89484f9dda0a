"""A real model: what each recipe makes of SmolLM2-135M-Instruct (GGUF, Q4_1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.converters.test_llama import assert_close
from tests.onnx_run import Float32, OnnxRun

Compiled = Callable[..., Path]

# Mean KL divergence (nats per token) from float32 logits of the same source weights, with int8
# activations (accuracy level 4), on English prose. q4 rounds weights that were 4-bit already.
KL_BOUNDS = {"exact": 0.01, "q8": 0.015, "q4": 0.2}


def test_smollm2_exact_gives_the_logits_of_its_dequantised_weights(
    smollm2: Compiled, prose: list[int], float_logits: Float32
) -> None:
    run = OnnxRun(smollm2("exact", 0), rows=2)
    assert_close(run.prefill(prose[:24]), float_logits[:24])
    assert_close(run.prefill(prose[:24], chunks=[9, 1]), float_logits[:24])
    run.fill(prose[:10], row=1)
    logits = run.decode([prose[24], prose[10]], [25, 11])
    assert_close(logits, float_logits[[24, 10]])


@pytest.mark.parametrize("recipe", KL_BOUNDS)
def test_int8_activations_stay_within_the_stated_divergence(
    recipe: str, smollm2: Compiled, prose: list[int], float_logits: Float32
) -> None:
    found = log_softmax(OnnxRun(smollm2(recipe)).prefill(prose))
    wanted = log_softmax(float_logits)
    assert divergence(found, wanted).mean() < KL_BOUNDS[recipe]


def divergence(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL divergence of each row, in nats."""
    rows: NDArray[np.float64] = (np.exp(wanted) * (wanted - found)).sum(axis=-1)
    return rows


def log_softmax(logits: Float32) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def test_q8_gives_a_row_the_same_bits_alone_and_in_any_company(
    smollm2: Compiled, prose: list[int]
) -> None:
    lengths, more = [5, 60, 33, 100, 7, 90, 18, 41], 3
    run = OnnxRun(smollm2("q8"), rows=8)
    alone = []
    for length in lengths:
        run.fill(prose[:length], row=2)
        steps = range(length, length + more)
        alone.append([run.decode([prose[at]], [at + 1], first_row=2)[0] for at in steps])
    for row, length in enumerate(lengths):
        run.fill(prose[:length], row)
    for step in range(more):
        ids = [prose[length + step] for length in lengths]
        logits = run.decode(ids, [length + step + 1 for length in lengths])
        for row in range(len(lengths)):
            np.testing.assert_array_equal(logits[row], alone[row][step])


def test_q8_gives_a_prompt_the_same_logits_however_it_is_cut(
    smollm2: Compiled, prose: list[int]
) -> None:
    run = OnnxRun(smollm2("q8"))
    whole = log_softmax(run.prefill(prose[:100]))
    for chunks in ([64], [2, 30, 17], [50, 49]):  # the last leaves one token, as decode does
        cut = log_softmax(run.prefill(prose[:100], chunks=chunks))
        assert divergence(cut, whole).mean() < 1e-3
