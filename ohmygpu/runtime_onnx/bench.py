"""Measures the engine called directly, without process, socket or HTTP; and what it can run on."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from time import monotonic
from typing import Any

from ohmygpu.core.errors import RuntimeFailure
from ohmygpu.core.records import RunSpec
from ohmygpu.runtime_api import GenerateRequest, SamplingParams

from .engine import Engine
from .loading import LoadedModel, load_model
from .prompt import Prompt
from .session import available_providers, import_onnxruntime

_PROMPT_TOKENS = 64
_DECODE_TOKENS = 128
_WARM_TOKENS = 32
_PREFILL_TOKENS = 512
_PROSE = "The quick brown fox jumps over the lazy dog while the rain keeps falling on the town. "


def probe() -> dict[str, Any]:
    """What ONNX Runtime offers on this machine. Raises RuntimeFailure when it is not installed."""
    onnxruntime = import_onnxruntime()
    return {
        "onnxruntime": onnxruntime.__version__,
        "package": getattr(onnxruntime, "package_name", "onnxruntime"),
        "execution_providers": available_providers(),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def measure(spec: RunSpec, rows: Sequence[int] = (1, 8)) -> dict[str, Any]:
    """Load `spec` and measure tokens per second: prefill, and greedy decode at each row count."""
    spec = dataclasses.replace(spec, slots=max(spec.slots, *rows))
    started_s = monotonic()
    loaded = load_model(spec)
    load_s = monotonic() - started_s
    engine = loaded.engine
    engine.eos_token_ids = frozenset()  # every sequence runs to its length
    prompt_tokens = min(_PROMPT_TOKENS, engine.context_tokens // 4)
    prefill_tokens = min(_PREFILL_TOKENS, engine.context_tokens // 2)
    for count in rows:  # pages, packed caches and bindings are warm after this
        _decode_rate(loaded, count, prompt_tokens, _WARM_TOKENS)
    _submit(loaded, 1, prefill_tokens, 1)
    prefill_s, _ = _drain(engine)
    decode = {
        str(count): round(_decode_rate(loaded, count, prompt_tokens, _DECODE_TOKENS), 2)
        for count in rows
    }
    return {
        "model": spec.model,
        "execution_provider": loaded.caps.execution_provider,
        "load_s": round(load_s, 3),
        "prefill_tokens_per_s": round(prefill_tokens / prefill_s, 2),
        "decode_tokens_per_s": decode,
    }


def _decode_rate(loaded: LoadedModel, rows: int, prompt_tokens: int, new_tokens: int) -> float:
    """Tokens per second of `rows` sequences together, from the step where all decode."""
    engine = loaded.engine
    new_tokens = min(new_tokens, engine.context_tokens - prompt_tokens)
    _submit(loaded, rows, prompt_tokens, new_tokens)
    while engine.has_work and engine.scheduler.decoding < rows:
        engine.step()
    if not engine.has_work:  # measuring nothing must not look like a number
        raise RuntimeFailure(f"{rows} sequences never decoded together in {new_tokens} tokens")
    seconds, tokens = _drain(engine)
    return tokens / seconds


def _submit(loaded: LoadedModel, rows: int, prompt_tokens: int, new_tokens: int) -> None:
    """Submit `rows` different prompts, so that none reuses what another computed."""
    engine = loaded.engine
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens)
    text = _PROSE * (prompt_tokens // 8 + 1)
    token_ids = loaded.tokenizer.encode(text, add_special=False)
    for index in range(rows):
        prompt = [token_ids[engine.steps % 7 + index], *token_ids][:prompt_tokens]
        request = GenerateRequest(prompt="", sampling=sampling)
        engine.submit(index, Prompt(prompt), request)


def _drain(engine: Engine) -> tuple[float, int]:
    """(seconds, tokens) until nothing is left to do."""
    started_s, tokens = monotonic(), 0
    while engine.has_work:
        output = engine.step()
        for _, error in output.errors:
            raise error
        tokens += sum(delta.completion_tokens for _, delta in output.deltas)
    return monotonic() - started_s, tokens
