"""The cost of an exported graph beside the same model through its family file, in one run.

    python -m tests.benchmarks.exported MODEL.gguf --python PYTHON [--layers N]

The model, or its first N layers, is written as a SafeTensors repository, compiled to f32 and
exported by PYTHON (the one of the exporter's environment); then both run the same tokens in turns,
so that what else the machine does slows both. Prints milliseconds and the median ratio of rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from ohmygpu.convert.compile import compile_model
from ohmygpu.convert.exported import compile_exported
from ohmygpu.core.hardware import physical_cores
from ohmygpu.core.records import CompiledModel
from ohmygpu.exporter.environment import command
from ohmygpu.runtime_onnx.exported import ExportedModel
from ohmygpu.runtime_onnx.kv_cache import HostKVCache
from ohmygpu.runtime_onnx.model import Model, OnnxModel
from ohmygpu.runtime_onnx.session import open_session
from tests.make_repo import make_repo

SLOTS = 8


def cut(folder: Path, layers: int) -> None:
    """Keep the first layers of the repository's model."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    found = ((name, re.search(r"layers\.(\d+)\.", name)) for name in tensors)
    kept = {name: tensors[name] for name, match in found if not match or int(match[1]) < layers}
    save_file(kept, path, metadata={"format": "pt"})


def opened(folder: Path, prompt: int, steps: int) -> Model:
    compiled = CompiledModel.load(folder)
    session = open_session(folder, compiled, "CPU", physical_cores()).session
    cache = HostKVCache(compiled, SLOTS, prompt + steps + 64)
    kind = OnnxModel if compiled.exported is None else ExportedModel
    return kind(session, compiled, cache, prompt)


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prefill(model: Model, prompt: int) -> float:
    tokens = [11 + index % 1000 for index in range(prompt)]
    return timed(lambda: model.prefill(0, tokens, 0, 0))


def decode(model: Model, rows: int, prompt: int, steps: int) -> float:
    """Seconds of a step of `rows` sequences of different lengths around `prompt`."""
    pasts = [prompt - 7 * row for row in range(rows)]
    for slot, past in enumerate(pasts):
        model.prefill(slot, [11 + index % 1000 for index in range(past)], 0, 0)

    def run() -> None:
        for step in range(steps):
            model.decode(list(range(rows)), [17] * rows, [past + step for past in pasts])

    return timed(run) / steps


def main() -> None:
    """Compile, export, measure in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=0, help="0 = all")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_repo(given.gguf, folder / "repo")
        if given.layers:
            cut(folder / "repo", given.layers)
        files = {path.name: path for path in (folder / "repo").iterdir()}
        compile_model(files, folder / "family", "f32", "cpu")
        start = time.perf_counter()
        compile_exported(files, folder / "exported", command(given.python), lambda *_: None)
        print(f"exported in {time.perf_counter() - start:.0f} s")
        kinds = ("family", "exported")
        models = [opened(folder / kind, given.prompt, given.steps) for kind in kinds]
        works: dict[str, Callable[[Model], float]] = {
            f"prompt of {given.prompt} tokens": lambda model: prefill(model, given.prompt)
        }
        for rows in (1, 4):
            works[f"decode step, {rows} rows after {given.prompt}"] = (
                lambda model, rows=rows: decode(model, rows, given.prompt, given.steps)  # type: ignore[misc]
            )
        for what, work in works.items():
            rounds = [[work(model) for model in models] for _ in range(given.rounds)]
            own, other = (1000 * median(times) for times in zip(*rounds, strict=True))
            ratio = median(times[1] / times[0] for times in rounds)
            print(f"{what}: family {own:.1f} ms, exported {other:.1f} ms, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
