"""Models with real layer sizes and random weights through the whole path: hub, pull, serve, answer.

    python -m tests.benchmarks.shapes --tokenizer MODEL.gguf [--recipe q8] [--layers 2]
        [--shapes phi-2,llama-3.1-8b,qwen3-30b-a3b]

For each shape a sharded bfloat16 repository is put on a local hub, `omg pull` downloads and
compiles it, a daemon of its own loads it and answers over HTTP: `/v1/chat/completions`, or
`/api/generate` where the shape has no chat template. Random weights say nothing of meaning, so an
answer is whatever it is; it has to come, with as many tokens as were asked for, twice the same.

Peak memory of the pull is that of its largest process (the compile), pages of mapped files
included; of the worker, its own peak with the weights loaded.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.e2e.world import World, children_of
from tests.hub_repos import digests_of
from tests.hub_server import HubServer
from tests.shaped_repo import SHAPES, make_shaped_repo

TOKENS = 16
PROMPT = "What is the capital of France?"


def pull(world: World, name: str, recipe: str) -> tuple[float, int]:
    """(seconds, peak bytes of any of its processes) of `omg pull`, without a daemon."""
    command = [sys.executable, "-m", "ohmygpu", "pull", name, "--recipe", recipe]
    started_s = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=world.environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)  # the largest of it and its children
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{name}: {log.read().decode()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.monotonic() - started_s, usage.ru_maxrss * unit


def ask(world: World, model: str, *, chat: bool) -> tuple[float, str]:
    """(seconds, text) of one greedy answer of TOKENS tokens."""
    started_s = time.monotonic()
    if chat:
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "temperature": 0,
            "max_tokens": TOKENS,
        }
        status, reply = world.post("/v1/chat/completions", body)
    else:
        options = {"temperature": 0, "num_predict": TOKENS}
        body = {"model": model, "prompt": PROMPT, "stream": False, "options": options}
        status, reply = world.post("/api/generate", body)
    if status != 200:
        sys.exit(f"{model}: {status} {reply}")
    took_s = time.monotonic() - started_s
    count = reply["usage"]["completion_tokens"] if chat else reply["eval_count"]
    text = reply["choices"][0]["message"]["content"] if chat else reply["response"]
    if not 0 < count <= TOKENS:
        sys.exit(f"{model}: an answer of {count} tokens")
    return took_s, str(text)


def peak_bytes(pid: int) -> int:
    """The highest resident size among the processes below `pid`."""
    peaks = [0]
    for child in children_of(pid):
        status = Path(f"/proc/{child}/status")
        lines = status.read_text().splitlines() if status.exists() else []
        peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return max(peaks)


def play(shape: str, options: argparse.Namespace, work: Path) -> str:
    """Everything for one shape; returns its line of the table."""
    name = f"shaped/{shape}-{options.layers}-layers"
    config = SHAPES[shape] | {"num_hidden_layers": options.layers}
    weights_bytes = make_shaped_repo(config, work / "hub" / name, options.tokenizer, shards=3)
    chat = (work / "hub" / name / "chat_template.jinja").exists()
    for path in (work / "hub" / name).iterdir():
        digests_of(path)  # now, not while a client waits for its first reply
    with HubServer(work / "hub") as hub:
        world = World(work / "home", hub.url)
        pull_s, pull_bytes = pull(world, name, options.recipe)
        compiled = sum(size for path, size in world.files().items() if path.startswith("compiled/"))
        world.start()
        try:
            first_s, text = ask(world, name, chat=chat)
            second_s, again = ask(world, name, chat=chat)
            assert world.daemon is not None
            worker_bytes = peak_bytes(world.daemon.pid)
        finally:
            world.stop()
    if again != text:
        sys.exit(f"{name}: two greedy answers differ: {text!r}, {again!r}")
    print(f"{name}: {text!r}", flush=True)
    for folder in ("hub", "home"):
        shutil.rmtree(work / folder)
    return (
        f"| {shape}, {options.layers} layers | {'chat' if chat else 'generate'} | "
        f"{weights_bytes / 1e9:.2f} | {compiled / 1e9:.2f} | {pull_s:.0f} | "
        f"{pull_bytes / 1e6:.0f} | {first_s:.1f} | {second_s:.1f} | {worker_bytes / 1e9:.2f} |"
    )


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL.gguf")
    parser.add_argument("--recipe", default="q8")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shapes", default="phi-2,llama-3.1-8b,qwen3-30b-a3b")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here would write gigabytes
    with tempfile.TemporaryDirectory() as temporary:
        lines = [play(shape, options, Path(temporary)) for shape in options.shapes.split(",")]
    print(
        f"\nrecipe {options.recipe}\n\n| shape | route | bf16, GB | compiled, GB | pull, s | "
        "pull's peak, MB | first answer, s | second, s | worker's peak, GB |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
