"""A whole installation in a temporary folder: a local hub with real weights, `omg`, a daemon."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
TIMEOUT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class World:
    """`omg` against one home folder, one hub and one port."""

    def __init__(self, home: Path, hub_url: str, **settings: str) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.daemon: subprocess.Popen[str] | None = None
        scrubbed = ("OHMYGPU_", "HF_")
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(scrubbed)},
            "OHMYGPU_HOME": str(home),
            "OHMYGPU_SERVER_PORT": str(self.port),
            "HF_ENDPOINT": hub_url,
            **settings,
        }

    def omg(
        self, *arguments: str, stdin: str | None = None, expect: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run `omg …`; `expect` is the exit code it must give (None = any)."""
        result = subprocess.run(
            [sys.executable, "-m", "ohmygpu", *arguments],
            env=self.environment,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        if expect is not None:
            assert result.returncode == expect, f"omg {arguments}: {result.stderr}{result.stdout}"
        return result

    def start(self) -> None:
        """Start the daemon in the foreground of a child process and wait until it answers."""
        self.daemon = subprocess.Popen(
            [sys.executable, "-m", "ohmygpu", "serve"],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline_s = time.monotonic() + 30
        while True:
            try:
                self.get("/health")
            except (OSError, urllib.error.URLError):
                if self.daemon.poll() is not None:
                    assert self.daemon.stderr is not None
                    raise AssertionError(self.daemon.stderr.read()) from None
                assert time.monotonic() < deadline_s, "the daemon does not answer"
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        """kill -9 the daemon."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        if self.daemon.stderr is not None:
            self.daemon.stderr.close()
        self.daemon = None

    def stop(self) -> int:
        """SIGTERM the daemon; its exit code."""
        assert self.daemon is not None
        self.daemon.terminate()
        code = self.daemon.wait(timeout=60)
        if self.daemon.stderr is not None:
            self.daemon.stderr.close()
        self.daemon = None
        return code

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=TIMEOUT_S) as reply:
            return json.load(reply)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, JSON body) of a POST; error statuses are returned, not raised."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def running(self, model: str) -> int:
        """Sequences that `model` computes at the moment."""
        for entry in self.get("/health")["models"]:
            if entry["name"].startswith(model):
                return int(entry["running"])
        return 0

    def files(self) -> dict[str, int]:
        """Every file of the model store with its size, by path."""
        models = self.home / "models"
        return {
            str(path.relative_to(models)): path.stat().st_size
            for path in sorted(models.rglob("*"))
            if path.is_file() and "/." not in str(path.relative_to(models))
        }


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`, and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found
