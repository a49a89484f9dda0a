from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ohmygpu.core.errors import InvalidRequest, RuntimeFailure
from ohmygpu.runtime_api import SamplingParams
from ohmygpu.runtime_onnx.sampler import SamplerState, sample_rows

VOCAB = 1021  # odd, so that rows of a batch lie at every alignment

Floats = npt.NDArray[np.float32]


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 1) -> Floats:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 3).astype(np.float32)


def draw(row: Floats, count: int, **params: Any) -> npt.NDArray[np.int64]:
    """`count` tokens drawn from the same logits by one sequence that is told of none."""
    state = SamplerState(SamplingParams(seed=7, **params), row.size)
    logits = row[None, :]
    return np.array([sample_rows(logits, [state])[0] for _ in range(count)])


def softmax(row: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    weights = np.exp(row.astype(np.float64) - float(row.max()))
    return np.asarray(weights / weights.sum())


def chi_square(tokens: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> float:
    """Standard deviations by which the counts' chi-square lies above its mean."""
    counts = np.bincount(tokens, minlength=expected.size)
    assert counts[expected == 0].sum() == 0, "a token of probability 0 was drawn"
    bins = expected * tokens.size >= 5  # rarer tokens are counted together
    observed = np.append(counts[bins], counts[~bins].sum())
    wanted = np.append(expected[bins], expected[~bins].sum()) * tokens.size
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = max(wanted.size - 1, 1)
    return float((((observed - wanted) ** 2 / wanted).sum() - freedom) / math.sqrt(2 * freedom))


def test_greedy_takes_the_largest_logit_of_each_row() -> None:
    logits = random_logits(9)
    states = [SamplerState(SamplingParams(temperature=0), VOCAB) for _ in range(9)]
    np.testing.assert_array_equal(sample_rows(logits, states), logits.argmax(axis=1))


def test_greedy_breaks_ties_towards_the_lowest_id() -> None:
    logits = np.zeros((2, 50), dtype=np.float32)
    logits[1, [7, 31]] = 4
    states = [SamplerState(SamplingParams(temperature=0), 50) for _ in range(2)]
    assert sample_rows(logits, states).tolist() == [0, 7]


def test_result_is_int64_and_logits_are_left_alone() -> None:
    logits = random_logits(2)
    before = logits.copy()
    params = SamplingParams(logit_bias={3: 5.0}, repetition_penalty=1.3, top_k=9)
    tokens = sample_rows(logits, [SamplerState(params, VOCAB, [1, 2, 3]) for _ in range(2)])
    assert tokens.dtype == np.int64
    assert tokens.shape == (2,)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_plain_sampling_follows_the_tempered_distribution(temperature: float) -> None:
    row = random_logits(1, 300)[0]
    tokens = draw(row, 8_000, temperature=temperature)
    assert chi_square(tokens, softmax(row / np.float32(temperature))) < 4


def test_the_last_token_of_a_vocabulary_can_be_drawn() -> None:
    row = np.full(257, -20, dtype=np.float32)
    row[[0, 127, 128, 256]] = 0
    assert set(draw(row, 200).tolist()) == {0, 127, 128, 256}


def test_chi_square_notices_a_wrong_temperature() -> None:
    row = random_logits(1, 300)[0]
    assert chi_square(draw(row, 8_000), softmax(row / np.float32(1.1))) > 10


@pytest.mark.parametrize("k", [1, 2, 7, 40, 299, 300, 1000])
def test_top_k_renormalises_over_the_k_largest(k: int) -> None:
    row = random_logits(1, 300, seed=k)[0]
    expected = softmax(row)
    expected[np.argsort(-row, kind="stable")[k:]] = 0
    assert chi_square(draw(row, 5_000, top_k=k), expected / expected.sum()) < 4


def test_top_k_keeps_the_lowest_ids_of_equal_logits() -> None:
    row = np.zeros(500, dtype=np.float32)
    row[400] = 1
    assert set(draw(row, 400, top_k=4).tolist()) == {0, 1, 2, 400}


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float) -> None:
    row = random_logits(1, 300)[0]
    expected = softmax(row)
    order = np.argsort(-row, kind="stable")
    count = int(np.searchsorted(np.cumsum(expected[order]), top_p)) + 1
    expected[order[count:]] = 0
    assert chi_square(draw(row, 5_000, top_p=top_p), expected / expected.sum()) < 4


def test_top_p_zero_keeps_the_most_probable_token() -> None:
    row = random_logits(1)[0]
    assert set(draw(row, 20, top_p=0.0).tolist()) == {int(row.argmax())}


def test_min_p_is_relative_to_the_most_probable_token() -> None:
    row = random_logits(1, 300)[0]
    expected = softmax(row)
    expected[expected < 0.2 * expected.max()] = 0
    assert chi_square(draw(row, 5_000, min_p=0.2), expected / expected.sum()) < 4


def test_typical_p_keeps_what_surprises_as_much_as_the_average() -> None:
    row = np.log(np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])).astype(np.float32)
    # entropy 1.39: nearest are 0.2 (1.61), then 0.5 (0.69), then the rest
    assert set(draw(row, 300, typical_p=0.6).tolist()) == {0, 1}
    assert set(draw(row, 300, typical_p=0.15).tolist()) == {1}


