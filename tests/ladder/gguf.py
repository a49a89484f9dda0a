"""The GGUF path against the SafeTensors path: the same model from both, logit by logit.

The models are those of tests/convert/gguf_models.py, one or more for each architecture that GGUF
files have; they hold what such files can say.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.family import check_supported, family
from ohmygpu.convert.source import Source, open_source
from tests.convert.gguf_models import MODELS, Float32, random_tensors
from tests.convert.gguf_writer import write_model
from tests.memory_source import MemorySource
from tests.onnx_run import OnnxRun

from .checks import distance

TOLERANCE = 1e-5
_TOKENS, _STEPS = 40, 2  # longer than the windows, and than what longrope's short factors are for


def weights_of(name: str) -> dict[str, Float32]:
    """Random weights of a model, as its SafeTensors files would hold them."""
    config = MODELS[name]
    module = family(check_supported(config))
    return random_tensors(module.weights(module.Config.read(config)))


def error_of_family(family_name: str) -> float | None:
    """The largest error of a family's models; None when GGUF has no such architecture."""
    names = [name for name, model in MODELS.items() if check_supported(model) == family_name]
    return max((error(name) for name in names), default=None)


def error(name: str) -> float:
    """How far a model's logits from GGUF are from those from SafeTensors, relative to these."""
    config, tensors = MODELS[name], weights_of(name)
    with TemporaryDirectory() as folder:
        path = write_model(Path(folder, "m.gguf"), config, tensors)
        with closing(open_source({"m.gguf": path})) as source:
            found = _logits(source, Path(folder, "gguf"))
        wanted = _logits(MemorySource(config, tensors), Path(folder, "safetensors"))
    return distance(found, wanted)


def error_of_blocks(name: str, body: str) -> float:
    """How far the logits of a model's blocks of type `body`, kept as they are and multiplied in
    float32, are from those of the weights they stand for.
    """
    config, tensors = MODELS[name], weights_of(name)
    with TemporaryDirectory() as folder:
        path = write_model(Path(folder, "m.gguf"), config, tensors, body)
        with closing(open_source({"m.gguf": path})) as source:
            found = _logits(source, Path(folder, "blocks"), "exact")
            wanted = _logits(source, Path(folder, "floats"))
    return distance(found, wanted)


def _logits(source: Source, folder: Path, recipe: str = "f32") -> Float32:
    folder.mkdir()
    target = replace(recipes.target("cpu"), accuracy_level=0)
    write_graph(source, folder, recipes.recipe(recipe), target, lambda done, total: None)
    run = OnnxRun(folder, rows=1, length=_TOKENS + _STEPS)
    ids = [1, *np.random.default_rng(1).integers(3, 262, _TOKENS + _STEPS - 1).tolist()]
    if run.asks_rope_length:
        run.extra["rope_length"] = np.array([_TOKENS], np.int32)
    logits = [run.prefill(ids[:_TOKENS])]
    run.extra.clear()
    logits += [run.decode([ids[at]], [at + 1]) for at in range(_TOKENS, _TOKENS + _STEPS)]
    return np.concatenate(logits)
