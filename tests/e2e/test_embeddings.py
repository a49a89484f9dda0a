"""An embedding model by the whole path: pulled from a hub, compiled, asked by the real clients."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ollama
import openai
import pytest

from tests.e2e.world import World
from tests.hub_server import HubServer
from tests.tiny_embedder import LENGTH, write_repository

NAME = "org/tiny-embedder"
TEXTS = ["abc", "a b c d e f", "zyx"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("hub")
    write_repository(root / NAME)
    (root / NAME / "pytorch_model.bin").write_bytes(b"never downloaded")
    with (
        HubServer(root) as hub,
        tempfile.TemporaryDirectory(prefix="omg-", ignore_cleanup_errors=True) as folder,
    ):
        world = World(Path(folder) / "home", hub.url)
        world.start()
        pulled = world.omg("pull", NAME)
        assert "embedding model" in pulled.stderr
        yield world
        world.stop()


def test_the_clients_get_the_same_vectors(world: World) -> None:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="unused", max_retries=0) as client:
        reply = client.embeddings.create(model=NAME, input=TEXTS)  # base64
        floats = client.embeddings.create(model=NAME, input=TEXTS, encoding_format="float")
    vectors = np.array([entry.embedding for entry in reply.data])
    assert vectors.shape == (3, LENGTH)
    assert np.abs(vectors - np.array([entry.embedding for entry in floats.data])).max() == 0
    assert reply.usage.prompt_tokens == 5 + 8 + 5
    with ollama.Client(world.url) as client:
        found = client.embed(model=NAME, input=TEXTS)
        shown = client.show(NAME)
    assert np.abs(np.array(found.embeddings) - vectors).max() < 1e-6
    assert found.prompt_eval_count == 18
    assert shown.capabilities == ["embedding"]


def test_it_says_what_it_is_and_does_not_chat(world: World) -> None:
    assert "48 numbers a text, mean pooling" in world.omg("model", "info", NAME).stdout
    refused = world.omg("chat", NAME, "hello", expect=None)
    assert refused.returncode != 0
    assert "is an embedding model" in refused.stderr
    messages = [{"role": "user", "content": "hi"}]
    status, body = world.post("/v1/chat/completions", {"model": NAME, "messages": messages})
    assert status == 400
    assert "does not support chat" in body["error"]["message"]