def test_filters_see_the_distribution_at_temperature_one() -> None:
    row = np.log(np.array([0.6, 0.3, 0.1])).astype(np.float32)
    assert set(draw(row, 400, temperature=50.0, top_p=0.85).tolist()) == {0, 1}


def test_each_filter_renormalises_over_what_the_last_one_left() -> None:
    row = np.log(np.array([0.4, 0.2, 0.2, 0.2])).astype(np.float32)
    # of the two left by top_k the first has 2/3
    assert set(draw(row, 200, top_k=2, top_p=0.66).tolist()) == {0}
    assert set(draw(row, 200, top_p=0.66).tolist()) == {0, 1, 2}


def test_a_low_temperature_after_typical_p_still_draws_from_what_is_left() -> None:
    row = np.array([30.0] + [0.0] * 9, dtype=np.float32)
    row[1:] = 29.0
    assert draw(row, 20, typical_p=0.05, temperature=0.01).max() >= 1


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    row = np.array([4.0, -1.0, 0.5, -3.0], dtype=np.float32)
    state = SamplerState(SamplingParams(repetition_penalty=2.0), 4, [0, 1, 1])
    np.testing.assert_allclose(state.adjusted(row), [2.0, -2.0, 0.5, -3.0])


def test_presence_counts_once_and_frequency_every_time() -> None:
    row = np.zeros(4, dtype=np.float32)
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.25)
    state = SamplerState(params, 4, [1, 2])
    state.accept(2)
    np.testing.assert_allclose(state.adjusted(row), [0.0, -1.25, -1.5, 0.0])


def test_the_repetition_window_forgets_the_oldest_tokens() -> None:
    params = SamplingParams(presence_penalty=1.0, repetition_window=2)
    state = SamplerState(params, 5, [0, 1, 2])
    assert np.flatnonzero(state.adjusted(np.zeros(5, np.float32))).tolist() == [1, 2]
    state.accept(4)
    state.accept(4)
    assert np.flatnonzero(state.adjusted(np.zeros(5, np.float32))).tolist() == [4]


def test_window_minus_one_is_the_whole_context_and_zero_is_off() -> None:
    long = list(range(200))
    whole = SamplerState(SamplingParams(presence_penalty=1, repetition_window=-1), 200, long)
    assert np.count_nonzero(whole.adjusted(np.zeros(200, np.float32))) == 200
    off = SamplerState(SamplingParams(presence_penalty=1, repetition_window=0), 200, long)
    assert not off.changes_logits


def test_a_bias_is_added_after_the_penalties() -> None:
    params = SamplingParams(repetition_penalty=2.0, logit_bias={0: 3.0, 2: -100.0})
    adjusted = SamplerState(params, 3, [0, 2]).adjusted(np.array([4, 4, 4], np.float32))
    np.testing.assert_allclose(adjusted, [5.0, 4.0, -98.0])


def test_a_bias_of_100_forces_and_of_minus_100_forbids_a_token() -> None:
    row = random_logits(1)[0]
    best = int(row.argmax())
    assert set(draw(row, 50, logit_bias={5: 100.0}).tolist()) == {5}
    assert best not in draw(row, 300, logit_bias={best: -100.0})
    assert draw(row, 1, temperature=0, logit_bias={best: -100.0})[0] == np.argsort(-row)[1]


def test_a_bias_outside_the_vocabulary_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"token 50.*0 to 49") as caught:
        SamplerState(SamplingParams(logit_bias={50: 1.0}), 50)
    assert caught.value.details["param"] == "logit_bias"


