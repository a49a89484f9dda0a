"""How long a compile takes beside llama.cpp's conversion and quantisation of the same weights.

    python tests/benchmarks/compile.py MODEL.gguf --llama-cpp FOLDER --peer-python PYTHON
        [--convert-python PYTHON] [--rounds 3]

MODEL is written as the bfloat16 SafeTensors repository it could have come from; that is what both
sides read. Ours is the process a pull starts, `python -m ohmygpu.convert`. Theirs is llama.cpp's
own convert_hf_to_gguf.py to a BF16 file, then its quantisation of that file with all cores; FOLDER
is its source (the sdist of llama-cpp-python has it in vendor/llama.cpp), the first PYTHON has
llama-cpp-python, the second torch, transformers and sentencepiece (this one unless given).

Sides alternate within a round, at the same priority; ratios are taken round by round. CPU time is
user and system time of all threads, which a busy machine stretches less than it does the wall
clock. Memory is the highest resident size, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.make_repo import make_repo

PEER = Path(__file__).parent / "llama_peer.py"
PAIRS = (("q8", "Q8_0"), ("q4", "Q4_0"), ("q4", "Q4_K_M"))
NICE = ("nice", "-n", "5")  # what our compile gives itself


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    wall_s: float
    cpu_s: float
    peak_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.wall_s + other.wall_s,
            self.cpu_s + other.cpu_s,
            max(self.peak_bytes, other.peak_bytes),
        )


def measure(command: Sequence[str], job: str = "") -> Cost:
    """Run `command`, with `job` as its first line of input, and wait for it."""
    started_s = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        assert process.stdin is not None
        process.stdin.write(job.encode())
        process.stdin.flush()  # open until the end: closing it would cancel our compile
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdin.close()
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{log.read().decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    wall_s = time.monotonic() - started_s
    return Cost(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def ours(repo: Path, recipe: str, work: Path) -> Cost:
    """Compile the repository."""
    with emptied(work / recipe) as output:
        files = {path.name: str(path) for path in repo.iterdir()}
        job = {"files": files, "output": str(output), "recipe": recipe, "target": "cpu"}
        return measure([sys.executable, "-m", "ohmygpu.convert"], json.dumps(job) + "\n")


def theirs(repo: Path, options: argparse.Namespace, work: Path) -> dict[str, Cost]:
    """Convert the repository, then quantise the file to each type."""
    with emptied(work / "gguf") as folder:
        whole, part = folder / "bf16.gguf", folder / "quantised.gguf"
        script = str(options.llama_cpp / "convert_hf_to_gguf.py")
        convert = [*NICE, options.convert_python, script, str(repo), "--outfile", str(whole)]
        costs = {"convert": measure([*convert, "--outtype", "bf16"])}
        for kind in sorted({kind for _, kind in PAIRS}):
            quantize = [options.peer_python, str(PEER), "quantize", str(whole), str(part), kind]
            costs[kind] = measure([*NICE, *quantize])
            part.unlink()
        return costs


def play_round(number: int, repo: Path, options: argparse.Namespace, work: Path) -> dict[str, Cost]:
    """Both sides, ours first in every other round."""

    def compile_all() -> dict[str, Cost]:
        return {recipe: ours(repo, recipe, work) for recipe in dict(PAIRS)}

    def convert_all() -> dict[str, Cost]:
        return theirs(repo, options, work)

    first, second = (compile_all, convert_all)[:: -1 if number % 2 else 1]
    found = first() | second()
    print({name: f"{cost.wall_s:.1f} s, CPU {cost.cpu_s:.1f} s" for name, cost in found.items()})
    sys.stdout.flush()
    return found


def print_table(rounds: Sequence[Mapping[str, Cost]]) -> None:
    """Medians, and ratios round by round."""
    print("\n| | wall, s | CPU, s | cores | peak memory, MB |\n|---|---|---|---|---|")
    for name in rounds[0]:
        costs = [costs[name] for costs in rounds]
        wall_s = statistics.median(cost.wall_s for cost in costs)
        cpu_s = statistics.median(cost.cpu_s for cost in costs)
        cores = statistics.median(cost.cpu_s / cost.wall_s for cost in costs)
        peak = max(cost.peak_bytes for cost in costs)
        print(f"| {name} | {wall_s:.1f} | {cpu_s:.1f} | {cores:.1f} | {peak / 1e6:.0f} |")
    print("\n| ratio, ours / (convert + quantise) | wall | worst | CPU | worst |")
    print("|---|---|---|---|---|")
    for recipe, kind in PAIRS:
        pairs = [(costs[recipe], costs["convert"] + costs[kind]) for costs in rounds]
        wall = [mine.wall_s / other.wall_s for mine, other in pairs]
        cpu = [mine.cpu_s / other.cpu_s for mine, other in pairs]
        print(
            f"| {recipe} / {kind} | **{statistics.median(wall):.2f}** | {max(wall):.2f} | "
            f"**{statistics.median(cpu):.2f}** | {max(cpu):.2f} |"
        )


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--peer-python", required=True, metavar="PYTHON")
    parser.add_argument("--convert-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_repo(options.model, work / "repo")
        size = sum(path.stat().st_size for path in (work / "repo").glob("*.safetensors"))
        print(f"{options.model.name} as bfloat16 SafeTensors, {size / 1e9:.2f} GB")
        rounds = [
            play_round(number, work / "repo", options, work) for number in range(options.rounds)
        ]
    print_table(rounds)


if __name__ == "__main__":
    main()
