from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ohmygpu.core.errors import Busy, ContextLengthExceeded
from ohmygpu.daemon.app import create_app
from tests.daemon.fakes import END, Runtimes, install_model, make_services, settings_of

CHAT = {"model": "org/m", "messages": [{"role": "user", "content": "hi"}]}


class Setup:
    def __init__(self, home: Path) -> None:
        install_model(home, "org/m")
        install_model(home, "Other/N")
        self.runtimes = Runtimes()
        self.services = make_services(settings_of(home), self.runtimes)
        self.client = create_app(self.services).test_client()


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    setup = Setup(tmp_path)
    yield setup
    await setup.services.manager.shutdown()


async def test_a_chat_is_answered_whole(setup: Setup) -> None:
    setup.runtimes.enqueue("Hel", "lo", END)
    response = await setup.client.post("/v1/chat/completions", json=CHAT)
    body = await response.get_json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 7


async def test_the_model_is_taken_by_any_of_its_names(setup: Setup) -> None:
    for name in ("org/m", "ORG/M", "org/m:latest", "org/m:q8", "hf.co/org/m"):
        setup.runtimes.enqueue("ok", END)
        response = await setup.client.post("/v1/chat/completions", json=CHAT | {"model": name})
        assert response.status_code == 200, name
    assert len(setup.runtimes.loads) == 1


async def test_an_unknown_model_is_404_and_loads_nothing(setup: Setup) -> None:
    response = await setup.client.post("/v1/chat/completions", json=CHAT | {"model": "org/n"})
    error = (await response.get_json())["error"]
    assert response.status_code == 404
    assert error["code"] == "model_not_found"
    assert error["details"]["suggestions"]
    assert setup.runtimes.loads == []


async def test_a_bad_request_is_400_before_the_model_is_loaded(setup: Setup) -> None:
    changes: list[dict[str, object]] = [
        {"temperature": "hot"},
        {"messages": []},
        {"max_tokens": -1},
        {"model": 5},
    ]
    for change in changes:
        response = await setup.client.post("/v1/chat/completions", json=CHAT | change)
        assert response.status_code == 400, change
        assert (await response.get_json())["error"]["param"] == next(iter(change))
    assert setup.runtimes.loads == []


async def test_a_prompt_too_long_is_400_with_both_numbers(setup: Setup) -> None:
    error = ContextLengthExceeded("too long", prompt_tokens=9000, context_tokens=2048)
    setup.runtimes.enqueue(error)
    response = await setup.client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert (await response.get_json())["error"]["details"] == {
        "prompt_tokens": 9000,
        "context_tokens": 2048,
    }


async def test_a_full_queue_is_503_with_retry_after(setup: Setup) -> None:
    setup.runtimes.enqueue(Busy("the queue is full", retry_after_s=1.2))
    response = await setup.client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "2"


async def test_keep_alive_is_taken_here_too(setup: Setup) -> None:
    setup.runtimes.enqueue("ok", END)
    await setup.client.post("/v1/chat/completions", json=CHAT | {"keep_alive": "2h"})
    (model,) = await setup.services.manager.loaded()
    assert model.keep_alive_s == 7200


async def test_models_are_listed_and_found_with_slashes_plain_or_encoded(setup: Setup) -> None:
    body = await (await setup.client.get("/v1/models")).get_json()
    assert {model["id"] for model in body["data"]} == {"org/m:latest", "Other/N:latest"}
    for path in ("org/m:latest", "org%2Fm:latest", "ORG%2fm"):
        response = await setup.client.get(f"/v1/models/{path}")
        assert (await response.get_json())["id"] == "org/m:latest"
    assert (await setup.client.head("/v1/models/org/m")).status_code == 200
    response = await setup.client.get("/v1/models/org/unknown")
    assert response.status_code == 404
    assert (await response.get_json())["error"]["type"] == "not_found_error"


async def test_no_models_are_an_empty_list(tmp_path: Path) -> None:
    client = create_app(make_services(settings_of(tmp_path), Runtimes())).test_client()
    assert await (await client.get("/v1/models")).get_json() == {"object": "list", "data": []}
