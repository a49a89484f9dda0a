"""Quantised recipes against the weights they stand for, and the compile as a whole."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ohmygpu.convert import recipes
from ohmygpu.convert.compile import compile_model, write_graph
from ohmygpu.convert.quantize import dequantize_rows, quantize_rows
from ohmygpu.convert.source import QuantizedBlocks
from ohmygpu.core.errors import DiskFull, InvalidRequest
from ohmygpu.core.records import GRAPH_FILE, CompiledModel
from tests.converters.test_llama import assert_close, compile_f32, config, source, token_ids
from tests.ladder.models import PROMPT, Float32
from tests.memory_source import MemorySource, random_blocks
from tests.onnx_run import OnnxRun

Compiled = Callable[..., Path]

# MatMulNBits computing in float32: what remains is the quantised weights alone.
EXACT_CPU = replace(recipes.target("cpu"), accuracy_level=0)


def compile_tiny(
    origin: MemorySource, recipe: str, folder: Path, target: recipes.Target = EXACT_CPU
) -> Path:
    folder.mkdir(exist_ok=True)
    write_graph(origin, folder, recipes.recipe(recipe), target, lambda done, total: None)
    return folder


def all_ways(folder: Path, ids: list[int]) -> Float32:
    """Logits of a prompt whole, in chunks, then decoded alone and beside another row."""
    run = OnnxRun(folder, rows=2, length=48)
    pieces = [run.prefill(ids[:PROMPT]), run.prefill(ids[:PROMPT], chunks=[5, 9])]
    pieces += [run.decode([token], [at + 1]) for at, token in enumerate(ids) if at >= PROMPT]
    run.prefill(ids[:4], row=1)
    pieces.append(run.decode([ids[PROMPT], ids[4]], [PROMPT + 1, 5]))
    return np.concatenate(pieces)


def rounded(origin: MemorySource, recipe: recipes.Recipe) -> MemorySource:
    """The float32 weights that a quantised compile of `origin` stands for."""
    arrays, layers = dict(origin.arrays), int(origin.config["num_hidden_layers"])
    for name, array in arrays.items():
        head = name in ("model.embed_tokens.weight", "lm_head.weight")
        whole = array.ndim == 1 or (head and "embed" in name and array.shape[1] % 32)
        bits = recipe.head_bits if head else recipe.bits(name, layers)
        if not whole:
            assert bits
            group = recipe.group(bits, array.shape[1])
            codes = quantize_rows(array, bits, group, asymmetric=bits == 4)
            arrays[name] = dequantize_rows(codes, bits, array.shape[1])
    return MemorySource(origin.config, arrays)


@pytest.mark.parametrize("case", ["grouped", "multi_head_tied", "biases", "wide_heads"])
@pytest.mark.parametrize("recipe", ["q8", "q4"])
def test_quantised_graphs_compute_with_exactly_the_rounded_weights(
    case: str, recipe: str, tmp_path: Path
) -> None:
    found = compile_tiny(source(case), recipe, tmp_path / "quantised")
    wanted = compile_f32(rounded(source(case), recipes.recipe(recipe)), tmp_path / "float")
    ids = token_ids(case)
    assert_close(all_ways(found, ids), all_ways(wanted, ids))


BlockKind = tuple[int, int, bool]  # bits, group, minimums
KINDS: dict[str, Callable[[str], BlockKind | None]] = {
    "q4_0": lambda name: (4, 32, False),
    "q4_1": lambda name: (4, 32, True),
    "q8_0": lambda name: (8, 32, False),
    "q2_k": lambda name: (4, 16, True),
    "q6_k": lambda name: (8, 16, False),
    "q5_k": lambda name: (8, 32, True),
    "mixed": lambda name: (
        (8, 16, False) if "v_proj" in name or "down" in name else (4, 32, "embed" not in name)
    ),
    "half_floats": lambda name: None if "up_proj" in name or "k_proj" in name else (4, 32, True),
}


def blocked_source(kind: Callable[[str], BlockKind | None], case: str) -> MemorySource:
    shapes: Mapping[str, tuple[int, ...]] = {
        name: array.shape for name, array in source(case).arrays.items()
    }
    rng = np.random.default_rng(17)
    blocked: dict[str, QuantizedBlocks] = {}
    for name, shape in shapes.items():
        chosen = kind(name)
        if len(shape) == 2 and chosen:
            blocked[name] = random_blocks(rng, (shape[0], shape[1]), *chosen)
    return MemorySource(config(case), source(case).arrays, blocked)


@pytest.mark.parametrize("case", ["grouped", "multi_head_tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_computes_with_the_blocks_as_they_are(kind: str, case: str, tmp_path: Path) -> None:
    origin = blocked_source(KINDS[kind], case)
    found = compile_tiny(origin, "exact", tmp_path / "blocks")
    wanted = compile_f32(MemorySource(origin.config, origin.arrays), tmp_path / "float")
    ids = token_ids(case)
    assert_close(all_ways(found, ids), all_ways(wanted, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_int8_activations_change_little_whatever_the_blocks(kind: str, tmp_path: Path) -> None:
    origin = blocked_source(KINDS[kind], "grouped")
    found = compile_tiny(origin, "exact", tmp_path / "blocks", recipes.target("cpu"))
    wanted = compile_f32(MemorySource(origin.config, origin.arrays), tmp_path / "float")
    ids = token_ids("grouped")
    exact = all_ways(wanted, ids)
    assert np.linalg.norm(all_ways(found, ids) - exact) < 0.05 * np.linalg.norm(exact)


def test_a_tied_embedding_is_stored_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        origin = source("multi_head_tied", tie_word_embeddings=tied, vocab_size=4096)
        folder = compile_tiny(origin, "q8", tmp_path / str(tied))
        sizes[tied] = (folder / f"{GRAPH_FILE}.data").stat().st_size
    again = sizes[False] - sizes[True]
    assert 0 <= again - 4096 * (64 + 2 * 4) < 4096  # codes and scales, aligned


def test_exact_is_for_quantised_weights_alone() -> None:
    with pytest.raises(InvalidRequest, match="exact keeps weights that are quantised"):
        recipes.check(recipes.recipe("exact"), recipes.target("cpu"), has_blocks=False)


def test_float32_is_for_the_cpu_alone() -> None:
    with pytest.raises(InvalidRequest, match="f32 runs on the CPU only"):
        recipes.check(recipes.recipe("f32"), recipes.target("cuda"), has_blocks=False)


def test_a_recipe_that_rounds_by_inputs_is_not_made_without_them(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="q4-high needs to know the inputs"):
        compile_model({}, tmp_path, "q4-high", "cpu")


def test_unknown_recipes_and_targets_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"no recipe 'q5'; choose one of f32, f16, .* exact"):
        recipes.recipe("q5")
    with pytest.raises(InvalidRequest, match=r"no target 'tpu'; choose one of cpu, .*cuda"):
        recipes.target("tpu")


@pytest.mark.parametrize("recipe", ["q8", "q4"])
def test_cuda_graphs_are_half_precision_with_float32_logits(recipe: str, tmp_path: Path) -> None:
    import onnx

    compile_tiny(source("biases"), recipe, tmp_path, recipes.target("cuda"))
    model = onnx.load(tmp_path / GRAPH_FILE, load_external_data=False)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert types["past_key_values.0.key"] == onnx.TensorProto.FLOAT16
    assert model.graph.output[0].name == "logits"
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    floats = {item.data_type for item in model.graph.initializer} - {
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT64,
    }
    assert floats == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("case", ["grouped", "biases", "odd_heads", "dynamic"])
def test_half_precision_graphs_agree_with_float32(case: str, tmp_path: Path) -> None:
    found = compile_tiny(source(case), "q8", tmp_path / "half", recipes.target("cuda"))
    wanted = compile_tiny(source(case), "q8", tmp_path / "float")
    ids = token_ids(case)
    exact = all_ways(wanted, ids)
    assert np.linalg.norm(all_ways(found, ids) - exact) < 0.02 * np.linalg.norm(exact)


def test_a_compile_tells_all_that_serving_needs(smollm2: Compiled) -> None:
    folder = smollm2("exact")
    compiled = CompiledModel.load(folder)
    assert (compiled.family, compiled.recipe, compiled.target) == ("llama", "exact", "cpu")
    assert (compiled.layers, compiled.heads, compiled.kv_heads) == (30, 9, 3)
    assert (compiled.head_dim, compiled.hidden_size, compiled.vocab_size) == (64, 576, 49152)
    assert (compiled.context_length, compiled.kv_dtype) == (8192, "float32")
    assert (compiled.quantization, compiled.source_format) == ("Q4_1", "gguf")
    assert compiled.parameters == 134_515_008
    assert compiled.files == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "compile.json"
    }
    assert {"model.onnx", "model.onnx.data", "tokenizer.json"} <= set(compiled.files)
    assert compiled.files["model.onnx"] < 1_000_000
    assert compiled.weights_bytes == compiled.files["model.onnx.data"]


def test_progress_only_grows_and_ends_at_the_total(smollm2_gguf: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    files = {smollm2_gguf.name: smollm2_gguf}
    compile_model(files, tmp_path, "exact", "cpu", lambda *counts: seen.append(counts))
    assert all(before <= after for (before, _), (after, _) in pairwise(seen))
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] > 90_000_000


def test_a_full_disk_is_an_error_of_its_own(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ohmygpu.convert.compile.write_graph", fail)
    with pytest.raises(DiskFull, match="No space left"):
        compile_model({smollm2_gguf.name: smollm2_gguf}, tmp_path, "q8", "cpu")


MEASURE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from ohmygpu.convert import recipes
from ohmygpu.convert.compile import write_graph
from ohmygpu.convert.family import family
from ohmygpu.convert.source import TensorInfo
from tests.ladder.models import cases
from tests.memory_source import MemorySource

layers, recipe, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
read = dict(cases("llama")["grouped"].config) | {"num_hidden_layers": layers}
read |= {"hidden_size": 1024, "vocab_size": 4096, "intermediate_size": 4096}
llama = family("llama")

class Endless(MemorySource):  # makes its rows when they are asked for
    def read(self, name):
        return self.read_rows(name, 0, self.tensors[name].shape[0])
    def read_rows(self, name, start, stop):
        shape = (stop - start, *self.tensors[name].shape[1:])
        return np.random.default_rng(start).random(shape, np.float32)

source = Endless(read, {})
shapes = llama.weights(llama.Config.read(read))
source.tensors = {name: TensorInfo(name, shape, "F32") for name, shape in shapes.items()}
source.total_bytes = sum(4 * info.elements for info in source.tensors.values())
target = recipes.target("cpu")
write_graph(source, folder, recipes.recipe(recipe), target, lambda done, total: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, source.total_bytes)
"""


@pytest.mark.parametrize("recipe", ["q8", "f32"])
def test_peak_memory_does_not_grow_with_the_model(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    peaks, sizes = [], []
    for layers in (1, 5):
        command = [sys.executable, "-c", MEASURE, str(layers), recipe, str(tmp_path)]
        root = Path(__file__).parents[2]
        out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
        peak, size = (int(word) for word in out.split())
        peaks.append(peak * 1024)
        sizes.append(size)
    assert sizes[1] - sizes[0] > 250_000_000
    assert peaks[1] - peaks[0] < 30_000_000
