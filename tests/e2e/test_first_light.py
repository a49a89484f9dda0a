"""The whole path on real weights: pulled, compiled, served, asked by the official clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest

from tests.e2e.world import HUB_NAME, QUESTION, World, children_of

MODELS = ("smollm2-gguf", HUB_NAME)
STORY = "Write a long story about a lighthouse keeper and the sea."


def client_of(world: World) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{world.url}/v1",
        api_key="unused",
        max_retries=0,
        _strict_response_validation=True,
    )


def ask(client: openai.OpenAI, model: str, text: str, **more: Any) -> str:
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], temperature=0, **more
    )
    return reply.choices[0].message.content or ""


@pytest.mark.parametrize("model", MODELS)
def test_every_surface_knows_the_capital_of_france(world: World, model: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    options = {"temperature": 0, "num_predict": 40}
    chat = {"model": model, "messages": messages, "stream": False}
    _, reply = world.post("/v1/chat/completions", {**chat, "temperature": 0, "max_tokens": 40})
    assert "Paris" in reply["choices"][0]["message"]["content"]
    _, reply = world.post("/api/chat", {**chat, "options": options})
    assert "Paris" in reply["message"]["content"]
    generate = {"model": model, "prompt": QUESTION, "stream": False, "options": options}
    _, reply = world.post("/api/generate", generate)
    assert "Paris" in reply["response"]
    sampling = ("--temperature", "0", "--max-tokens", "40")
    assert "Paris" in world.omg("chat", model, *sampling, stdin=f"{QUESTION}\n").stdout
    assert "Paris" in world.omg("chat", model, *sampling, QUESTION).stdout


@pytest.mark.parametrize("model", MODELS)
def test_the_openai_client_streams_what_it_gets_whole(world: World, model: str) -> None:
    with client_of(world) as client:
        whole = ask(client, model, QUESTION, max_tokens=48)
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=48,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole
        assert "Paris" in whole
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens > 10
        names = [entry.id for entry in client.models.list()]
        assert names
        for name in names:
            assert client.models.retrieve(name).id == name


@pytest.mark.parametrize("model", MODELS)
def test_the_ollama_client_streams_what_it_gets_whole(world: World, model: str) -> None:
    with ollama.Client(host=world.url) as client:
        options = {"temperature": 0, "num_predict": 48}
        messages = [{"role": "user", "content": QUESTION}]
        whole = client.chat(model=model, messages=messages, options=options)
        pieces = list(client.chat(model=model, messages=messages, options=options, stream=True))
        assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
        assert pieces[-1].done
        assert pieces[-1].eval_count
        generated = client.generate(model=model, prompt=QUESTION, options=options)
        assert "Paris" in generated.response
        more = client.generate(
            model=model, prompt="And of Germany?", context=generated.context, options=options
        )
        assert more.prompt_eval_count is not None
        assert generated.prompt_eval_count is not None
        assert more.prompt_eval_count > generated.prompt_eval_count
        assert client.show(model).modelinfo
        assert model in {
            entry.model.removesuffix(":latest") for entry in client.list().models if entry.model
        }
        assert any(entry.size for entry in client.ps().models)


def test_eight_streams_at_once_say_what_each_says_alone(world: World) -> None:
    prompts = [f"Tell me {count} facts about the number {count}." for count in range(2, 10)]
    with client_of(world) as client:
        alone = [ask(client, f"{HUB_NAME}:q8", prompt, max_tokens=64) for prompt in prompts]
        together: dict[int, str] = {}

        def one(index: int) -> None:
            stream = client.chat.completions.create(
                model=f"{HUB_NAME}:q8",
                messages=[{"role": "user", "content": prompts[index]}],
                temperature=0,
                max_tokens=64,
                stream=True,
            )
            together[index] = "".join(c.choices[0].delta.content or "" for c in stream)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [together[index] for index in range(8)] == alone


def open_stream(world: World, model: str) -> socket.socket:
    """A raw connection in the middle of a long streamed answer."""
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": STORY}], "stream": True}
    ).encode()
    connection = socket.create_connection(("127.0.0.1", world.port), timeout=60)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    received = b""
    while b"content" not in received:
        piece = connection.recv(4096)
        assert piece, received
        received += piece
    return connection


def wait_until_idle(world: World, model: str) -> None:
    deadline_s = time.monotonic() + 10
    while world.running(model):
        assert time.monotonic() < deadline_s, "the slot was not freed"
        time.sleep(0.02)


def test_a_client_that_goes_away_frees_its_slot(world: World) -> None:
    connection = open_stream(world, HUB_NAME)
    assert world.running(HUB_NAME) == 1
    connection.close()
    wait_until_idle(world, HUB_NAME)


def test_a_killed_worker_ends_its_streams_with_an_error_and_the_next_request_gets_a_new_one(
    world: World,
) -> None:
    assert world.daemon is not None
    connection = open_stream(world, HUB_NAME)
    workers = [
        pid
        for pid in children_of(world.daemon.pid)
        if b"runtime_onnx.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and b":q8" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        and HUB_NAME.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(workers) == 1
    os.kill(workers[0], signal.SIGKILL)
    rest = b""
    while piece := connection.recv(65536):
        rest += piece
        if b'"error"' in rest and b"0\r\n\r\n" in rest:
            break
    connection.close()
    assert b'"error"' in rest
    assert b"[DONE]" not in rest
    with client_of(world) as client:
        assert "Paris" in ask(client, HUB_NAME, QUESTION, max_tokens=40)
    assert world.daemon.poll() is None


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(world: World) -> None:
    body = {
        "model": "smollm2-gguf",
        "messages": [{"role": "user", "content": "word " * 9000}],
        "stream": True,
    }
    status, reply = world.post("/v1/chat/completions", body)
    assert status == 400
    assert reply["error"]["code"] == "context_length_exceeded"
    assert "8192" in reply["error"]["message"]
    assert "90" in reply["error"]["message"]


def test_a_misspelt_model_is_answered_with_the_near_name(world: World) -> None:
    status, reply = world.post("/api/chat", {"model": "smolm2-gguf", "messages": []})
    assert status == 404
    assert "not found" in reply["error"]
    assert "smollm2-gguf" in reply["error"]
    result = world.omg("chat", "smolm2-gguf", "hi", expect=None)
    assert result.returncode == 3
    assert "smollm2-gguf" in result.stderr


def test_the_same_bytes_from_two_repositories_lie_on_the_disk_once(world: World) -> None:
    before = world.files()
    world.omg("model", "pull", "someone/SmolLM2-copy")
    after = world.files()
    added = {name: size for name, size in after.items() if name not in before}
    assert sum(added.values()) < 100_000, added
    world.omg("model", "rm", "someone/SmolLM2-copy")
    assert set(world.files()) == set(before)
    with client_of(world) as client:
        assert "Paris" in ask(client, HUB_NAME, QUESTION, max_tokens=40)


def test_search_and_status_show_what_is_there(world: World) -> None:
    found = json.loads(world.omg("search", "smollm2", "--json").stdout)
    assert HUB_NAME in json.dumps(found)
    assert HUB_NAME in world.omg("search", "smollm2").stdout
    status = world.omg("serve", "status").stdout
    assert world.url in status
    listed = world.omg("list").stdout
    assert HUB_NAME in listed
    assert "smollm2-gguf" in listed
