from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.errors import ModelNotFound
from ohmygpu.core.events import Event, EventSink
from ohmygpu.core.records import InstallRecord
from ohmygpu.daemon.app import create_app
from tests.daemon.fakes import END, Runtimes, install_model, make_services, settings_of

CHAT = {"model": "org/m", "messages": [{"role": "user", "content": "hi"}], "stream": False}
GENERATE = {"model": "org/m", "prompt": "hi", "stream": False}


class Setup:
    def __init__(self, home: Path) -> None:
        self.home = home
        install_model(home, "org/m")
        self.runtimes = Runtimes()
        self.services = make_services(settings_of(home), self.runtimes, self.pull)
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
        sink(Event("resolve"))
        if reference != "org/new":
            raise ModelNotFound(f"{reference} does not exist", name=reference)
        sink(Event("download", sha256="a" * 64, done_bytes=5, total_bytes=10))
        return install_model(self.home, reference)

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        response = await self.client.post(path, json=body)
        return response.status_code, await response.get_json()


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    setup = Setup(tmp_path)
    yield setup
    await setup.services.manager.shutdown()


async def test_a_chat_is_answered_whole(setup: Setup) -> None:
    setup.runtimes.enqueue("Hel", "lo", END)
    status, body = await setup.post("/api/chat", CHAT)
    assert status == 200
    assert body["message"] == {"role": "assistant", "content": "Hello"}
    assert (body["done"], body["done_reason"]) == (True, "stop")
    assert body["prompt_eval_count"] == 5
    assert body["total_duration"] >= body["load_duration"] > 0


async def test_a_prompt_is_continued_whole(setup: Setup) -> None:
    setup.runtimes.enqueue("Hel", "lo", END)
    status, body = await setup.post("/api/generate", GENERATE)
    assert status == 200
    assert body["response"] == "Hello"


async def test_without_a_prompt_the_model_is_loaded_and_with_keep_alive_zero_unloaded(
    setup: Setup,
) -> None:
    status, body = await setup.post("/api/chat", {"model": "org/m", "messages": []})
    assert (status, body["done_reason"]) == (200, "load")
    assert len(await setup.services.manager.loaded()) == 1
    status, body = await setup.post("/api/generate", {"model": "org/m", "keep_alive": 0})
    assert (status, body["done_reason"]) == (200, "unload")
    assert await setup.services.manager.loaded() == []
    assert len(setup.runtimes.loads) == 1


async def test_keep_alive_says_how_long_the_model_stays(setup: Setup) -> None:
    for value, seconds in (("10m", 600), (42, 42), (-1, float("inf"))):
        setup.runtimes.enqueue("ok", END)
        await setup.post("/api/chat", CHAT | {"keep_alive": value})
        (model,) = await setup.services.manager.loaded()
        assert model.keep_alive_s == seconds


async def test_an_unknown_model_is_told_in_ollamas_words(setup: Setup) -> None:
    for path, body in (("/api/chat", CHAT), ("/api/generate", GENERATE), ("/api/show", {})):
        status, answer = await setup.post(path, {**body, "model": "nobody/x"})
        assert status == 404
        assert answer["error"].startswith("model 'nobody/x")
        assert "not found" in answer["error"]


async def test_the_root_and_the_version_answer_what_clients_probe_for(setup: Setup) -> None:
    response = await setup.client.get("/")
    assert await response.get_data(as_text=True) == "Ollama is running"
    for path in ("/", "/api/tags", "/api/version", "/api/ps"):
        assert (await setup.client.head(path)).status_code == 200
    version = (await (await setup.client.get("/api/version")).get_json())["version"]
    assert tuple(map(int, version.split("."))) >= (0, 32, 0)


