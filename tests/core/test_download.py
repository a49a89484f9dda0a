"""The downloader against a real server that does everything wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ohmygpu.core import partial as partial_module
from ohmygpu.core.download import Downloader
from ohmygpu.core.errors import (
    AccessDenied,
    Cancelled,
    CorruptFile,
    DiskFull,
    NetworkError,
    NotFound,
    OhMyGPUError,
    RateLimited,
)
from ohmygpu.core.events import Event
from ohmygpu.core.partial import Partial
from ohmygpu.core.provider import RemoteFile
from ohmygpu.core.records import Artifact
from ohmygpu.core.repository import Repository
from ohmygpu.core.transfer import Patience
from tests.hub_faults import bytes_asked_twice
from tests.hub_repos import git_blob_id
from tests.hub_server import HubServer, make_repo

UNIT = 1 << 16
BIG = 10 * UNIT + 123
QUICK = Patience(attempts=3, first_wait_s=0.01, max_wait_s=0.02, progress_bytes=1024)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_module, "UNIT_BYTES", UNIT)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    content = random.Random(1)
    files = {
        "model.safetensors": content.randbytes(BIG),
        "second.safetensors": content.randbytes(3 * UNIT),
        "config.json": b'{"model_type": "llama"}',
        "empty.json": b"",
    }
    make_repo(tmp_path / "hub", "org/model", files)
    with HubServer(tmp_path / "hub", log=tmp_path / "log") as server:
        yield server


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "home")


def remote(hub: HubServer, name: str = "model.safetensors") -> RemoteFile:
    data = (hub.root / "org/model" / name).read_bytes()
    is_lfs = name.endswith(".safetensors")
    return RemoteFile(
        filename=name,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest() if is_lfs else None,
        git_sha1=None if is_lfs else git_blob_id(data),
        format="safetensors" if is_lfs else "config",
        url=f"{hub.url}/org/model/resolve/main/{name}",
    )


def fetch(
    hub: HubServer,
    repository: Repository,
    *files: RemoteFile,
    connections: int = 4,
    patience: Patience = QUICK,
    cancel: threading.Event | None = None,
    events: list[Event] | None = None,
    token: str | None = None,
) -> tuple[Artifact, ...]:
    downloader = Downloader(
        hub.url,
        f"Bearer {token}" if token else None,
        connections=connections,
        patience=patience,
    )
    sink = (events if events is not None else []).append
    wanted = files or (remote(hub),)
    return downloader.fetch(wanted, repository, sink, cancel or threading.Event())


def content(hub: HubServer, name: str = "model.safetensors") -> bytes:
    return (hub.root / "org/model" / name).read_bytes()


def leftovers(repository: Repository) -> list[str]:
    return sorted(path.name for path in repository.partial_dir.iterdir())


def assert_fetched(hub: HubServer, repository: Repository, artifact: Artifact) -> None:
    data = content(hub, artifact.filename)
    assert artifact.sha256 == hashlib.sha256(data).hexdigest()
    assert artifact.size == len(data)
    assert repository.blob_path(artifact.sha256).read_bytes() == data


# ------------------------------------------------------------------ the straight way


def test_several_files_and_ranges_arrive_whole_and_leave_nothing_behind(
    hub: HubServer, repository: Repository
) -> None:
    names = ["config.json", "empty.json", "model.safetensors", "second.safetensors"]
    events: list[Event] = []
    artifacts = fetch(hub, repository, *(remote(hub, name) for name in names), events=events)
    assert [artifact.filename for artifact in artifacts] == names
    for artifact in artifacts:
        assert_fetched(hub, repository, artifact)
    assert leftovers(repository) == []
    asked = hub.requests.of("GET /cdn/")
    assert len(asked) == 11 + 3
    assert bytes_asked_twice(asked) == 0
    assert max(entry["end"] - entry["start"] for entry in asked) <= UNIT
    total = sum(artifact.size for artifact in artifacts)
    downloads = [event for event in events if event.phase == "download"]
    assert {event.total_bytes for event in downloads} == {total}
    assert downloads[0].done_bytes == 0
    assert downloads[-1].done_bytes == total
    verified = [event for event in events if event.phase == "verify"]
    told = [event for event in verified if event.file]
    assert [event.file for event in told] == names
    assert [event.sha256 for event in told] == [artifact.sha256 for artifact in artifacts]
    assert events == [*downloads, *verified]


def test_the_hub_is_asked_once_per_file_where_its_bytes_are(
    hub: HubServer, repository: Repository
) -> None:
    fetch(hub, repository)
    assert len(hub.requests.of("GET /org/model/resolve/")) == 1


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(
    hub: HubServer, repository: Repository
) -> None:
    fetch(hub, repository, token="hf_reader")
    assert all(entry["authorization"] for entry in hub.requests.of("/resolve/"))
    assert not any(entry["authorization"] for entry in hub.requests.of("/cdn/"))


def test_compression_is_never_asked_for(hub: HubServer, repository: Repository) -> None:
    fetch(hub, repository)
    assert {entry["accept_encoding"] for entry in hub.requests.entries} == {"identity"}


def test_bytes_that_are_there_already_are_not_asked_for(
    hub: HubServer, repository: Repository
) -> None:
    files = [remote(hub), remote(hub, "config.json")]
    first = fetch(hub, repository, *files)
    hub.requests.clear()
    assert fetch(hub, repository, *files) == first
    assert hub.requests.entries == []


def test_the_same_bytes_under_two_names_are_downloaded_once(
    hub: HubServer, repository: Repository
) -> None:
    file = remote(hub)
    twin = RemoteFile("twin.safetensors", file.size, file.sha256, None, file.format, file.url)
    one, two = fetch(hub, repository, file, twin)
    assert (one.filename, two.filename) == ("model.safetensors", "twin.safetensors")
    assert one.sha256 == two.sha256
    assert bytes_asked_twice(hub.requests.of("/cdn/")) == 0


def test_a_file_without_any_checksum_is_refused(hub: HubServer, repository: Repository) -> None:
    file = remote(hub)
    bare = RemoteFile(file.filename, file.size, None, None, file.format, file.url)
    with pytest.raises(CorruptFile, match="without a checksum"):
        fetch(hub, repository, bare)


# ------------------------------------------------------------------ broken transfers


def test_broken_connections_cost_only_what_was_on_the_way(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("drop", "/cdn/", after=UNIT // 3, times=6)
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)
    asked = hub.requests.of("/cdn/")
    assert len(asked) > 11
    assert sum(entry["bytes"] for entry in asked) == BIG


def test_a_server_that_only_breaks_is_given_up_after_bounded_tries(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("drop", "/cdn/", after=10)
    with pytest.raises(NetworkError, match=r"model\.safetensors"):
        fetch(hub, repository, connections=1)
    assert len(hub.requests.of("/cdn/")) == QUICK.attempts


def test_a_server_that_ignores_ranges_is_read_from_the_start_by_one_thread(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("ignore_range", "/cdn/")
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)


def test_a_resume_against_a_server_that_now_ignores_ranges_is_right(
    hub: HubServer, repository: Repository
) -> None:
    interrupt(hub, repository)
    hub.faults.add("ignore_range", "/cdn/")
    hub.faults.add("drop", "/cdn/", after=4 * UNIT + 17, times=1)
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "range_start", "by": 7},
        {"kind": "range_total", "by": 1},
        {"kind": "length", "by": -100},
        {"kind": "length", "by": 100},
        {"kind": "endless"},
        {"kind": "gzip"},
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 403},
        {"kind": "status", "status": 416},
    ],
    ids=lambda fault: "_".join(map(str, fault.values())),
)
def test_a_lie_that_passes_does_no_harm(
    hub: HubServer, repository: Repository, fault: dict[str, object]
) -> None:
    hub.faults.add(match="GET /cdn/", times=2, **fault)  # type: ignore[arg-type]
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ({"kind": "range_start", "by": 7}, NetworkError, "other bytes"),
        ({"kind": "range_total", "by": 1}, CorruptFile, "are listed"),
        ({"kind": "gzip"}, NetworkError, "compressed"),
        ({"kind": "status", "status": 503}, NetworkError, "error 503"),
        ({"kind": "status", "status": 403}, AccessDenied, "refuses to send"),
        ({"kind": "status", "status": 416}, CorruptFile, "are listed"),
        ({"kind": "status", "status": 418}, NetworkError, "error 418"),
        ({"kind": "redirect", "location": "file:///etc/passwd"}, NetworkError, "file:"),
        ({"kind": "redirect", "location": ""}, NetworkError, "loop"),
        ({"kind": "redirect", "location": "http://169.254.1.1/x"}, NetworkError, "local network"),
        ({"kind": "redirect", "location": "http://"}, NetworkError, "refused"),
    ],
    ids=lambda value: "_".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_lie_that_stays_ends_in_a_clear_error(
    hub: HubServer,
    repository: Repository,
    fault: dict[str, object],
    error: type[OhMyGPUError],
    says: str,
) -> None:
    hub.faults.add(match="GET /cdn/", **fault)  # type: ignore[arg-type]
    with pytest.raises(error, match=says):
        fetch(hub, repository)
    assert not list(repository.blobs_dir.glob("sha256-*"))


def test_an_endless_answer_is_cut(hub: HubServer, repository: Repository) -> None:
    hub.faults.add("endless", "GET /")
    artifacts = fetch(hub, repository, remote(hub), remote(hub, "config.json"))
    for artifact in artifacts:
        assert_fetched(hub, repository, artifact)


def test_a_stalled_connection_is_dropped_and_the_rest_asked_for_again(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("stall", "/cdn/", after=2000, times=1)
    patience = Patience(attempts=3, first_wait_s=0.01, stall_s=0.3)
    (artifact,) = fetch(hub, repository, patience=patience)
    assert_fetched(hub, repository, artifact)
    assert any(entry["start"] % UNIT == 2000 for entry in hub.requests.of("/cdn/"))


def test_a_server_that_never_answers_is_given_up(hub: HubServer, repository: Repository) -> None:
    hub.faults.add("silence", "/cdn/")
    patience = Patience(attempts=2, first_wait_s=0.01, stall_s=0.2)
    with pytest.raises(NetworkError, match="stopped answering"):
        fetch(hub, repository, patience=patience)


def test_a_server_that_drips_counts_as_stalled(hub: HubServer, repository: Repository) -> None:
    hub.faults.add("slow", "/cdn/", bytes_per_s=100)
    patience = Patience(attempts=2, first_wait_s=0.01, stall_s=0.3)
    with pytest.raises(NetworkError, match="too slowly"):
        fetch(hub, repository, patience=patience)


def test_an_expired_address_is_asked_for_anew(tmp_path: Path, repository: Repository) -> None:
    make_repo(tmp_path / "hub", "org/model", {"model.safetensors": random.Random(2).randbytes(BIG)})
    with HubServer(tmp_path / "hub", uses_per_signature=3) as hub:
        (artifact,) = fetch(hub, repository)
        assert_fetched(hub, repository, artifact)
        assert len(hub.requests.of("/resolve/")) >= 4


def test_a_missing_file_is_said_to_be_missing(hub: HubServer, repository: Repository) -> None:
    file = remote(hub)
    gone = RemoteFile(
        "gone", file.size, file.sha256, None, "other", f"{hub.url}/org/model/resolve/main/gone"
    )
    with pytest.raises(NotFound, match="no longer has gone"):
        fetch(hub, repository, gone)


def test_a_busy_server_is_waited_for_as_long_as_it_asks(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("status", "/cdn/", status=429, headers={"Retry-After": "0"}, times=2)
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)


def test_a_server_that_asks_for_a_long_wait_ends_the_download_and_says_how_long(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("status", "/cdn/", status=429, headers={"Retry-After": "300"})
    with pytest.raises(RateLimited, match="300 seconds") as caught:
        fetch(hub, repository)
    assert caught.value.retry_after_s == 300


# ------------------------------------------------------------------ wrong bytes


def test_a_file_damaged_once_is_downloaded_again_by_itself(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("corrupt", "/cdn/", at=5 * UNIT + 3, times=6)  # the unit's first request
    events: list[Event] = []
    (artifact,) = fetch(hub, repository, connections=1, events=events)
    assert_fetched(hub, repository, artifact)
    assert [event.message for event in events if event.message] == [
        "model.safetensors arrived damaged; downloading it once more"
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_damaged_twice_is_refused_by_name_and_nothing_of_it_kept(
    hub: HubServer, repository: Repository, name: str
) -> None:
    hub.faults.add("corrupt", name.replace("model.safetensors", "/cdn/"), at=3)
    with pytest.raises(CorruptFile, match=name) as caught:
        fetch(hub, repository, remote(hub, name))
    assert caught.value.details["filename"] == name
    assert leftovers(repository) == []
    assert not list(repository.blobs_dir.glob("sha256-*"))


def test_what_a_broken_download_left_is_not_trusted(hub: HubServer, repository: Repository) -> None:
    interrupt(hub, repository)
    part = next(repository.partial_dir.glob("*.part"))
    with part.open("r+b") as file:
        file.seek(UNIT + 5)
        file.write(b"rubbish")
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)


# ------------------------------------------------------------------ resuming


def interrupt(hub: HubServer, repository: Repository) -> int:
    """Leave a download half done; returns how many bytes are there."""
    cancel = threading.Event()

    def stop(event: Event) -> None:
        if event.done_bytes > 3 * UNIT:
            cancel.set()

    hub.faults.add("slow", "/cdn/", bytes_per_s=1_000_000)
    downloader = Downloader(hub.url, connections=2, patience=QUICK)
    with pytest.raises(Cancelled):
        downloader.fetch((remote(hub),), repository, stop, cancel)
    hub.faults.clear()
    hub.requests.clear()
    partial = Partial.try_open(repository.partial_dir, remote(hub))
    assert partial is not None
    done = partial.done_bytes
    partial.close()
    assert 3 * UNIT < done < BIG
    return done


def test_a_cancelled_download_goes_on_where_it_was(hub: HubServer, repository: Repository) -> None:
    done = interrupt(hub, repository)
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)
    assert sum(entry["end"] - entry["start"] for entry in hub.requests.of("/cdn/")) == BIG - done
    assert all(entry["range"] for entry in hub.requests.of("/cdn/"))


@pytest.mark.parametrize(
    "damage",
    ["{}", "not json", '{"size": 5}', '{"unit_bytes": 1}'],
)
def test_a_sidecar_of_something_else_means_starting_over(
    hub: HubServer, repository: Repository, damage: str
) -> None:
    interrupt(hub, repository)
    sidecar = next(repository.partial_dir.glob("*.json"))
    if damage.startswith('{"'):
        damage = json.dumps(json.loads(sidecar.read_text()) | json.loads(damage))
    sidecar.write_text(damage)
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)
    assert sum(entry["end"] - entry["start"] for entry in hub.requests.of("/cdn/")) == BIG


@pytest.mark.parametrize("suffix", [".part", ".map"])
def test_a_lost_or_cut_piece_of_a_partial_means_starting_over(
    hub: HubServer, repository: Repository, suffix: str
) -> None:
    interrupt(hub, repository)
    path = next(repository.partial_dir.glob(f"*{suffix}"))
    path.write_bytes(path.read_bytes()[:-8])
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)


CHILD = """
import json, sys, threading
from pathlib import Path
from ohmygpu.core import partial
from ohmygpu.core.download import Downloader
from ohmygpu.core.provider import RemoteFile
from ohmygpu.core.repository import Repository

