from __future__ import annotations

import math
import time
from typing import Any

import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ohmygpu.core.errors import Busy, InvalidRequest, ModelNotFound, RuntimeFailure
from ohmygpu.daemon import openai
from ohmygpu.daemon.cards import ModelCard
from ohmygpu.runtime_api import Delta, FinishReason, Message, SamplingParams, Usage
from tests.daemon.model_cards import make_card

USER = [{"role": "user", "content": "Hi"}]
USAGE = Usage(prompt_tokens=26, completion_tokens=5, cached_tokens=8)


def parse(card: ModelCard | None = None, **body: Any) -> openai.ChatCall:
    return openai.parse_chat({"model": "smol", "messages": USER, **body}, card or make_card())


def refusal(card: ModelCard | None = None, **body: Any) -> InvalidRequest:
    start = time.process_time()
    with pytest.raises(InvalidRequest) as caught:
        parse(card, **body)
    assert time.process_time() - start < 5
    assert len(caught.value.message) < 400
    return caught.value


def sampling(card: ModelCard | None = None, **body: Any) -> SamplingParams:
    return parse(card, **body).request.sampling


# --- requests ------------------------------------------------------------------------------------


def test_a_plain_request_has_the_defaults_of_the_api() -> None:
    call = parse()
    assert call.model == "smol"
    assert call.request.messages == (Message("user", "Hi"),)
    assert call.request.sampling == SamplingParams(temperature=1.0, top_p=1.0)
    assert not call.stream
    assert not call.include_usage
    assert not call.request.truncate
    assert call.keep_alive_s is None
    assert call.request.context_limit is None


def test_the_models_own_sampling_defaults_come_before_the_apis() -> None:
    card = make_card(generation={"temperature": 0.2, "top_k": 50.0})
    assert sampling(card) == SamplingParams(temperature=0.2, top_k=50)
    assert isinstance(sampling(card).top_k, int)
    assert sampling(card, temperature=0.7).temperature == 0.7


def test_every_sampling_field_is_honoured() -> None:
    params = sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.1,
        repeat_last_n=-1,
        presence_penalty=0.3,
        frequency_penalty=-0.4,
        logit_bias={"5": -100},
        seed=-1,
        stop=["a", "b"],
        max_tokens=9,
    )
    assert params == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        typical_p=0.8,
        repetition_penalty=1.1,
        repetition_window=-1,
        presence_penalty=0.3,
        frequency_penalty=-0.4,
        logit_bias={5: -100},
        seed=-1,
        stop=("a", "b"),
        max_tokens=9,
    )


def test_fields_with_two_names() -> None:
    assert sampling(repeat_penalty=1.2).repetition_penalty == 1.2
    assert sampling(repeat_penalty=1.2, repetition_penalty=1.3).repetition_penalty == 1.3
    assert sampling(max_completion_tokens=4).max_tokens == 4
    assert sampling(max_completion_tokens=4, max_tokens=4).max_tokens == 4
    assert refusal(max_completion_tokens=4, max_tokens=5).details["param"] == "max_tokens"
    assert sampling(stop="x").stop == ("x",)


def test_ollamas_options_and_keep_alive_work_on_v1() -> None:
    call = parse(
        keep_alive="10m", options={"num_ctx": 512, "top_k": 3, "temperature": 0.1}, temperature=0.9
    )
    assert call.keep_alive_s == 600
    assert call.request.context_limit == 512
    assert call.request.sampling.top_k == 3
    assert call.request.sampling.temperature == 0.9
    assert parse(num_ctx=64, options={"num_ctx": 512}).request.context_limit == 64
    assert refusal(options={"top_k": -2}).details["param"] == "options.top_k"
    assert refusal(options={"tpo_k": 2}).details["param"] == "options.tpo_k"


def test_streaming_and_its_options() -> None:
    assert parse(stream=True).stream
    assert not parse(stream=True).include_usage
    assert parse(stream=True, stream_options={"include_usage": True}).include_usage
    assert not parse(stream=True, stream_options={"include_usage": False}).include_usage
    assert parse(stream=True, stream_options={"include_obfuscation": False}).stream
    assert not parse(stream=False, stream_options={"include_usage": True}).include_usage
    assert refusal(stream="yes").details["param"] == "stream"
    assert refusal(stream_options=[1]).details["param"] == "stream_options"
    assert refusal(stream_options={"x": 1}).details["param"] == "stream_options.x"


ALL_FIELDS = [
    *openai._HONOURED,
    *openai._NO_EFFECT,
    *openai._NEUTRAL,
]


@pytest.mark.parametrize("field", sorted(set(ALL_FIELDS) - {"model", "messages"}))
def test_null_is_the_same_as_absent(field: str) -> None:
    assert parse(**{field: None}) == parse()