async def test_tags_ps_and_show_describe_the_same_model(setup: Setup) -> None:
    assert await (await setup.client.get("/api/ps")).get_json() == {"models": []}
    setup.runtimes.enqueue("ok", END)
    await setup.post("/api/chat", CHAT | {"keep_alive": -1})
    tags = (await (await setup.client.get("/api/tags")).get_json())["models"]
    ps = (await (await setup.client.get("/api/ps")).get_json())["models"]
    assert tags[0]["name"] == ps[0]["name"] == "org/m:latest"
    assert tags[0]["digest"] == ps[0]["digest"]
    assert ps[0]["context_length"] == 2048
    assert ps[0]["size"] == 1234
    assert ps[0]["size_vram"] == 0
    for body in ({"model": "org/m"}, {"name": "org/m:latest"}, {"model": "org/m", "verbose": True}):
        status, show = await setup.post("/api/show", body)
        assert status == 200
        assert show["details"]["family"] == "llama"
        assert show["model_info"]["llama.context_length"] == 2048


async def test_a_pull_streams_ollamas_statuses(setup: Setup) -> None:
    response = await setup.client.post("/api/pull", json={"model": "org/new"})
    lines = [json.loads(line) for line in (await response.get_data()).splitlines()]
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[-1] == {"status": "success"}
    assert any(line.get("digest") == "sha256:" + "a" * 64 for line in lines)
    status, _ = await setup.post("/api/show", {"model": "org/new"})
    assert status == 200


async def test_a_pull_without_stream_is_one_object(setup: Setup) -> None:
    body = {"name": "org/new", "stream": False}
    assert await setup.post("/api/pull", body) == (200, {"status": "success"})


async def test_a_pull_that_fails_ends_with_an_error_line(setup: Setup) -> None:
    response = await setup.client.post("/api/pull", json={"model": "org/gone"})
    assert response.status_code == 200  # its first line had been sent
    lines = (await response.get_data()).splitlines()
    assert "not found" in json.loads(lines[-1])["error"]
    status, body = await setup.post("/api/pull", {"model": "org/gone", "stream": False})
    assert status == 404
    assert "not found" in body["error"]
    status, body = await setup.post("/api/pull", {"model": "../x.gguf"})
    assert status == 400


async def test_delete_takes_a_body_and_removes_the_model(setup: Setup) -> None:
    setup.runtimes.enqueue("ok", END)
    await setup.post("/api/chat", CHAT)
    response = await setup.client.delete("/api/delete", json={"name": "org/m"})
    assert response.status_code == 200
    assert await response.get_data() == b""
    assert setup.runtimes.unloaded == ["org/m:latest"]
    response = await setup.client.delete("/api/delete", json={"model": "org/m"})
    assert response.status_code == 404
    assert "not found" in (await response.get_json())["error"]


async def test_fields_are_taken_in_any_case_as_ollama_takes_them(setup: Setup) -> None:
    setup.runtimes.enqueue("ok", END)
    messages = [{"role": "USER", "content": "hi"}]
    body = {"Model": "org/m", "MESSAGES": messages, "Stream": False}
    assert (await setup.post("/api/chat", body))[0] == 200
    assert (await setup.post("/api/show", {"Name": "org/m"}))[0] == 200


async def test_requests_about_models_honour_a_field_or_refuse_it_by_name(setup: Setup) -> None:
    cli = {"system": "", "template": "", "options": None, "name": ""}  # as Ollama's CLI sends them
    assert (await setup.post("/api/show", {"model": "org/m", **cli}))[0] == 200
    pull = {"model": "org/new", "insecure": False, "username": "", "password": "", "stream": False}
    assert (await setup.post("/api/pull", pull))[0] == 200
    for path, field, value in (
        ("/api/show", "system", "be brief"),
        ("/api/show", "options", {"top_k": 1}),
        ("/api/pull", "insecure", True),
        ("/api/pull", "password", "secret"),
        ("/api/pull", "recipe", "q4"),
    ):
        status, body = await setup.post(path, {"model": "org/m", field: value})
        assert (status, body["error"].startswith(f"{field}: ")) == (400, True), body
    response = await setup.client.delete("/api/delete", json={"model": "org/m", "force": True})
    assert response.status_code == 400
    assert (await setup.post("/api/show", {"model": "org/m"}))[0] == 200
