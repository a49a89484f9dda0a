"""Which texts run together."""

from __future__ import annotations

import random

from ohmygpu.runtime_onnx.batches import PADDED_TOKENS, Item, Pending


def pending(*requests: list[int]) -> Pending:
    found = Pending()
    for request_id, lengths in enumerate(requests):
        found.add(request_id, lengths)
    return found


def lengths(batch: list[Item]) -> list[int]:
    return [item.tokens for item in batch]


def drain(waiting: Pending, most_tokens: int) -> list[list[Item]]:
    batches = []
    while len(waiting):
        batches.append(waiting.take(most_tokens))
    return batches


def test_texts_of_about_one_length_run_together_whoever_sent_them() -> None:
    batches = drain(pending([10, 100], [11, 90], [9]), 1000)
    assert sorted(map(lengths, batches)) == [[9, 10, 11], [90, 100]]


def test_the_text_that_waited_longest_is_in_the_next_batch() -> None:
    waiting = pending([300], [10] * 500)
    assert lengths(waiting.take(100)) == [300]
    assert len(waiting.take(100)) == 10


def test_a_batch_with_its_padding_stays_within_the_limit() -> None:
    rng = random.Random(5)
    waiting = pending(*[[rng.randint(1, 700) for _ in range(40)] for _ in range(20)])
    batches = drain(waiting, 1024)
    assert sum(map(len, batches)) == 800
    for batch in batches:
        longest, shortest = max(lengths(batch)), min(lengths(batch))
        assert len(batch) == 1 or longest * len(batch) <= 1024
        assert shortest >= 0.75 * longest
        assert longest <= PADDED_TOKENS or shortest == longest
    assert len(batches) < 450  # they do run together, the 214 longest but a few apart


def test_long_texts_run_without_padding() -> None:
    batches = drain(pending([600, 601, 600]), 10_000)
    assert sorted(map(lengths, batches)) == [[600, 600], [601]]


def test_a_dropped_request_leaves_the_others() -> None:
    waiting = pending([5, 6], [5, 6])
    waiting.drop(0)
    assert {item.request_id for item in waiting.take(100)} == {1}
    assert len(waiting) == 0
