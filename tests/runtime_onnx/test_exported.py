"""Serving a graph whose cache grows by concatenation, as transformers exports them."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from ohmygpu.core.records import CompiledModel
from ohmygpu.runtime_onnx.exported import ExportedModel
from ohmygpu.runtime_onnx.kv_cache import HostKVCache
from tests.runtime_onnx.exported_graph import CONTEXT, compiled, expected, session

TEXTS = ([3, 7, 1, 9, 4], [8, 2], [5, 6, 11, 12, 13, 14, 15, 16, 17], [21, 20, 19])


def model(last_only: bool = True, batches: bool = True, prefill_tokens: int = 8) -> ExportedModel:
    described = compiled(last_only, batches)
    cache = HostKVCache(described, len(TEXTS), CONTEXT)
    return ExportedModel(session(last_only), described, cache, prefill_tokens)


def assert_logits(found: ExportedModel, row: int, tokens: list[int]) -> None:
    np.testing.assert_allclose(found.logits(row + 1)[row], expected(tokens), rtol=1e-4, atol=1e-4)


def decode(found: ExportedModel, texts: dict[int, list[int]], tokens: dict[int, int]) -> None:
    """One token for each slot, checked against the whole text."""
    slots = list(tokens)
    found.decode(slots, [tokens[slot] for slot in slots], [len(texts[slot]) for slot in slots])
    for row, slot in enumerate(slots):
        texts[slot].append(tokens[slot])
        assert_logits(found, row, texts[slot])


@pytest.mark.parametrize("last_only", [True, False])
def test_a_prompt_gives_the_logits_of_its_last_token(last_only: bool) -> None:
    found = model(last_only)
    found.prefill(1, TEXTS[0], 0, 2)
    assert_logits(found, 2, TEXTS[0])
    assert found.cache.extent[1] == len(TEXTS[0])


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_prompt_in_chunks_gives_the_same(cut: int) -> None:
    found = model()
    found.prefill(0, TEXTS[0][:cut], 0, None)
    found.prefill(0, TEXTS[0][cut:], cut, 0)
    assert_logits(found, 0, TEXTS[0])


def test_a_prompt_longer_than_a_run_is_cut() -> None:
    found = model(prefill_tokens=4)
    found.prefill(0, TEXTS[2], 0, 0)
    assert_logits(found, 0, TEXTS[2])


@pytest.mark.parametrize(("last_only", "batches"), [(True, True), (False, True), (True, False)])
def test_ragged_sequences_decode_together_as_each_alone(last_only: bool, batches: bool) -> None:
    found = model(last_only, batches)
    texts = {slot: list(tokens) for slot, tokens in enumerate(TEXTS)}
    for slot, tokens in texts.items():
        found.prefill(slot, tokens, 0, slot)
        assert_logits(found, slot, tokens)
    for step in range(3):
        decode(found, texts, {slot: 10 + step + slot for slot in texts})


def test_sequences_may_come_and_go_between_steps() -> None:
    found = model()
    texts = {slot: list(tokens) for slot, tokens in enumerate(TEXTS)}
    for slot in (0, 2):
        found.prefill(slot, texts[slot], 0, 0)
    decode(found, texts, {0: 1, 2: 2})
    decode(found, texts, {0: 3, 2: 4})
    found.prefill(1, texts[1], 0, 0)
    decode(found, texts, {0: 5, 1: 6, 2: 7})
    decode(found, texts, {1: 8})
    decode(found, texts, {2: 9, 0: 10})


def test_a_slot_given_away_does_not_keep_what_was_gathered() -> None:
    found = model()
    texts = {0: list(TEXTS[0])}
    found.prefill(0, texts[0], 0, 0)
    decode(found, texts, {0: 2})
    other = {0: [30, 29, 28, 27, 26, 25]}  # as long as the first one is now
    assert len(other[0]) == len(texts[0])
    found.prefill(0, other[0], 0, 0)
    decode(found, other, {0: 2})


def test_a_prefix_is_reused_from_another_slot() -> None:
    found = model()
    found.prefill(0, TEXTS[2], 0, 0)
    found.cache.copy(0, 1, 0, 6)
    text = [*TEXTS[2][:6], 30, 31]
    found.prefill(1, text[6:], 6, 0)
    assert_logits(found, 0, text)
    texts = {0: list(TEXTS[2]), 1: text}
    decode(found, texts, {0: 4, 1: 5})


def test_the_context_can_be_filled_to_its_end() -> None:
    found = model(prefill_tokens=64)
    texts = {0: [index % 31 for index in range(CONTEXT - 1)]}
    found.prefill(0, texts[0], 0, 0)
    decode(found, texts, {0: 3})
    assert found.cache.extent[0] == CONTEXT


def test_released_positions_are_gone_and_the_rest_stays() -> None:
    found = model()
    found.prefill(0, TEXTS[2], 0, 0)
    found.cache.release(0, 4)
    assert found.cache.extent[0] == 4
    text = [*TEXTS[2][:4], 30]
    found.prefill(0, text[4:], 4, 0)
    assert_logits(found, 0, text)


def test_the_description_of_the_graph_survives_compile_json(tmp_path: object) -> None:
    described = compiled()
    assert described.kv_bytes_per_token == 2 * 4 * 4
    plain = asdict(described)
    assert plain["exported"]["cache"][0][2:] == (1, 4)


def test_compile_json_is_read_back_with_the_description(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("compiled")
    described = compiled(batches=False)
    described.save(folder)
    assert CompiledModel.load(folder) == described
