"""kill -9 of the daemon at random moments of a pull: the next pull goes on and ends the same."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import tempfile
import time
from pathlib import Path

from ohmygpu.core.partial import UNIT_BYTES
from tests.e2e.world import HUB_NAME, QUESTION, World, children_of
from tests.hub_faults import bytes_asked_twice
from tests.hub_server import HubServer

KILLS = 20
CONNECTIONS = 8
BYTES_PER_S = 4_000_000  # of each connection: so that many kills fall into the download


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pull_until(world: World, seconds: float) -> bool:
    """Start a pull over HTTP and read its events for `seconds`; True when it finished."""
    connection = http.client.HTTPConnection("127.0.0.1", world.port, timeout=seconds)
    ends_s = time.monotonic() + seconds
    with contextlib.closing(connection), contextlib.suppress(TimeoutError):
        connection.request("POST", "/v1/models/pull", json.dumps({"model": HUB_NAME}))
        reply = connection.getresponse()
        while line := reply.readline():
            event = json.loads(line)
            assert event["phase"] != "error", event
            if event["phase"] == "done":
                return True
            left_s = ends_s - time.monotonic()
            if left_s <= 0:
                return False
            if connection.sock is not None:
                connection.sock.settimeout(left_s)
    return False


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_pull_survives_kills_of_the_daemon_at_any_moment(hub_root: Path, world: World) -> None:
    moments = random.Random(6)
    with (
        tempfile.TemporaryDirectory(prefix="omg-") as folder,
        HubServer(hub_root) as hub,
    ):
        hub.faults.add("slow", "GET .*", bytes_per_s=BYTES_PER_S)
        victim = World(Path(folder) / "home", hub.url)
        kills = 0
        while kills < KILLS:
            victim.start()
            assert victim.daemon is not None
            finished = pull_until(victim, moments.uniform(0.1, 2.0))
            children = children_of(victim.daemon.pid)
            victim.kill()
            deadline_s = time.monotonic() + 10
            while any(map(alive, children)):
                assert time.monotonic() < deadline_s, "a child outlived the daemon"
                time.sleep(0.02)
            kills += 1
            if finished:
                break
        entries = hub.requests.of("GET .*")
        ranges = [entry for entry in entries if entry.get("start")]
        asked_twice = bytes_asked_twice(entries)
        print(f"{kills} kills, {len(ranges)} resumed ranges, {asked_twice} bytes asked twice")
        assert kills >= KILLS // 2, "the pull ended before it could be disturbed"
        assert ranges, "no pull went on where the last one was killed"
        assert asked_twice <= kills * CONNECTIONS * UNIT_BYTES
        victim.omg("model", "pull", HUB_NAME)  # without a daemon: the same install, in the CLI
        victim.omg("model", "gc")
        compiled = digests(victim.home / "models" / "compiled")
        (key,) = {name.split("/")[0] for name in compiled}
        undisturbed = digests(world.home / "models" / "compiled" / key)
        assert compiled == {f"{key}/{name}": digest for name, digest in undisturbed.items()}
        assert not list((victim.home / "models" / "partial").iterdir())
        blobs = {path.name for path in (victim.home / "models" / "blobs").iterdir()}
        (record,) = (victim.home / "models" / "manifests").rglob("*.json")
        named = {f"sha256-{a['sha256']}" for a in json.loads(record.read_text())["artifacts"]}
        assert blobs == named
        victim.start()
        chat = {"model": HUB_NAME, "messages": [{"role": "user", "content": QUESTION}]}
        _, reply = victim.post("/v1/chat/completions", {**chat, "temperature": 0, "max_tokens": 40})
        assert "Paris" in reply["choices"][0]["message"]["content"]
        assert victim.stop() == 0
