"""What HTTP costs and what batching gains: one stream and eight, over HTTP and in the engine alone.

    python tests/benchmarks/streams.py MODEL [--rounds 5] [--tokens 128]

MODEL is an installed model. A daemon of its own is started on a free port; sides alternate within
each round, so that noise of a shared machine meets all of them. Prints medians, and ratios taken
round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ohmygpu.core.records import RunSpec
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import load_settings

PROMPT = "Write a long story about a lighthouse keeper and the sea, in many chapters. Part {}."


def stream(port: int, model: str, tokens: int, index: int) -> tuple[float, float, int]:
    """Read one streamed answer from a raw socket: (first token, last token, tokens), in seconds."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT.format(index)}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    first = last = 0.0
    text = b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        while piece := connection.recv(65536):
            now = time.perf_counter()
            if b'"content":"' in piece:
                first = first or now
                last = now
            text += piece
    usage = next(
        json.loads(line.strip()[6:])["usage"]
        for line in text.decode().splitlines()
        if line.startswith("data: {") and '"usage":{' in line
    )
    return first, last, usage["completion_tokens"]


def over_http(port: int, model: str, tokens: int, clients: int) -> float:
    """Tokens per second of `clients` streams together, from the last's first token to the end."""
    results: list[tuple[float, float, int]] = []

    def one(index: int) -> None:
        results.append(stream(port, model, tokens, index))

    threads = [threading.Thread(target=one, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = min(result[0] for result in results)
    ended = max(result[1] for result in results)
    return sum(result[2] - 1 for result in results) / (ended - started)


def in_engine(spec: RunSpec) -> dict[str, Any]:
    """The worker's own measurement, in a process of its own."""
    output = subprocess.run(
        [sys.executable, "-m", "ohmygpu.runtime_onnx.worker", "bench", spec.to_json()],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    measured: dict[str, Any] = json.loads(output)
    return measured["decode_tokens_per_s"]  # type: ignore[no-any-return]


def start_daemon() -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    environment = {**os.environ, "OHMYGPU_SERVER_PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "ohmygpu", "serve"], env=environment)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if process.poll() is not None:
                sys.exit("the daemon did not start")
            time.sleep(0.05)
        else:
            return process, port


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    repository = Repository(load_settings().home)
    record = repository.find(options.model)
    folder: Path = repository.compiled_path(record.compiled_key)
    spec = RunSpec(model=record.full_name, folder=str(folder))
    daemon, port = start_daemon()
    rows: list[dict[str, float]] = []
    try:
        over_http(port, options.model, 8, 8)  # loads the model and warms it
        for _ in range(options.rounds):
            engine = in_engine(spec)
            rows.append(
                {
                    "engine 1": engine["1"],
                    "http 1": over_http(port, options.model, options.tokens, 1),
                    "engine 8": engine["8"],
                    "http 8": over_http(port, options.model, options.tokens, 8),
                }
            )
            print({name: round(value, 1) for name, value in rows[-1].items()}, flush=True)
    finally:
        daemon.terminate()
        daemon.wait()
    print(f"\n{record.full_name}, recipe {record.recipe}: medians of {len(rows)} rounds, tokens/s")
    for name in rows[0]:
        print(f"  {name:10} {statistics.median(row[name] for row in rows):8.1f}")
    for top, bottom in (("http 1", "engine 1"), ("http 8", "http 1"), ("engine 8", "engine 1")):
        ratios = [row[top] / row[bottom] for row in rows]
        print(f"  {top} / {bottom}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