def test_every_parameter_of_the_openai_sdk_is_known() -> None:
    from openai.types.chat import completion_create_params

    params = completion_create_params.CompletionCreateParamsBase.__annotations__
    assert len(params) > 30
    assert set(params) - set(ALL_FIELDS) == set()


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex"},
        {"safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_retention": "24h"},
        {"parallel_tool_calls": False, "tools": [], "tool_choice": "none"},
        {"tool_choice": "auto", "functions": [], "function_call": "none"},
        {"n": 1, "logprobs": False, "top_logprobs": 0, "best_of": 1},
        {"response_format": {"type": "text"}, "modalities": ["text"], "think": False},
        {"reasoning_effort": "none", "verbosity": "medium", "reasoning": {}},
        {"prediction": {"type": "content", "content": "x"}, "cache_prompt": True},
    ],
)
def test_fields_that_cannot_change_the_answer_are_accepted(fields: dict[str, Any]) -> None:
    assert parse(**fields) == parse()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", 0),
        ("n", -1),
        ("n", 10**9),
        ("n", "1"),
        ("n", True),
        ("best_of", 3),
        ("logprobs", True),
        ("logprobs", 1),
        ("top_logprobs", 5),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("response_format", {"type": "hiccup"}),
        ("response_format", {"schema": {}}),
        ("response_format", 123),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tools", "all"),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("verbosity", "high"),
        ("think", True),
        ("think", "low"),
        ("web_search_options", {}),
        ("ignore_eos", True),
        ("guided_json", {}),
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("grammar", "root ::= x"),
        ("temprature", 0.5),
        ("x" * 100_000, 1),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_by_name(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert error.details["param"] == field[:80]
    assert field[:80] in error.message or "does not support" in error.message


@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "repeat_last_n",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "max_tokens",
        "max_completion_tokens",
        "num_ctx",
    ],
)
@pytest.mark.parametrize(
    "value", ["1", True, [], {}, math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400]
)
def test_bad_numbers_are_refused_by_name(field: str, value: Any) -> None:
    assert refusal(**{field: value}).details["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e9),
        ("top_p", 1.5),
        ("top_p", -1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_completion_tokens", 0),
        ("max_tokens", 10**12),
        ("num_ctx", 0),
        ("num_ctx", -5),
        ("seed", 2**64),
        ("seed", 0.5),
        ("stop", 5),
        ("stop", [5]),
        ("stop", [""]),
        ("stop", "x" * 5000),
        ("stop", ["x"] * 1_000_000),
        ("stop", ["\ud800"]),
        ("logit_bias", []),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 1000}),
        ("logit_bias", {"1": math.nan}),
        ("logit_bias", {str(key): 1 for key in range(100_000)}),
        ("keep_alive", "soon"),
        ("keep_alive", True),
        ("options", []),
        ("options", "x"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(field: str, value: Any) -> None:
    assert str(refusal(**{field: value}).details["param"]).startswith(field)


# --- messages ------------------------------------------------------------------------------------


def messages(*entries: Any) -> tuple[Message, ...]:
    parsed = parse(messages=list(entries)).request.messages
    assert parsed is not None
    return parsed


def test_roles_are_mapped_to_those_of_templates() -> None:
    roles = ("developer", "system", "user", "assistant", "tool")
    assert [each.role for each in messages(*({"role": r, "content": "x"} for r in roles))] == [
        "system",
        "system",
        "user",
        "assistant",
        "tool",
    ]


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "b"},
    ]
    assert messages({"role": "user", "content": parts})[0].content == "a\nb"
    assert messages({"role": "user", "content": []})[0].content == ""


def test_a_reply_of_the_api_can_be_sent_back_as_it_came() -> None:
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert messages(echoed)[0] == Message("assistant", "Hello")
    assert messages({"role": "assistant", "content": None})[0].content == ""
    assert messages({"role": "assistant", "tool_calls": []})[0].content == ""


def test_names_calls_and_reasoning_reach_the_template() -> None:
    first, second = messages(
        {"role": "tool", "content": "5", "name": "add", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "x", "reasoning_content": "because"},
    )
    assert first == Message("tool", "5", name="add", tool_call_id="call_1")
    assert second.reasoning == "because"


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("Hi", "messages"),
        ({}, "messages"),
        (5, "messages"),
        ([123], "messages[0]"),
        ([None], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": 123, "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 123}], "messages[0].content"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content"),
        ([*USER, {"role": "user", "content": "\ud83d"}], "messages[1].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0]",
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls",
        ),
        ([{"role": "assistant", "content": "x", "prefix": True}], "messages[0].prefix"),
        (USER * 1_000_000, "messages"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}] * 1_000_000}], "messages["),
    ],
)
def test_bad_messages_are_refused_by_place(value: Any, param: str) -> None:
    assert str(refusal(messages=value).details["param"]).startswith(param)


