"""The hub of the tests is a hub: the real hub's own client cannot tell the difference."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.hub_faults import bytes_asked_twice
from tests.hub_server import READER, HubServer, make_repo

FILES = {
    "config.json": b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}',
    "README.md": b"# model",
    "sub/notes.txt": b"notes",
    "model.safetensors": random.Random(5).randbytes(200_000),
}

ORACLE = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError,
)

def name_of_error(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None

api = HfApi()
folder = Path(snapshot_download("org/model"))
found = {
    "files": {
        path.relative_to(folder).as_posix(): len(path.read_bytes())
        for path in sorted(folder.rglob("*")) if path.is_file()
    },
    "commit": folder.name,
    "models": [model.id for model in api.list_models(search="model", sort="downloads")],
    "gguf": [model.id for model in api.list_models(filter="gguf")],
    "type": api.model_info("org/model").config["model_type"],
    "sizes": {
        file.rfilename: file.size
        for file in api.model_info("org/model", files_metadata=True).siblings
    },
    "checked": len(api.verify_repo_checksums("org/model", local_dir=folder).mismatches),
    "missing": name_of_error(lambda: api.model_info("org/none")),
    "revision": name_of_error(lambda: api.model_info("org/model", revision="none")),
    "entry": name_of_error(lambda: api.hf_hub_download("org/model", "none.txt")),
    "gated": name_of_error(lambda: api.hf_hub_download("org/gated", "config.json")),
    "private": name_of_error(lambda: api.model_info("org/private", token=False)),
    "private_read": api.model_info("org/private", token="hf_reader").id,
}
print(json.dumps(found))
"""


def test_huggingface_hub_itself_works_against_it(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    make_repo(root, "org/model", FILES, downloads=3)
    make_repo(root, "org/model-gguf", {"m-Q4_0.gguf": b"GGUF"}, downloads=2)
    make_repo(root, "org/gated", FILES, gated="auto")
    make_repo(root, "org/private", FILES, private=True)
    with HubServer(root, page_size=1) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        result = subprocess.run(
            [sys.executable, "-c", ORACLE],
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        requests = hub.requests.entries
    found = json.loads(result.stdout)
    sizes = {name: len(data) for name, data in FILES.items()}
    assert found["files"] == sizes
    assert found["sizes"] == sizes
    assert len(found["commit"]) == 40
    assert found["models"] == ["org/model", "org/model-gguf"]
    assert found["gguf"] == ["org/model-gguf"]
    assert found["type"] == "llama"
    assert found["checked"] == 0
    assert found["missing"] == found["private"] == "RepositoryNotFoundError"
    assert found["revision"] == "RevisionNotFoundError"
    assert found["entry"] in ("EntryNotFoundError", "RemoteEntryNotFoundError")
    assert found["gated"] == "GatedRepoError"
    assert found["private_read"] == "org/private"
    assert not [entry for entry in requests if entry["status"] == 0]


def test_it_runs_as_a_program_with_a_log_and_faults(tmp_path: Path) -> None:
    make_repo(tmp_path / "hub", "org/model", FILES)
    program = Path(__file__).parent.parent / "hub_server.py"
    log = tmp_path / "log.jsonl"
    fault = {"kind": "status", "match": "/broken", "status": 503}
    arguments = ["--root", tmp_path / "hub", "--log", log, "--fault", json.dumps(fault)]
    process = subprocess.Popen(
        [sys.executable, str(program), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        request = urllib.request.Request(
            f"{url}/org/model/resolve/main/model.safetensors",
            headers={"Range": "bytes=100-199", "Authorization": f"Bearer {READER}"},
        )
        with urllib.request.urlopen(request) as response:
            assert response.status == 206
            assert response.headers["Content-Range"] == "bytes 100-199/200000"
            assert response.read() == FILES["model.safetensors"][100:200]
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/broken")
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(entries) == 3
    first, second, third = (
        next(entry for entry in entries if entry["status"] == status) for status in (302, 206, 503)
    )
    assert (first["authorization"], first["range"]) == (True, "bytes=100-199")
    assert (second["bytes"], second["host"][:9]) == (100, "localhost")
    assert third["path"] == "/broken"


def test_large_files_carry_their_digest_and_lie_at_another_origin(tmp_path: Path) -> None:
    make_repo(tmp_path, "org/model", FILES)
    digest = hashlib.sha256(FILES["model.safetensors"]).hexdigest()

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: object) -> None:
            return None

    with HubServer(tmp_path) as hub:
        opener = urllib.request.build_opener(Stay)
        url = f"{hub.url}/org/model/resolve/main/model.safetensors"
        with pytest.raises(urllib.error.HTTPError) as caught:
            opener.open(urllib.request.Request(url, method="HEAD"))
        headers = caught.value.headers
        caught.value.close()
    assert caught.value.code == 302
    assert headers["X-Linked-ETag"] == f'"{digest}"'
    assert headers["X-Linked-Size"] == "200000"
    assert len(headers["X-Repo-Commit"]) == 40
    assert headers["Location"].startswith(hub.cdn_url)


def test_bytes_asked_twice_are_counted_by_range_and_file() -> None:
    def asked(file: str, start: int, end: int, status: int = 206) -> dict[str, object]:
        return {"method": "GET", "status": status, "file": file, "start": start, "end": end}

    assert bytes_asked_twice([asked("a", 0, 10), asked("a", 10, 20), asked("b", 0, 10)]) == 0
    assert bytes_asked_twice([asked("a", 0, 10), asked("a", 5, 20)]) == 5
    assert bytes_asked_twice([asked("a", 0, 9), asked("a", 0, 9), asked("a", 2, 5)]) == 12
    assert bytes_asked_twice([asked("a", 0, 10), asked("a", 0, 10, 503)]) == 0
