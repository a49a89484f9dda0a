"""How close each recipe stays to the same weights in float32, beside llama.cpp's formats.

    python tests/benchmarks/fidelity.py MODEL.gguf --peer-python PYTHON [--recipes q8,q4]
        [--peers Q8_0,Q4_K_M,Q4_0] [--documents 4] [--work FOLDER] [--json FILE]

MODEL is a GGUF file. Its weights, as float32 (blocks dequantised), are the starting point of both
sides: our recipes compile them, and llama.cpp quantises an F32 GGUF file of them. Both then read
the text that ships with us, the same tokens at the same positions, each document in a context of
its own. Prints a Markdown table; the row `llama.cpp F32` says how far the two programs differ when
nothing is quantised.

PYTHON has llama-cpp-python:
    CMAKE_ARGS=-DGGML_NATIVE=ON VENV/bin/pip install llama-cpp-python

For experiments with our own side alone, leave --peer-python out. All recipes of
`ohmygpu.convert.recipes.RECIPES` run by default. With --work FOLDER what was made is kept, and
`f32`, the reference's logits and llama.cpp's files are taken from there the next time; recipes are
always compiled anew. `--documents 4` takes a third of the time and shows a trend.

Bits per weight: bytes of weight tensors (codes, scales, minimums) * 8 / parameters, over all
tensors and over those of the body (neither embedding nor LM head), counted alike on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
from numpy.typing import NDArray

from ohmygpu.convert.compile import compile_model
from ohmygpu.convert.recipes import RECIPES
from ohmygpu.convert.source import open_source
from ohmygpu.core import hardware
from ohmygpu.core.records import GRAPH_FILE, CompiledModel
from ohmygpu.runtime_onnx.calibrate import CalibrateJob, calibrate
from ohmygpu.runtime_onnx.divergence import Comparison
from ohmygpu.runtime_onnx.tokenizer import Tokenizer
from ohmygpu.runtime_onnx.verify import (
    SKIPPED_TOKENS,
    GraphRun,
    VerifyJob,
    documents,
)

PEER = Path(__file__).parent / "llama_peer.py"
RUN_TOKENS = 128

Logits = NDArray[np.float32]
Documents = Sequence[Sequence[int]]


@dataclass
class Row:
    """One line of the table."""

    name: str
    size_bytes: int
    bits: float  # per weight
    body_bits: float
    found: dict[str, Any]


class Reference:
    """The float32 graph's logits of every document, on disk."""

    def __init__(self, folder: Path, compiled_folder: Path, ids: Documents) -> None:
        self.compiled = CompiledModel.load(compiled_folder)
        self.ids = ids
        path = folder / f"reference-{sum(map(len, ids))}.f32"
        shape = (sum(map(len, ids)), self.compiled.vocab_size)
        if not path.exists():
            part = path.with_suffix(".part")
            logits = np.memmap(part, np.float32, "w+", shape=shape)
            run = GraphRun.streamed(compiled_folder, max(map(len, ids)), threads())
            end = 0
            for tokens in ids:
                for piece in forward(run, tokens):
                    logits[end : end + len(piece)] = piece
                    end += len(piece)
            logits.flush()
            part.rename(path)
        self._logits = np.memmap(path, np.float32, "r", shape=shape)

    def compare(self, pieces: Iterator[Logits]) -> dict[str, Any]:
        """The statistics of logits that come in order: pieces (S, V), within documents."""
        comparison = Comparison()
        start = 0
        for tokens in self.ids:
            at = 0
            while at < len(tokens):
                piece = next(pieces)
                first, last = max(at, SKIPPED_TOKENS), min(at + len(piece), len(tokens) - 1)
                if first < last:
                    wanted = np.asarray(self._logits[start + first : start + last])
                    following = np.array(tokens[first + 1 : last + 1], np.int64)
                    comparison.add(wanted, piece[first - at : last - at], following)
                at += len(piece)
            start += len(tokens)
        return comparison.summary()


def threads() -> int:
    """Threads for our graphs."""
    return hardware.physical_cores()


def forward(run: GraphRun, tokens: Sequence[int]) -> Iterator[Logits]:
    """The logits of one document, a piece at a time."""
    for start in range(0, len(tokens), RUN_TOKENS):
        yield run.forward(np.array(tokens[start : start + RUN_TOKENS], np.int64), start)


def compiled_folder(model: Path, recipe: str, work: Path) -> Path:
    """Compile `recipe`, anew unless it is the reference."""
    folder = work / recipe
    if recipe != "f32" or not folder.exists():
        folder.mkdir(exist_ok=True)
        files = {model.name: model}
        known = inputs_of(files, work) if RECIPES[recipe].knows_inputs else None
        compile_model(files, folder, recipe, "cpu", calibration=known)
    return folder


def inputs_of(files: dict[str, Path], work: Path) -> Path:
    """The folder of the second moments that a high effort needs."""
    shown, moments = work / "shown", work / "moments"
    if not moments.exists():
        shown.mkdir(exist_ok=True)
        moments.mkdir()
        compile_model(files, shown, "f32", "cpu", show_inputs=True)
        calibrate(CalibrateJob(folder=str(shown), output=str(moments)))
    return moments


