"""Embeddings over HTTP: both wire formats, and the routes with a runtime that plays back."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ohmygpu.core.errors import ContextLengthExceeded, InvalidRequest
from ohmygpu.daemon import embeddings, ollama, ollama_models, openai
from ohmygpu.daemon.app import create_app
from ohmygpu.daemon.mailbox import Vectors
from ohmygpu.runtime_api import EmbedRequest, EmbedResult
from tests.daemon.fakes import Runtimes, install_model, make_services, settings_of
from tests.daemon.model_cards import make_card

CARD = make_card(kind="encoder", embedding_length=4, pooling="mean", prompts={"query": "Q: "})
RESULT = EmbedResult(
    vectors=(struct.pack("<4f", 0.5, -1, 0, 2), struct.pack("<4f", 1, 2, 3, 4)),
    prompt_tokens=(3, 5),
)


def parse(**body: Any) -> embeddings.EmbedCall:
    return embeddings.parse_openai({"model": "m", **body}, CARD)


def request_of(call: embeddings.EmbedCall) -> EmbedRequest:
    assert call.request is not None
    return call.request


@pytest.mark.parametrize(
    ("sent", "inputs"),
    [
        ("a text", ("a text",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_every_form_of_input_is_read(sent: Any, inputs: Any) -> None:
    assert request_of(parse(input=sent)).inputs == inputs


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input is required"),
        ({"input": []}, "input is required"),
        ({"input": ""}, "input: is empty"),
        ({"input": ["a", ""]}, r"input\[1\]: is empty"),
        ({"input": [[]]}, r"input\[0\]: is empty"),
        ({"input": {"a": 1}}, "input: must be a text or a list, not an object"),
        ({"input": [1, "a"]}, "input: must be a list of token ids"),
        ({"input": [["a"]]}, r"input\[0\]: must be a list of token ids"),
        ({"input": ["a", 5]}, r"input\[1\]: must be a string"),
        ({"input": ["a"] * 2049}, "2048 is the most"),
        ({"input": "a", "dimensions": 5}, "dimensions: must be at most 4"),
        ({"input": "a", "dimensions": 0}, "dimensions: must be at least 1"),
        ({"input": "a", "encoding_format": "int8"}, "Invalid value for 'encoding_format' = int8"),
        ({"input": "a", "encoding_format": 5}, "'encoding_format' = a number"),
        ({"input": "a", "input_type": "query"}, "input_type: unknown field"),
        ({"input": "a", "prompt_name": "doc"}, "no prompt 'doc'; it has query"),
        ({"input": [5], "prompt_name": "query"}, "before token ids"),
    ],
)
def test_a_bad_field_is_named(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(**body)


def test_no_prompt_of_the_model_is_used_unasked() -> None:
    assert request_of(parse(input=["a"])).inputs == ("a",)
    assert request_of(parse(input=["a", "b"], prompt_name="query")).inputs == ("Q: a", "Q: b")


def test_vectors_are_numbers_or_base64() -> None:
    reply = embeddings.to_openai(parse(input=["a", "b"]), RESULT)
    assert reply["data"][0] == {
        "object": "embedding",
        "index": 0,
        "embedding": [0.5, -1.0, 0.0, 2.0],
    }
    assert reply["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    reply = embeddings.to_openai(parse(input="a", encoding_format="base64"), RESULT)
    assert base64.b64decode(reply["data"][1]["embedding"]) == RESULT.vectors[1]


def test_ollamas_request_truncates_and_normalises_unless_it_says_otherwise() -> None:
    body = {"model": "m", "input": "a", "options": {"num_ctx": 7, "temperature": 0.5}}
    call = embeddings.parse_ollama(body, CARD, "embed")
    assert request_of(call) == EmbedRequest(
        inputs=("a",), truncate=True, normalize=True, context_limit=7
    )
    call = embeddings.parse_ollama(
        {"model": "m", "input": ["a"], "truncate": False, "dimensions": 2}, CARD, "embed"
    )
    assert request_of(call) == EmbedRequest(
        inputs=("a",), truncate=False, normalize=True, dimensions=2
    )
    older = embeddings.parse_ollama({"model": "m", "prompt": "a"}, CARD, "embeddings")
    assert request_of(older) == EmbedRequest(inputs=("a",), truncate=True, normalize=False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": 5}, "invalid input type"),
        ({"input": ["a", 5]}, "invalid input type"),
        ({"input": "a", "prompt": "b"}, "prompt: unknown field"),
        ({"input": "a", "options": {"mystery": 1}}, r"options\.mystery"),
    ],
)
def test_a_bad_field_of_ollamas_request_is_named(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        embeddings.parse_ollama({"model": "m", **body}, CARD, "embed")


def test_a_model_does_what_it_is_made_for_alone() -> None:
    generates = make_card()
    with pytest.raises(InvalidRequest, match='"m" does not support embeddings'):
        embeddings.parse_openai({"model": "m", "input": "a"}, generates)
    with pytest.raises(InvalidRequest, match='"m" does not support embeddings'):
        embeddings.parse_ollama({"model": "m", "input": "a"}, generates, "embed")
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest, match='"m" does not support chat'):
        openai.parse_chat({"model": "m", "messages": messages}, CARD)
    with pytest.raises(InvalidRequest, match='"m" does not support chat'):
        ollama.parse_chat({"model": "m", "messages": messages}, CARD)
    with pytest.raises(InvalidRequest, match='"m" does not support generate'):
        ollama.parse_generate({"model": "m", "prompt": "hi"}, CARD)


def test_both_apis_say_that_it_embeds() -> None:
    assert ollama_models.to_show(CARD)["capabilities"] == ["embedding"]
    assert ollama_models.to_tags([CARD])["models"][0]["details"]["embedding_length"] == 4
    described = openai.to_model(CARD)["ohmygpu"]
    assert (described["kind"], described["chat"]) == ("encoder", False)
    assert (described["embedding_length"], described["pooling"]) == (4, "mean")
    assert ollama_models.to_show(make_card())["capabilities"][0] == "completion"


class Setup:
    def __init__(self, home: Path) -> None:
        install_model(home, "org/e", kind="encoder", embedding_length=4)
        install_model(home, "org/m")
        self.runtimes = Runtimes()
        self.services = make_services(settings_of(home), self.runtimes)
        self.client = create_app(self.services).test_client()

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        response = await self.client.post(path, json={"model": "org/e", **body})
        return response.status_code, await response.get_json()


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    setup = Setup(tmp_path)
    yield setup
    await setup.services.manager.shutdown()


async def test_openais_route_answers(setup: Setup) -> None:
    setup.runtimes.embeddings.append(RESULT)
    status, body = await setup.post("/v1/embeddings", input=["a", "b"])
    assert (status, body["object"], body["model"]) == (200, "list", "org/e")
    assert [entry["index"] for entry in body["data"]] == [0, 1]


async def test_ollamas_routes_answer(setup: Setup) -> None:
    setup.runtimes.embeddings.extend([RESULT, RESULT])
    status, body = await setup.post("/api/embed", input=["a", "b"])
    assert status == 200
    assert body["embeddings"] == [[0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 3.0, 4.0]]
    assert body["prompt_eval_count"] == 8
    assert min(body["total_duration"], body["load_duration"]) > 0
    status, body = await setup.post("/api/embeddings", prompt="a")
    assert (status, body) == (200, {"embedding": [0.5, -1.0, 0.0, 2.0]})


async def test_a_request_without_input_loads_the_model_or_unloads_it(setup: Setup) -> None:
    assert await setup.post("/api/embed") == (200, {"model": "org/e", "embeddings": []})
    assert await setup.post("/api/embeddings", prompt="") == (200, {"embedding": []})
    assert setup.runtimes.loads == ["org/e:latest"]
    assert (await setup.post("/api/embed", input="", keep_alive=0))[0] == 200
    assert setup.runtimes.unloaded == ["org/e:latest"]


async def test_errors_are_in_the_form_of_their_api(setup: Setup) -> None:
    too_long = ContextLengthExceeded("too long", prompt_tokens=9, context_tokens=4)
    setup.runtimes.embeddings.extend([too_long, too_long])
    status, body = await setup.post("/v1/embeddings", input="a")
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert body["error"]["details"] == {"prompt_tokens": 9, "context_tokens": 4}
    assert await setup.post("/api/embed", input="a") == (400, {"error": "too long"})
    status, body = await setup.post("/v1/embeddings", model="org/m", input="a")
    assert (status, body["error"]["param"]) == (400, "model")
    status, body = await setup.post("/v1/embeddings", model="org/none", input="a")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    status, body = await setup.post("/api/embed", model="", input="a")
    assert (status, body) == (400, {"error": "model is required"})


async def test_vectors_in_several_frames_become_one_result() -> None:
    vectors = Vectors()
    for index, vector in enumerate(RESULT.vectors):
        data = base64.b64encode(vector).decode()
        vectors.add(data, [RESULT.prompt_tokens[index]], last=index == 1)
    assert await vectors.result == RESULT
    vectors.fail(InvalidRequest("too late"))
    assert await vectors.result == RESULT


async def test_vectors_can_end_in_an_error() -> None:
    vectors = Vectors()
    vectors.fail(InvalidRequest("no"))
    with pytest.raises(InvalidRequest, match="no"):
        await vectors.result
