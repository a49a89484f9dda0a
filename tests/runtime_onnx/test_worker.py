"""The worker as the daemon sees it: a process at the other end of a socket."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.records import GRAPH_FILE, RunSpec
from ohmygpu.runtime_api import (
    Delta,
    FinishReason,
    GenerateRequest,
    RuntimeCaps,
    RuntimeStatus,
    SamplingParams,
    delta_from_plain,
    to_plain,
)
from ohmygpu.runtime_onnx.worker import Connection
from ohmygpu.runtime_wire import HEADER, decode_frame, encode_frame, frame_length

from .tiny_graph import write_tiny_model

CONTEXT = 2048
TIMEOUT_S = 60.0  # of a test that would hang otherwise
COMMAND = [sys.executable, "-m", "ohmygpu.runtime_onnx.worker"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path, context=CONTEXT)
    return path


class Peer:
    """The daemon's end: frames out, frames in."""

    def __init__(self, spec: RunSpec) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(TIMEOUT_S)
        with theirs:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", "--fd", str(theirs.fileno()), spec.to_json()],
                pass_fds=(theirs.fileno(),),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        self.reader = self.socket.makefile("rb")

    def send(self, op: str, **fields: Any) -> None:
        self.socket.sendall(encode_frame({"op": op, **fields}))

    def generate(
        self, number: int, text: str = "hello", max_tokens: int | None = 6, **fields: Any
    ) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        request = GenerateRequest(prompt=text, sampling=sampling, **fields)
        self.send("generate", id=number, request=to_plain(request))

    def receive(self) -> dict[str, Any]:
        header = self.reader.read(HEADER.size)
        assert len(header) == HEADER.size, f"the worker closed: {self.end()}"
        return decode_frame(self.reader.read(frame_length(header)))

    def until_ended(self, *numbers: int) -> tuple[dict[int, str], dict[int, Delta]]:
        """Read frames until all of `numbers` have ended: (text, last delta)."""
        texts: dict[int, str] = {}
        last: dict[int, Delta] = {}
        while not last.keys() >= set(numbers):
            frame = self.receive()
            assert frame["op"] == "step"
            assert "errors" not in frame
            for number, data in frame["deltas"]:
                delta = delta_from_plain(data)
                texts[number] = texts.get(number, "") + delta.text
                if delta.finish_reason is not None:
                    last[number] = delta
        return texts, last

    def end(self) -> tuple[int, str]:
        """(exit status, what it wrote to stderr), once it has ended by itself."""
        _, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, errors.decode()

    def close(self) -> None:
        self.reader.close()
        self.socket.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def connect(path: Path = folder, **fields: Any) -> Peer:
        options = {"threads": 1, "slots": 2, "max_queue": 2, **fields}
        peers.append(Peer(RunSpec(model="tiny", folder=str(path), **options)))
        return peers[-1]

    yield connect
    for peer in peers:
        peer.close()


@pytest.fixture
def ready(start: Callable[..., Peer]) -> Peer:
    peer = start()
    assert peer.receive()["op"] == "ready"
    return peer


def test_it_says_ready_with_caps_then_answers(start: Callable[..., Peer]) -> None:
    peer = start()
    frame = peer.receive()
    assert frame["op"] == "ready"
    caps = RuntimeCaps(**frame["caps"])
    assert (caps.context_tokens, caps.slots, caps.max_queue) == (CONTEXT, 2, 2)
    peer.generate(7, "hello")
    texts, last = peer.until_ended(7)
    assert len(texts[7]) == 6
    assert last[7].finish_reason is FinishReason.LENGTH
    assert last[7].usage is not None
    assert (last[7].usage.prompt_tokens, last[7].usage.completion_tokens) == (5, 6)


def test_one_frame_a_step_carries_all_sequences(ready: Peer) -> None:
    ready.generate(1, "one", max_tokens=40)
    ready.generate(2, "two", max_tokens=40)
    together = 0
    ended: set[int] = set()
    while ended != {1, 2}:
        frame = ready.receive()
        together += len(frame["deltas"]) == 2
        numbers = [number for number, _ in frame["deltas"]]
        assert len(set(numbers)) == len(numbers)
        ended |= {number for number, delta in frame["deltas"] if "finish_reason" in delta}
    assert together > 10


def test_health_tells_what_runs(ready: Peer) -> None:
    ready.send("health", id=5)
    frame = ready.receive()
    assert (frame["op"], frame["id"]) == ("health", 5)
    status = RuntimeStatus(**frame["status"])
    assert (status.state, status.running, status.free_slots) == ("ready", 0, 2)
    assert status.memory_bytes > 0


def test_an_aborted_request_frees_its_slot_and_says_nothing_more(ready: Peer) -> None:
    ready.generate(1, "hello", max_tokens=None)
    assert ready.receive()["deltas"][0][0] == 1
    ready.send("abort", id=1)
    ready.send("health", id=2)
    while (frame := ready.receive())["op"] != "health":
        assert frame["deltas"][0][0] == 1
    ready.generate(3, "hello")  # any step after the abort's is without the aborted one
    seen: list[int] = []
    while True:
        frame = ready.receive()
        seen += [number for number, _ in frame["deltas"]]
        if any("finish_reason" in delta for _, delta in frame["deltas"]):
            break
    assert seen[-6:] == [3] * 6
    ready.send("health", id=4)
    assert RuntimeStatus(**ready.receive()["status"]).free_slots == 2


