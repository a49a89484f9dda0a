from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ohmygpu import __version__
from ohmygpu.core.errors import Conflict, DiskFull, OhMyGPUError
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.fidelity import Fidelity, save_fidelity
from ohmygpu.core.records import InstallRecord
from ohmygpu.core.repository import Repository
from ohmygpu.daemon.app import create_app
from tests.core.test_fidelity import FIDELITY
from tests.daemon.fakes import END, Runtimes, install_model, make_services, settings_of

CHAT = {"model": "org/m", "messages": [{"role": "user", "content": "hi"}]}


class Setup:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.record = install_model(home, "org/m")
        self.runtimes = Runtimes()
        self.pulled: list[tuple[str, str | None, str | None]] = []
        self.adapters: list[str | None] = []
        self.verifies: list[bool] = []  # of each pull
        self.services = make_services(settings_of(home), self.runtimes, self.pull, self.verify)
        self.client = create_app(self.services).test_client()

    def pull(
        self,
        reference: str,
        *,
        name: str | None,
        recipe: str | None,
        adapter: str | None,
        verify: bool,
        export: bool,
        sink: EventSink,
        cancel: threading.Event,
    ) -> InstallRecord:
        self.pulled.append((reference, name, recipe))
        self.verifies.append(verify)
        self.adapters.append(adapter)
        if reference == "org/refused":
            raise DiskFull("no space", needed_bytes=2, free_bytes=1)
        sink(Event("resolve", "looking"))
        if reference == "org/large":
            raise DiskFull("no space", needed_bytes=2, free_bytes=1)
        sink(Event("download", done_bytes=5, total_bytes=10))
        record = install_model(self.home, name or reference)
        sink(Event("done", name=record.name))
        return record

    def verify(self, name: str, *, sink: EventSink, cancel: threading.Event) -> dict[str, Fidelity]:
        if name == "org/freed:q8":
            raise Conflict("its source file was freed", filename="a.gguf")
        sink(Event("compile", done_bytes=5, total_bytes=5))
        sink(Event("measure", done_bytes=5, total_bytes=10))
        folder = Repository(self.home).compiled_path(self.record.compiled_key)
        save_fidelity(folder, {"model.onnx": FIDELITY})
        sink(Event("done", name=name))
        return {"model.onnx": FIDELITY}

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        response = await self.client.post(path, json=body)
        return response.status_code, await response.get_json()

    async def events(self, body: dict[str, Any], action: str = "pull") -> list[Event]:
        response = await self.client.post(f"/v1/models/{action}", json=body)
        assert response.status_code == 200
        assert response.content_type == "application/x-ndjson"
        return [Event.from_dict(json.loads(x)) for x in (await response.get_data()).splitlines()]


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    setup = Setup(tmp_path)
    yield setup
    await setup.services.manager.shutdown()


async def test_health_tells_what_runs_and_what_is_loaded(setup: Setup) -> None:
    body = await (await setup.client.get("/health")).get_json()
    assert (body["status"], body["pid"], body["version"]) == ("ok", os.getpid(), __version__)
    assert body["home"] == str(setup.home)
    assert body["models"] == []
    setup.runtimes.enqueue("ok", END)
    await setup.post("/v1/chat/completions", CHAT)
    (model,) = (await (await setup.client.get("/health")).get_json())["models"]
    assert model["name"] == "org/m:latest"
    assert model["state"] == "ready"
    assert model["memory_bytes"] == 1234
    assert 299 < model["expires_in_s"] <= 300
    setup.runtimes.enqueue("ok", END)
    await setup.post("/v1/chat/completions", CHAT | {"keep_alive": -1})
    (model,) = (await (await setup.client.get("/health")).get_json())["models"]
    assert (model["expires_in_s"], model["kept_forever"]) == (None, True)


async def test_a_pull_streams_events_and_ends_with_done(setup: Setup) -> None:
    events = await setup.events({"model": "org/new", "name": "fresh", "recipe": "q4"})
    assert [event.phase for event in events] == ["resolve", "download", "done"]
    assert events[-1].name == "fresh"
    assert setup.pulled == [("org/new", "fresh", "q4")]
    assert (await setup.client.get("/v1/models/fresh")).status_code == 200


async def test_a_pull_that_fails_says_so_in_a_status_or_else_in_its_last_event(
    setup: Setup,
) -> None:
    status, body = await setup.post("/v1/models/pull", {"model": "org/refused"})
    assert status == 507
    assert body["error"]["details"] == {"needed_bytes": 2, "free_bytes": 1}
    events = await setup.events({"model": "org/large"})
    assert events[-1].phase == "error"
    assert isinstance(events[-1].error, DiskFull)
    status, body = await setup.post("/v1/models/pull", {"model": "org/large", "stream": False})
    assert status == 507


async def test_a_pull_without_stream_is_the_done_event(setup: Setup) -> None:
    status, body = await setup.post("/v1/models/pull", {"model": "org/new", "stream": False})
    assert (status, body["phase"], body["name"]) == (200, "done", "org/new")


async def test_a_pull_passes_its_adapter_on(setup: Setup) -> None:
    body = {"model": "org/new", "adapter": "org/lora", "stream": False}
    assert (await setup.post("/v1/models/pull", body))[0] == 200
    assert setup.adapters == ["org/lora"]


