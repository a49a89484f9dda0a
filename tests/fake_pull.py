"""Pulls with a provider and a compiler made up for tests; as a program, one that stops on demand.

    python fake_pull.py REFERENCE     in OHMYGPU_HOME; events on stdout, one JSON a line

FAKE_KILL names the point at which the program kills itself; at FAKE_GATE it prints `{"gate": …}`
and waits for a line on stdin. FAKE_LOG is a file that gets a line per fetch and per compile.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ohmygpu import install
from ohmygpu.convert import process, recipes
from ohmygpu.core import files, providers
from ohmygpu.core.errors import Cancelled, OhMyGPUError
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.provider import RemoteFile, Resolved
from ohmygpu.core.records import Artifact, Revision
from ohmygpu.core.refs import ModelRef, quant_label
from ohmygpu.core.repository import Repository
from ohmygpu.core.settings import load_settings

COMPILER = r"""
import json, os, pathlib, sys, threading
job = json.loads(sys.stdin.readline())
def watch():
    sys.stdin.read()
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
log = os.environ.get("FAKE_LOG")
if log:
    with open(log, "a") as file:
        file.write(f"compile {os.getpid()}\n")
output = pathlib.Path(job["output"])
total = sum(os.path.getsize(path) for path in job["files"].values())
done = 0
mode = os.environ.get("FAKE_COMPILER", "")
def say(**message):
    print(json.dumps(message), flush=True)
if mode == "die":
    print("Traceback\n  secret path\nValueError: boom\x1b[31m", file=sys.stderr)
    sys.exit(3)
if mode == "refuse":
    say(error={"code": "unsupported_model", "message": "no such block", "details": {"a": 1}})
    sys.exit(1)
if mode == "killed":
    os.kill(os.getpid(), 9)
with (output / "model.onnx").open("wb") as graph:
    for name in sorted(job["files"]):
        data = pathlib.Path(job["files"][name]).read_bytes()
        graph.write(job["recipe"].encode() + data)
        done += len(data)
        print("a stray line of some library")
        say(done_bytes=done, total_bytes=total)
        if mode == "hang":
            threading.Event().wait()
(output / "token").write_text(os.environ.get("HF_TOKEN", "none"))
fields = dict.fromkeys("context_length vocab_size layers kv_heads head_dim parameters weights_bytes"
    " hidden_size heads feed_forward_length converter_version".split(), 1)
fields.update(family="llama", recipe=job["recipe"], target=job["target"], kv_dtype="float32",
    source_format="gguf", quantization="x", rope_theta=1.0, norm_epsilon=1e-5, bos_token_id=None,
    eos_token_ids=[0], files={"model.onnx": (output / "model.onnx").stat().st_size})
(output / "compile.json").write_text(json.dumps(fields))
say(compiled=fields)
"""

GGUF = {"tiny.Q4_1.gguf": b"GGUF" + bytes(range(256)) * 40}
SAFETENSORS = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights" * 1000,
}


class FakeProvider:
    """A provider of `content`; counts what is asked of it, and fails or stops where told."""

    def __init__(self, content: dict[str, bytes], commit: str = "c" * 40) -> None:
        self.content = content
        self.commit = commit
        self.config: dict[str, Any] | None = None
        if "config.json" in content:
            self.config = json.loads(content["config.json"])
        self.gguf_architecture: str | None = None
        self.gguf_experts = 0
        self.fetches = 0
        self.failure: OhMyGPUError | None = None
        self.at: Callable[[str], None] = lambda _: None

    def resolve(self, ref: ModelRef) -> Resolved:
        self.at("resolve")
        if self.failure is not None:
            raise self.failure
        is_gguf = any(name.endswith(".gguf") for name in self.content)
        label = next(filter(None, map(quant_label, self.content)), None) if is_gguf else None
        variant = label.lower() if label else ref.variant and ref.variant.lower()
        revision = Revision(ref.revision or "main", self.commit)
        return Resolved(
            ref=ref,
            display_name=ref.name,
            variant=variant,
            default_variant=variant if is_gguf else None,
            revision=None if ref.provider == "file" else revision,
            files=tuple(
                RemoteFile(name, len(data), sha256(data), format=file_format(name), url=name)
                for name, data in self.content.items()
            ),
            config=self.config,
            source_format="gguf" if is_gguf else "safetensors",
            gguf_architecture=self.gguf_architecture,
            gguf_experts=self.gguf_experts,
        )

    def fetch(
        self, resolved: Resolved, repository: Repository, sink: EventSink, cancel: threading.Event
    ) -> tuple[Artifact, ...]:
        self.fetches += 1
        log("fetch")
        artifacts = []
        for file in resolved.files:
            if cancel.is_set():
                raise Cancelled("cancelled")
            data = self.content[file.filename]
            if not repository.has_blob(file.digest, file.size):
                part = repository.partial_dir / f"{file.digest}.part"
                part.write_bytes(data[: len(data) // 2])
                self.at("half a file")
                part.write_bytes(data)
                sink(Event("download", done_bytes=file.size, total_bytes=file.size))
                repository.add_blob(part, file.digest)
            artifacts.append(Artifact(file.filename, file.size, file.digest, file.format))
        return tuple(artifacts)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def file_format(name: str) -> str:
    suffix = name.rpartition(".")[2]
    return suffix if suffix in ("gguf", "safetensors") else name.partition(".")[0]


def log(line: str) -> None:
    if path := os.environ.get("FAKE_LOG"):
        with Path(path).open("a") as file:
            file.write(f"{line}\n")


def stop_at(point: str) -> None:
    """Die or wait here when the environment says so."""
    if os.environ.get("FAKE_KILL") == point:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("FAKE_GATE") == point:
        print(json.dumps({"gate": point}), flush=True)
        sys.stdin.readline()


def around(owner: Any, name: str) -> None:
    """Make `before NAME` and `after NAME` points of the function `owner.name`."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **named: Any) -> Any:
        stop_at(f"before {name}")
        result = real(*args, **named)
        stop_at(f"after {name}")
        return result

    setattr(owner, name, wrapped)


def main() -> None:
    fake = FakeProvider(SAFETENSORS if "safe" in sys.argv[1] else GGUF)
    fake.at = stop_at
    providers.provider_for = lambda *_: fake
    process.COMPILER = (sys.executable, "-c", COMPILER)
    for name in ("add_blob", "new_compiled", "commit_compiled", "write_record", "discard"):
        around(Repository, name)
    for name in ("sync_tree", "write_whole", "sync_folder"):
        around(files, name)

    def sink(event: Event) -> None:
        print(json.dumps(event.to_dict()), flush=True)
        if event.phase == "compile":
            stop_at("compiling" if event.done_bytes else "compile starts")

    try:
        recipes.SMALL_FLOAT_BYTES = 0  # as if the model were a large one
        install.pull(sys.argv[1], load_settings(), sink=sink)
    except OhMyGPUError:
        sys.exit(1)


if __name__ == "__main__":
    main()