def test_errors_of_a_request_come_back_whole_and_hurt_nobody_else(ready: Peer) -> None:
    ready.generate(1, "x" * (CONTEXT + 1))
    ((number, error),) = ready.receive()["errors"]
    assert (number, error["code"]) == (1, "context_length_exceeded")
    assert error["details"]["context_tokens"] == CONTEXT
    ready.send("generate", id=2, request={"prompt": "x", "sampling": {"temperature": -1}})
    ((number, error),) = ready.receive()["errors"]
    assert (number, error["code"], error["details"]["param"]) == (
        2,
        "invalid_request",
        "temperature",
    )
    ready.send("generate", id=3, request={"nonsense": 1})
    ((number, error),) = ready.receive()["errors"]
    assert (number, error["code"]) == (3, "invalid_request")
    ready.generate(4)
    assert len(ready.until_ended(4)[0][4]) == 6


def test_a_full_queue_is_busy_with_a_time_to_wait(ready: Peer) -> None:
    for number in range(5):
        ready.generate(number, "hello", max_tokens=None)
    while not (errors := ready.receive().get("errors")):
        pass
    ((number, error),) = errors
    assert (number, error["code"]) == (4, "busy")
    assert error["details"]["retry_after_s"] >= 1


def test_unload_ends_running_requests_with_abort_and_the_process(ready: Peer) -> None:
    ready.generate(1, "hello", max_tokens=None)
    ready.receive()
    ready.send("unload")
    _, last = ready.until_ended(1)
    assert last[1].finish_reason is FinishReason.ABORT
    assert ready.end()[0] == 0


def test_the_process_ends_when_the_socket_does(ready: Peer) -> None:
    ready.generate(1, "hello", max_tokens=None)
    ready.receive()
    ready.socket.shutdown(socket.SHUT_RDWR)
    assert ready.end() == (0, "")


def test_it_ignores_ctrl_c_and_ends_on_sigterm(ready: Peer) -> None:
    ready.process.send_signal(signal.SIGINT)
    ready.generate(1)
    ready.until_ended(1)
    ready.process.send_signal(signal.SIGTERM)
    assert ready.end() == (0, "")


def test_sending_waits_for_a_peer_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = Connection(theirs)
    sent: list[int] = []

    def send() -> None:
        for number in range(1000):
            connection.send({"op": "step", "number": number, "padding": "x" * 100})
            sent.append(number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    while select.select([], [theirs], [], 0)[1]:
        pass  # until the pipe is full
    assert len(sent) < 1000
    received = Connection(ours)
    frames = [received.receive() for _ in range(1000)]
    assert [frame["number"] for frame in frames if frame is not None] == list(range(1000))
    sender.join()
    theirs.close()
    ours.close()


def test_a_model_that_cannot_be_loaded_says_why_and_ends(
    start: Callable[..., Peer], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / GRAPH_FILE).write_bytes(b"short")
    peer = start(tmp_path)
    frame = peer.receive()
    assert frame["op"] == "failed"
    assert frame["error"]["code"] == "corrupt_file"
    assert GRAPH_FILE in frame["error"]["message"]
    assert peer.end()[0] != 0


def test_a_broken_frame_ends_it_with_a_reason(ready: Peer) -> None:
    ready.send("dance", id=1)
    status, errors = ready.end()
    assert status != 0
    assert "unknown frame 'dance'" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_it_dies_with_its_parent_even_while_the_socket_lives(folder: Path) -> None:
    ours, theirs = socket.socketpair()
    spec = RunSpec(model="tiny", folder=str(folder), threads=1)
    program = (
        "import subprocess, sys\n"
        f"worker = subprocess.Popen({[*COMMAND, 'serve', '--fd', str(theirs.fileno())]!r}"
        f" + [{spec.to_json()!r}], pass_fds=({theirs.fileno()},))\n"
        "print(worker.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    keep = theirs  # our copy of the worker's end: no end of file will tell it
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    ours.settimeout(TIMEOUT_S)
    assert ours.recv(4)  # it is up: the first bytes of "ready"
    descriptor = os.pidfd_open(worker)
    parent.kill()
    parent.communicate()
    try:
        readable, _, _ = select.select([descriptor], [], [], TIMEOUT_S)
        assert readable, "the worker outlived its parent"
    finally:
        os.close(descriptor)
        keep.close()
        ours.close()


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, timeout=TIMEOUT_S, check=False
    )
    return done.returncode, json.loads(done.stdout)


def test_probe_lists_execution_providers() -> None:
    status, found = run("probe")
    assert status == 0
    assert "CPU" in found["execution_providers"]
    assert found["onnxruntime"]


def test_bench_measures_prefill_and_decode(folder: Path, tmp_path: Path) -> None:
    status, result = run("bench", RunSpec(model="tiny", folder=str(folder), threads=1).to_json())
    assert status == 0
    assert result["prefill_tokens_per_s"] > 0
    assert set(result["decode_tokens_per_s"]) == {"1", "8"}
    assert min(result["decode_tokens_per_s"].values()) > 0
    status, result = run("bench", RunSpec(model="gone", folder=str(tmp_path)).to_json())
    assert status == 1
    assert result["error"]["code"] == "corrupt_file"


def test_serving_imports_neither_onnx_nor_transformers() -> None:
    program = (
        "import sys, ohmygpu.runtime_onnx.worker\n"
        "heavy = {'onnx', 'transformers', 'torch', 'quart', 'httpx2', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
