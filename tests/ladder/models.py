"""Tiny models with random weights, and what transformers computes for them.

`cases/<family>.py` holds configs: `BASE`, the config.json of a tiny model, and `CASES`, changes of
it by name; and `NORM_MEAN`, where norms store something else than what they multiply by. Weights
come from numpy by the names and shapes the family gives; the golden logits,
`tests/golden/<family>.npz`, are transformers' float32 logits of PROMPT tokens in one run followed
by those of STEPS single tokens over its KV cache.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.convert.family import Family, check_supported, family
from tests.memory_source import MemorySource

Float32 = NDArray[np.float32]

PROMPT, STEPS = 22, 6
_NOT_TEXT = "vision|projector|image_newline"  # parts of multimodal models that are not built
GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True)
class Case:
    """One tiny model of a family."""

    family: str  # the file in converters/ and in cases/
    name: str
    config: Mapping[str, Any]  # as config.json

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    @cached_property
    def module(self) -> Family:
        """The converter."""
        return family(check_supported(self.config))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the decoder."""
        found: Mapping[str, Any] = self.config.get("text_config", self.config)
        return found

    @property
    def window(self) -> int | None:
        """The sliding window, where the prompt is longer than it."""
        window = self.text_config.get("sliding_window")
        used = self.text_config.get("use_sliding_window", True)
        return window if used and isinstance(window, int) and window < PROMPT else None

    @property
    def token_ids(self) -> list[int]:
        """PROMPT + STEPS tokens."""
        rng = np.random.default_rng([7, *str(self).encode()])
        return [int(token) for token in rng.integers(3, 64, PROMPT + STEPS)]

    @cached_property
    def arrays(self) -> dict[str, Float32]:
        """The weights: norms about NORM_MEAN (1), everything else about 1.5 / sqrt(columns)."""
        norm_mean = getattr(_cases_module(self.family), "NORM_MEAN", 1.0)
        shapes = self.module.weights(self.module.Config.read(self.config))
        rng = np.random.default_rng([11, *str(self).encode()])
        found = {}
        for name in sorted(shapes):
            shape = shapes[name]
            values = rng.standard_normal(shape) * 1.5 / np.sqrt(shape[-1])
            values *= self._scale(name)
            is_norm = len(shape) == 1 and name.endswith("weight")
            found[name] = (values + is_norm * norm_mean).astype(np.float32)
        return found

    def _scale(self, name: str) -> float:
        """What the cases say of this weight's size."""
        scales = getattr(import_module(f"tests.ladder.cases.{self.family}"), "SCALES", {})
        return next((s for suffix, s in scales.items() if name.endswith(suffix)), 1.0)

    def source(self) -> MemorySource:
        """The model as the input of a compile."""
        return MemorySource(self.config, dict(self.arrays))

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors, as a repository has them."""
        from safetensors.numpy import save_file

        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        save_file(self.arrays, folder / "model.safetensors", metadata={"format": "pt"})

    def reference(self) -> Float32:
        """transformers' logits, (PROMPT + STEPS, V); AssertionError when a weight is left over.

        The model is loaded as users load it, from files, so that names have to match.
        """
        with TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = Path(name)
            self.save(folder)
            return _transformers_logits(folder, self.token_ids)


@cache
def cases(family_name: str) -> dict[str, Case]:
    """The cases of a family by name."""
    module = _cases_module(family_name)
    return {
        name: Case(family_name, name, module.BASE | changes)
        for name, changes in module.CASES.items()
    }


def _cases_module(family_name: str) -> ModuleType:
    return import_module(f"tests.ladder.cases.{family_name}")


def families() -> list[str]:
    """All families with cases, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("cases/*.py"))


def all_cases() -> list[Case]:
    """Every case of every family."""
    return [case for name in families() for case in cases(name).values()]


@cache
def golden(family_name: str) -> dict[str, Float32]:
    """The committed logits of a family's cases."""
    with np.load(GOLDEN / f"{family_name}.npz") as file:
        return {name: file[name] for name in file.files}


def write_golden(family_name: str) -> None:
    """Recompute and write a family's golden logits; needs torch and transformers."""
    found = {name: case.reference() for name, case in cases(family_name).items()}
    path = GOLDEN / f"{family_name}.npz"
    np.savez_compressed(path, **found)  # type: ignore[arg-type]


def _transformers_logits(folder: Path, token_ids: list[int]) -> Float32:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    text = type(config) in AutoModelForCausalLM._model_mapping
    loader = AutoModelForCausalLM if text else AutoModelForImageTextToText
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    left_over = [key for key in info["missing_keys"] if not re.search(_NOT_TEXT, key)]
    assert not left_over, left_over
    assert not info["unexpected_keys"], info["unexpected_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        out = model.eval()(ids[:, :PROMPT], use_cache=True)
        logits = [out.logits[0]]
        for step in range(PROMPT, PROMPT + STEPS):
            past = out.past_key_values
            out = model(ids[:, step : step + 1], past_key_values=past, use_cache=True)
            logits.append(out.logits[0])
    return np.concatenate([part.numpy() for part in logits])
