"""Models whose RoPE depends on how long a row is (longrope, dynamic NTK), through the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.core.records import CompiledModel
from ohmygpu.runtime_api import GenerateRequest, SamplingParams
from ohmygpu.runtime_onnx.engine import Engine
from ohmygpu.runtime_onnx.kv_cache import HostKVCache
from ohmygpu.runtime_onnx.model import OnnxModel
from ohmygpu.runtime_onnx.prompt import Prompt
from ohmygpu.runtime_onnx.scheduler import Scheduler
from ohmygpu.runtime_onnx.sequence import RopeLengths
from ohmygpu.runtime_onnx.session import open_session
from tests.ladder.models import Case, cases
from tests.onnx_run import OnnxRun

CONTEXT = 48
LONGROPE, DYNAMIC = cases("phi3")["long"], cases("llama")["dynamic"]  # beyond 12 and 16 tokens
PROMPTS = {8: 14, 11: 3, 12: 6, 13: 5, 20: 4}  # tokens → new tokens: before, across and beyond


@dataclass
class Tokens:
    """A text stream that writes nothing."""

    stopped: bool = False

    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class Served:
    """A case compiled, and engines over it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        target = recipes.target("cpu")
        decoder, weights_bytes = write_graph(
            case.source(), folder, recipes.recipe("f32"), target, lambda done, total: None
        )
        self.compiled = CompiledModel(
            family=case.family,
            converter_version=1,
            recipe="f32",
            target="cpu",
            context_length=decoder.context_tokens,
            vocab_size=decoder.vocab_size,
            layers=decoder.layers,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.cache_dim,
            kv_dtype="float32",
            parameters=1,
            weights_bytes=weights_bytes,
            source_format="safetensors",
            quantization="f32",
            hidden_size=decoder.hidden_size,
            heads=decoder.heads,
            feed_forward_length=decoder.feed_forward_length,
            rope_theta=decoder.rope_theta,
            rope_switch_tokens=decoder.rope_switch_tokens,
            rope_grows=decoder.rope_grows,
            norm_epsilon=decoder.norm_epsilon,
            bos_token_id=None,
            eos_token_ids=(),
        )

    def engine(self, prefill_tokens: int = 64, slots: int = 3) -> Engine:
        session = open_session(self.folder, self.compiled, "CPU", 1).session
        cache = HostKVCache(self.compiled, slots, CONTEXT)
        compiled = self.compiled
        return Engine(
            OnnxModel(session, compiled, cache, prefill_tokens),
            Scheduler(
                slots=slots,
                max_queue=8,
                prefill_tokens=prefill_tokens,
                rope=RopeLengths(compiled.rope_switch_tokens, compiled.rope_grows),
            ),
            lambda prompt_ids, stop: Tokens(),
            context_tokens=CONTEXT,
            eos_token_ids=(),
        )

    def expected(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy tokens after `prompt`, the graph run by hand.

        Longrope: each from a fresh prompt of all tokens so far. Dynamic NTK: the prompt, then one
        token at a time over the keys there are.
        """
        run, tokens = OnnxRun(self.folder, length=CONTEXT, threads=1), list(prompt)
        logits = run.prefill(tokens)
        for _ in range(new_tokens - 1):
            tokens.append(int(logits[-1].argmax()))
            if self.compiled.rope_grows:
                logits = run.decode(tokens[-1:], [len(tokens)])
            else:
                logits = run.prefill(tokens)
        return [*tokens, int(logits[-1].argmax())][len(prompt) :]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Served]:
    made: dict[str, Served] = {}

    def get(case: Case) -> Served:
        if str(case) not in made:
            made[str(case)] = Served(case, tmp_path_factory.mktemp(str(case)))
        return made[str(case)]

    return get


def prompt_of(length: int) -> list[int]:
    """The first tokens of one text, whatever the length."""
    return [int(token) for token in np.random.default_rng(5).integers(3, 64, 40)][:length]


def answers(engine: Engine, wanted: dict[int, int]) -> dict[int, list[int]]:
    """Greedy tokens after prompts of these lengths, all asked for at once."""
    for length, new_tokens in wanted.items():
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens)
        request = GenerateRequest(prompt="", sampling=params, return_context=True)
        engine.submit(length, Prompt(prompt_of(length)), request)
    found: dict[int, list[int]] = {}
    while engine.has_work:
        output = engine.step()
        engine.scheduler.check_integrity()
        assert output.errors == []
        for length, delta in output.deltas:
            if delta.finish_reason is not None:
                assert delta.context is not None
                found[length] = list(delta.context[length:])
    return found


@pytest.mark.parametrize("case", [LONGROPE, DYNAMIC], ids=str)
@pytest.mark.parametrize("prefill_tokens", [3, 7, 64])
def test_every_token_is_what_the_whole_row_so_far_calls_for(
    served: Callable[[Case], Served], case: Case, prefill_tokens: int
) -> None:
    model = served(case)
    assert model.compiled.rope_switch_tokens in (12, 16)
    assert model.compiled.rope_grows == (case is DYNAMIC)
    expected = {
        length: model.expected(prompt_of(length), count) for length, count in PROMPTS.items()
    }
    assert answers(model.engine(prefill_tokens), PROMPTS) == expected


@pytest.mark.parametrize("case", [LONGROPE, DYNAMIC], ids=str)
@pytest.mark.parametrize("lengths", [(20, 11, 20), (11, 20, 11), (8, 30, 31, 30, 9)])
def test_what_slots_hold_changes_no_answer(
    served: Callable[[Case], Served], case: Case, lengths: tuple[int, ...]
) -> None:
    model = served(case)
    engine = model.engine(slots=2)
    for length in lengths:
        assert answers(engine, {length: 6})[length] == model.expected(prompt_of(length), 6)


@pytest.mark.reference
@pytest.mark.parametrize("case", [LONGROPE, DYNAMIC], ids=str)
def test_greedy_answers_are_those_of_transformers(
    served: Callable[[Case], Served], case: Case
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    found = answers(served(case).engine(prefill_tokens=7), PROMPTS)
    with TemporaryDirectory() as folder:
        case.save(Path(folder))
        for length, new_tokens in PROMPTS.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            ids = torch.tensor([prompt_of(length)])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert found[length] == out[0, length:].tolist()