async def test_a_pull_is_refused_before_it_starts_when_it_makes_no_sense(setup: Setup) -> None:
    for body in (
        {},
        {"model": None},
        {"model": 5},
        {"model": ""},
        {"model": "./relative.gguf"},
        {"model": "no such/name/here"},
        {"model": "org/new", "stream": "yes"},
        {"model": "org/new", "recipe": 4},
        {"model": "org/new", "adapter": 4},
        {"model": "org/new", "adapter": "./relative"},
        {"model": "org/new", "recipee": "q4"},
    ):
        status, answer = await setup.post("/v1/models/pull", body)
        assert status == 400, body
        assert OhMyGPUError.from_dict(answer["error"]).message
    assert setup.pulled == []


async def test_a_pull_measures_when_it_is_asked_to(setup: Setup) -> None:
    await setup.events({"model": "org/new", "verify": True})
    await setup.events({"model": "org/new"})
    assert setup.verifies == [True, False]
    status, _ = await setup.post("/v1/models/pull", {"model": "org/new", "verify": "yes"})
    assert status == 400


async def test_a_measurement_streams_events_and_is_shown_with_the_model(setup: Setup) -> None:
    async def details() -> Any:
        return (await (await setup.client.get("/v1/models/org/m")).get_json())["ohmygpu"]

    assert (await details())["fidelity"] == {}
    events = await setup.events({"model": "ORG/m:latest"}, "verify")
    assert [event.phase for event in events] == ["compile", "measure", "done"]
    assert events[-1].name == "org/m:q8"
    assert (await details())["fidelity"] == {"model.onnx": asdict(FIDELITY)}
    status, body = await setup.post("/v1/models/verify", {"model": "org/m", "stream": False})
    assert (status, body["phase"]) == (200, "done")


async def test_a_measurement_that_cannot_be_made_says_why(setup: Setup) -> None:
    install_model(setup.home, "org/freed")
    status, body = await setup.post("/v1/models/verify", {"model": "org/freed"})
    assert (status, body["error"]["code"]) == (409, "conflict")
    assert body["error"]["details"] == {"filename": "a.gguf"}
    assert (await setup.post("/v1/models/verify", {"model": "org/absent"}))[0] == 404
    for wrong in ({}, {"model": 5}, {"model": "org/m", "recipe": "q4"}, {"model": "org/m", "x": 1}):
        assert (await setup.post("/v1/models/verify", wrong))[0] == 400, wrong


async def test_removing_unloads_the_model_and_tells_what_it_freed(setup: Setup) -> None:
    setup.runtimes.enqueue("ok", END)
    await setup.post("/v1/chat/completions", CHAT)
    response = await setup.client.delete("/v1/models/org%2Fm")
    body = await response.get_json()
    assert (response.status_code, body["deleted"], body["id"]) == (200, True, "org/m:q8")
    assert body["freed_bytes"] > 0
    assert setup.runtimes.unloaded == ["org/m:latest"]
    assert (await setup.client.delete("/v1/models/org/m")).status_code == 404


async def test_a_damaged_model_can_be_removed(setup: Setup) -> None:
    shutil.rmtree(setup.services.manager.card("org/m").folder)
    assert (await setup.client.get("/v1/models/org/m")).status_code == 500
    assert (await setup.client.delete("/v1/models/org/m")).status_code == 200


async def test_unload_frees_the_memory_and_the_model_stays_installed(setup: Setup) -> None:
    setup.runtimes.enqueue("ok", END)
    await setup.post("/v1/chat/completions", CHAT)
    status, body = await setup.post("/v1/models/unload", {"model": "ORG/m"})
    assert (status, body["id"], body["unloaded"]) == (200, "org/m:latest", True)
    assert setup.runtimes.unloaded == ["org/m:latest"]
    assert (await setup.post("/v1/models/unload", {"model": "org/unknown"}))[0] == 404
    assert (await setup.post("/v1/models/unload", {}))[0] == 400


async def test_gc_reports_what_it_freed_with_and_without_a_body(setup: Setup) -> None:
    orphan = setup.home / "models" / "compiled" / ("f" * 64)
    orphan.mkdir()
    (orphan / "model.onnx").write_bytes(b"x" * 100)
    status, body = await setup.post("/v1/models/gc", {"sources": False})
    assert status == 200
    assert body["freed_bytes"] >= 100
    assert not orphan.exists()
    assert (await setup.client.post("/v1/models/gc")).status_code == 200
    assert (await setup.post("/v1/models/gc", {"sources": "all"}))[0] == 400


async def test_a_field_that_would_be_dropped_is_refused_by_name(setup: Setup) -> None:
    for path, body in (
        ("/v1/models/pull", {"model": "org/new", "recipee": "q4"}),
        ("/v1/models/unload", {"model": "org/m", "force": True}),
        ("/v1/models/gc", {"source": True}),
    ):
        status, answer = await setup.post(path, body)
        assert status == 400
        assert answer["error"]["param"] in body


async def test_gc_names_the_damaged_records_that_hold_it_back(setup: Setup) -> None:
    (manifest,) = (setup.home / "models" / "manifests").rglob("*.json")
    manifest.write_text("garbage")
    status, body = await setup.post("/v1/models/gc", {})
    assert status == 200
    (damaged,) = body["damaged"]
    assert (damaged["name"], damaged["reason"]) == ("org/m", "it is not valid JSON")
    assert damaged["path"] == str(manifest)