MIXED = [
    SamplingParams(seed=1),
    SamplingParams(temperature=0),
    SamplingParams(seed=3, temperature=0.7, top_k=40, top_p=0.9),
    SamplingParams(seed=4, top_p=0.8),
    SamplingParams(seed=5, min_p=0.05, presence_penalty=0.5),
    SamplingParams(seed=6, typical_p=0.9),
    SamplingParams(seed=7, repetition_penalty=1.2, logit_bias={4: 2.0}),
]


def run(rows: list[int], steps: int) -> dict[int, list[int]]:
    """Tokens of the MIXED sequences named by `rows`, sampled as one batch."""
    states = [SamplerState(MIXED[row], VOCAB, [row, 9]) for row in rows]
    tokens: dict[int, list[int]] = {row: [] for row in rows}
    for step in range(steps):
        logits = random_logits(len(MIXED), seed=step)[rows]
        for row, state, token in zip(rows, states, sample_rows(logits, states), strict=True):
            state.accept(int(token))
            tokens[row].append(int(token))
    return tokens


def test_a_sequence_draws_the_same_alone_and_in_any_batch() -> None:
    everyone = list(range(len(MIXED)))
    together = run(everyone, 60)
    assert together == run(everyone[::-1], 60)
    for row in everyone:
        assert run([row], 60)[row] == together[row]


def test_joining_a_batch_half_way_changes_no_draw() -> None:
    logits = random_logits(2, seed=5)
    alone = SamplerState(SamplingParams(seed=11), VOCAB)
    expected = [int(sample_rows(logits[:1], [alone])[0]) for _ in range(40)]
    first = SamplerState(SamplingParams(seed=11), VOCAB)
    second = SamplerState(SamplingParams(seed=12), VOCAB)
    tokens = [int(sample_rows(logits[:1], [first])[0]) for _ in range(20)]
    tokens += [int(sample_rows(logits[::-1], [second, first])[1]) for _ in range(20)]
    assert tokens == expected


def test_seeds_repeat_and_differ_and_none_is_fresh() -> None:
    row = random_logits(1)[0]

    def tokens(seed: int | None) -> list[int]:
        state = SamplerState(SamplingParams(seed=seed), VOCAB)
        return [int(sample_rows(row[None], [state])[0]) for _ in range(30)]

    assert tokens(5) == tokens(5)
    different = [tokens(seed) for seed in (0, 5, -1, 2**64 - 2, -(2**63), None, None)]
    assert len({tuple(entry) for entry in different}) == len(different)


def test_nan_names_its_rows_and_draws_for_no_row() -> None:
    logits = random_logits(3)
    states = [SamplerState(SamplingParams(seed=row), VOCAB) for row in range(3)]
    broken = logits.copy()
    broken[1, 77] = np.nan
    with pytest.raises(RuntimeFailure, match="not numbers") as caught:
        sample_rows(broken, states)
    assert caught.value.details["rows"] == [1]
    fresh = [SamplerState(SamplingParams(seed=row), VOCAB) for row in range(3)]
    np.testing.assert_array_equal(sample_rows(logits, states), sample_rows(logits, fresh))


@pytest.mark.parametrize("params", MIXED)
def test_infinities_are_noticed_in_every_path(params: SamplingParams) -> None:
    for value in (np.nan, np.inf):
        row = random_logits(1)
        row[0, 3] = value
        with pytest.raises(RuntimeFailure):
            sample_rows(row, [SamplerState(params, VOCAB)])
    with pytest.raises(RuntimeFailure):
        sample_rows(np.full((1, VOCAB), -np.inf, np.float32), [SamplerState(params, VOCAB)])


@pytest.mark.parametrize("params", MIXED)
def test_tokens_masked_with_minus_infinity_are_never_drawn(params: SamplingParams) -> None:
    row = np.full((1, VOCAB), -np.inf, dtype=np.float32)
    row[0, [17, 900]] = [2.0, 1.0]
    state = SamplerState(params, VOCAB)
    assert {int(sample_rows(row, [state])[0]) for _ in range(50)} <= {17, 900}


@pytest.mark.parametrize("params", MIXED)
def test_extreme_logits_and_temperatures_stay_silent(params: SamplingParams) -> None:
    row = random_logits(1)
    row[0, :3] = [-3.4e38, 3.0e38, 0.0]
    assert sample_rows(row, [SamplerState(params, VOCAB)])[0] == 1
    tiny = SamplerState(SamplingParams(temperature=2e-5), VOCAB)
    assert sample_rows(random_logits(1), [tiny])[0] == random_logits(1).argmax()