def our_row(model: Path, recipe: str, work: Path, reference: Reference) -> Row:
    """Compile `recipe` and measure it."""
    folder = compiled_folder(model, recipe, work)
    compiled = CompiledModel.load(folder)
    job = VerifyJob(model=recipe, folder=str(folder), reference="")
    run = GraphRun.opened(folder, compiled, job, max(map(len, reference.ids)), threads())
    found = reference.compare(piece for tokens in reference.ids for piece in forward(run, tokens))
    with closing(open_source({model.name: model})) as opened:
        head = sum(
            info.elements
            for name, info in opened.tensors.items()
            if name in ("model.embed_tokens.weight", "lm_head.weight")
        )
    total, body = graph_bytes(folder / GRAPH_FILE)
    parameters = compiled.parameters
    size = sum(path.stat().st_size for path in folder.glob(f"{GRAPH_FILE}*"))
    return Row(f"`{recipe}`", size, 8 * total / parameters, 8 * body / (parameters - head), found)


def graph_bytes(path: Path) -> tuple[int, int]:
    """Bytes of the weights of a compiled graph: (all, those of the body)."""
    total = body = 0
    seen: set[tuple[int, int]] = set()
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        place = {
            entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"
        }
        where = (place.get("offset", -1), place.get("length", 0))
        if not place or where in seen or ".rotary." in tensor.name:
            continue  # a table of angles is no weight; a tied embedding has two names
        seen.add(where)
        total += where[1]
        if not tensor.name.startswith(("model.embed_tokens.", "lm_head.")):
            body += where[1]
    return total, body


def write_f32_gguf(source: Path, target: Path) -> None:
    """Write the GGUF file `source` with every tensor as float32, by the gguf package alone."""
    reader = gguf.GGUFReader(str(source))
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(str(target), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32).reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def peer_row(python: str, kind: str, work: Path, reference: Reference) -> Row:
    """Quantise the F32 file with llama.cpp, or take it as it is, and measure it."""
    path = work / f"{kind}.gguf"
    if not path.exists():
        command = [python, str(PEER), "quantize", str(work / "F32.gguf"), str(path), kind]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    found = reference.compare(peer_logits(python, path, reference))
    counts = [0, 0, 0, 0]  # bytes and weights of all tensors, of the body
    for tensor in gguf.GGUFReader(str(path)).tensors:
        in_body = tensor.name not in ("token_embd.weight", "output.weight")
        sizes = (int(tensor.n_bytes), int(tensor.n_elements))
        for index, value in enumerate((*sizes, *(size * in_body for size in sizes))):
            counts[index] += value
    size = path.stat().st_size
    return Row(
        f"llama.cpp {kind}", size, 8 * counts[0] / counts[1], 8 * counts[2] / counts[3], found
    )


def peer_logits(python: str, path: Path, reference: Reference) -> Iterator[Logits]:
    """Logits of all documents from llama.cpp, one document at a time."""
    vocab_size = reference.compiled.vocab_size
    process = subprocess.Popen(
        [python, str(PEER), "logits", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},  # threads that spin starve other programs
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write(json.dumps([list(tokens) for tokens in reference.ids]).encode())
        process.stdin.close()
        for tokens in reference.ids:
            data = process.stdout.read(4 * len(tokens) * vocab_size)
            if len(data) != 4 * len(tokens) * vocab_size:
                sys.exit(f"llama.cpp gave no logits for {path.name}")
            yield np.frombuffer(data, np.float32).reshape(len(tokens), vocab_size)


def print_table(rows: Sequence[Row]) -> None:
    """The Markdown table."""
    print(
        "| format | size, MB | bits/weight | in the body | KL mean | KL p99 | top-1 | perplexity |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        found = row.found
        print(
            f"| {row.name} | {row.size_bytes / 1e6:.0f} | {row.bits:.2f} | {row.body_bits:.2f} | "
            f"{found['kl_mean']:.2g} | {found['kl_p99']:.2g} | "
            f"{100 * found['top1_agreement']:.1f} % | {found['perplexity']:.2f} |"
        )


def run(options: argparse.Namespace, work: Path) -> list[Row]:
    """Measure everything asked for, printing each row's numbers as they come."""
    model: Path = options.model
    folder = compiled_folder(model, "f32", work)
    tokenizer = Tokenizer(folder, CompiledModel.load(folder))
    texts = list(documents().values())[: options.documents or None]
    reference = Reference(work, folder, [tokenizer.encode(text) for text in texts])
    makers = [
        partial(our_row, model, recipe, work, reference) for recipe in options.recipes.split(",")
    ]
    if options.peer_python:
        if not (work / "F32.gguf").exists():
            write_f32_gguf(model, work / "F32.gguf")
        kinds = ("F32", *options.peers.split(","))
        makers += [partial(peer_row, options.peer_python, kind, work, reference) for kind in kinds]
    rows: list[Row] = []
    for make in makers:
        started_s = time.monotonic()
        rows.append(make())
        took_s = time.monotonic() - started_s
        print(
            f"{rows[-1].name}: KL {rows[-1].found['kl_mean']:.3g}, {took_s:.0f} s", file=sys.stderr
        )
    return rows


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--recipes", default=",".join(name for name in RECIPES if name not in ("f16", "bf16"))
    )
    parser.add_argument("--peer-python", metavar="PYTHON")
    parser.add_argument("--peers", default="Q8_0,Q4_K_M,Q4_0")
    parser.add_argument("--documents", type=int, default=0, help="only the first few")
    parser.add_argument("--work", type=Path, help="keep what is made in this folder")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        rows = run(options, work)
    print(f"{options.model.name}: {rows[0].found['tokens']} positions\n")
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