def test_a_model_without_chat_template_says_so() -> None:
    error = refusal(make_card(template=""))
    assert "does not support chat" in error.message
    assert error.details["param"] == "messages"


@pytest.mark.parametrize("body", [{}, {"model": ""}, {"model": None}, {"model": 5}, {"model": []}])
def test_a_model_must_be_named(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="model") as caught:
        openai.model_name(body)
    assert caught.value.details["param"] == "model"


# --- replies -------------------------------------------------------------------------------------


def deltas(reason: FinishReason = FinishReason.STOP) -> list[Delta]:
    return [
        Delta(text="Hel", completion_tokens=1),
        Delta(completion_tokens=1),
        Delta(text="lo", completion_tokens=3, finish_reason=reason, usage=USAGE),
    ]


def stream(call: openai.ChatCall, parts: list[Delta] | None = None) -> list[dict[str, Any]]:
    reply = openai.ChatReply(call, make_card())
    return [chunk for delta in parts or deltas() for chunk in reply.chunks(delta)]


def strict(model: Any, data: dict[str, Any]) -> Any:
    """What the SDK's client checks with _strict_response_validation."""
    return model.model_validate(data)


def test_a_stream_opens_with_the_role_and_ends_with_an_empty_delta() -> None:
    chunks = stream(parse(stream=True))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in chunks)
    for chunk in chunks:
        strict(ChatCompletionChunk, chunk)


def test_all_chunks_share_id_time_model_and_fingerprint() -> None:
    chunks = stream(parse(stream=True))
    for key in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({chunk[key] for chunk in chunks}) == 1
    assert chunks[0]["model"] == "smol"
    assert "cmpl" in chunks[0]["id"]
    assert stream(parse(stream=True))[0]["id"] != chunks[0]["id"]
    assert stream(parse(stream=True))[0]["system_fingerprint"] == chunks[0]["system_fingerprint"]


def test_usage_comes_in_a_chunk_of_its_own_if_asked_for() -> None:
    chunks = stream(parse(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 26,
        "completion_tokens": 5,
        "total_tokens": 31,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for chunk in chunks:
        strict(ChatCompletionChunk, chunk)


def test_an_empty_reply_still_opens_and_finishes() -> None:
    end = Delta(finish_reason=FinishReason.LENGTH, usage=USAGE)
    chunks = stream(parse(stream=True), [end])
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {},
    ]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_an_aborted_reply_is_an_error_not_an_answer() -> None:
    with pytest.raises(RuntimeFailure, match="send the request again"):
        stream(parse(stream=True), deltas(FinishReason.ABORT))


def test_a_whole_reply_passes_the_sdks_validation() -> None:
    reply = openai.ChatReply(parse(), make_card())
    data = reply.completion("Hello", FinishReason.LENGTH, USAGE)
    completion = strict(ChatCompletion, data)
    assert completion.choices[0].message.content == "Hello"
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.total_tokens == 31
    assert completion.usage.prompt_tokens_details.cached_tokens == 8
    assert completion.object == "chat.completion"
    assert completion.system_fingerprint.startswith("fp_")


def test_models_are_listed_with_details() -> None:
    listed = openai.to_model_list([make_card(), make_card(name="local", provider="file")])
    assert listed["object"] == "list"
    first, second = (strict(Model, entry) for entry in listed["data"])
    assert first.id == "HuggingFaceTB/SmolLM2-135M-Instruct:latest"
    assert first.owned_by == "HuggingFaceTB"
    assert second.owned_by == "ohmygpu"
    assert first.created == 1795341600
    details = listed["data"][0]["ohmygpu"]
    assert details["revision"] == {"branch": "main", "resolved_commit": "c" * 40}
    assert details["context_length"] == 8192
    assert details["size_bytes"] == 145_000_000
    assert openai.to_model_list([]) == {"object": "list", "data": []}


def test_errors_have_openais_four_keys() -> None:
    error = InvalidRequest("n: only 1", param="n")
    assert openai.error_body(error, 400) == {
        "error": {
            "message": "n: only 1",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_request",
        }
    }
    missing = openai.error_body(ModelNotFound("no", name="x", suggestions=["y"]), 404)["error"]
    assert missing["type"] == "not_found_error"
    assert missing["code"] == "model_not_found"
    assert missing["details"] == {"name": "x", "suggestions": ["y"]}
    assert openai.error_body(Busy("full"), 503)["error"]["type"] == "api_error"
    assert openai.error_body(Busy("full"), 429)["error"]["type"] == "rate_limit_error"