job = json.loads(sys.argv[1])
partial.UNIT_BYTES = job["unit"]
files = [RemoteFile(**file) for file in job["files"]]
def sink(event):
    print(event.done_bytes, flush=True)
downloader = Downloader(job["endpoint"], connections=job["connections"])
downloader.fetch(files, Repository(Path(job["home"])), sink, threading.Event())
print("finished", flush=True)
"""


def start_child(
    hub: HubServer, home: Path, names: list[str], connections: int
) -> subprocess.Popen[str]:
    files = [
        {field: getattr(file, field) for field in ("filename", "size", "sha256", "git_sha1", "url")}
        for file in (remote(hub, name) for name in names)
    ]
    job = {
        "unit": UNIT,
        "files": files,
        "endpoint": hub.url,
        "connections": connections,
        "home": str(home),
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(job)], stdout=subprocess.PIPE, text=True
    )


def test_kills_at_random_moments_cost_at_most_a_unit_per_connection_each(
    tmp_path: Path, repository: Repository
) -> None:
    size, kills, connections = 6_000_000, 10, 4
    names = ["model.safetensors", "config.json"]
    contents = {
        "model.safetensors": random.Random(3).randbytes(size),
        "config.json": b'{"model_type": "llama"}',
    }
    make_repo(tmp_path / "hub", "org/model", contents)
    with HubServer(tmp_path / "hub") as hub:
        hub.faults.add("slow", "/cdn/", bytes_per_s=3_000_000)
        moments = sorted(random.Random(4).randrange(1, size) for _ in range(kills))
        for moment in moments:
            child = start_child(hub, repository.home, names, connections)
            assert child.stdout is not None
            for line in child.stdout:
                if int(line) >= moment:
                    break
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
            child.stdout.close()
        child = start_child(hub, repository.home, names, connections)
        output, _ = child.communicate(timeout=60)
        assert output.splitlines()[-1] == "finished"
        asked = hub.requests.of("/cdn/")
    assert repository.has_blob(hashlib.sha256(contents["model.safetensors"]).hexdigest(), size)
    assert repository.has_blob(hashlib.sha256(contents["config.json"]).hexdigest(), 23)
    assert all(entry["range"] for entry in asked)
    assert bytes_asked_twice(asked) <= kills * connections * UNIT
    assert sum(entry["bytes"] for entry in asked) <= size + kills * connections * UNIT
    assert leftovers(repository) == []


def test_two_processes_that_want_the_same_bytes_share_one_download(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("slow", "/cdn/", bytes_per_s=2_000_000)
    names = ["model.safetensors", "second.safetensors"]
    children = [start_child(hub, repository.home, names[::order], 3) for order in (1, -1)]
    for child in children:
        output, _ = child.communicate(timeout=60)
        assert output.splitlines()[-1] == "finished"
    assert bytes_asked_twice(hub.requests.of("/cdn/")) == 0
    assert leftovers(repository) == []


def test_a_download_goes_on_with_what_a_killed_process_held(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("slow", "/cdn/", bytes_per_s=500_000)
    child = start_child(hub, repository.home, ["model.safetensors"], 2)
    assert child.stdout is not None
    child.stdout.readline()
    thread = threading.Thread(target=lambda: fetch(hub, repository))
    thread.start()
    child.kill()
    child.wait()
    child.stdout.close()
    hub.faults.clear()
    thread.join(timeout=30)
    assert repository.has_blob(remote(hub).sha256 or "", BIG)


# ------------------------------------------------------------------ the disk and the user


def test_a_download_that_cannot_fit_is_refused_before_it_starts(
    hub: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ohmygpu.core.files.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFull) as caught:
        fetch(hub, repository)
    assert caught.value.details == {"needed_bytes": BIG, "free_bytes": 1000}
    assert hub.requests.entries == []


def test_a_disk_that_fills_up_ends_the_download_and_keeps_what_is_there(
    hub: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at = partial_module._write_at
    room = 4 * UNIT

    def full_disk(file: object, offset: int, data: bytes) -> None:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_at(file, offset, data)  # type: ignore[arg-type]

    monkeypatch.setattr(partial_module, "_write_at", full_disk)
    with pytest.raises(DiskFull, match=r"model\.safetensors"):
        fetch(hub, repository)
    monkeypatch.setattr(partial_module, "_write_at", write_at)
    hub.requests.clear()
    (artifact,) = fetch(hub, repository)
    assert_fetched(hub, repository, artifact)
    assert sum(entry["end"] - entry["start"] for entry in hub.requests.of("/cdn/")) < BIG - UNIT


def test_a_cancel_is_obeyed_while_every_connection_hangs(
    hub: HubServer, repository: Repository
) -> None:
    hub.faults.add("stall", "/cdn/", after=1000)
    cancel = threading.Event()
    downloader = Downloader(hub.url, connections=4)  # whose patience is 30 s

    def sink(event: Event) -> None:
        if event.done_bytes >= 4000:
            cancel.set()

    with pytest.raises(Cancelled):
        downloader.fetch((remote(hub),), repository, sink, cancel)
    hub.faults.clear()
    (artifact,) = fetch(hub, repository)  # the hanging threads neither hold the lock nor write
    assert_fetched(hub, repository, artifact)
