from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from ollama import ChatResponse, GenerateResponse, ListResponse, ProcessResponse, ShowResponse

from ohmygpu.core.errors import InvalidRequest, ModelNotFound, RuntimeFailure
from ohmygpu.core.records import TOKENIZER_FILE
from ohmygpu.daemon import ollama
from ohmygpu.daemon.cards import ModelCard
from ohmygpu.daemon.ollama_models import human_count
from ohmygpu.runtime_api import Delta, FinishReason, Message, SamplingParams, Usage
from tests.daemon.model_cards import DIGEST, make_card

USER = [{"role": "user", "content": "Hi"}]
DEFAULTS = SamplingParams(temperature=0.8, top_k=40, top_p=0.9)
USAGE = Usage(prompt_tokens=26, completion_tokens=5, cached_tokens=8, prefill_s=0.25, decode_s=1.5)


def chat_call(card: ModelCard | None = None, **body: Any) -> ollama.GenerateCall | ollama.LoadCall:
    return ollama.parse_chat({"model": "m", "messages": USER, **body}, card or make_card())


def chat(card: ModelCard | None = None, **body: Any) -> ollama.GenerateCall:
    call = chat_call(card, **body)
    assert isinstance(call, ollama.GenerateCall)
    return call


def generate(card: ModelCard | None = None, **body: Any) -> ollama.GenerateCall:
    call = ollama.parse_generate({"model": "m", "prompt": "Hi", **body}, card or make_card())
    assert isinstance(call, ollama.GenerateCall)
    return call


def refusal(api: str = "chat", card: ModelCard | None = None, **body: Any) -> InvalidRequest:
    start = time.process_time()
    with pytest.raises(InvalidRequest) as caught:
        (chat if api == "chat" else generate)(card, **body)
    assert time.process_time() - start < 5
    assert len(caught.value.message) < 400
    return caught.value


# --- requests ------------------------------------------------------------------------------------


def test_a_plain_chat_has_ollamas_defaults() -> None:
    call = chat()
    assert call.api == "chat"
    assert call.model == "m"
    assert call.stream
    assert call.request.messages == (Message("user", "Hi"),)
    assert call.request.sampling == DEFAULTS
    assert call.request.truncate
    assert call.request.context_limit is None
    assert not call.request.return_context
    assert call.keep_alive_s is None


def test_the_models_own_sampling_defaults_come_before_ollamas() -> None:
    card = make_card(generation={"temperature": 0.2})
    assert chat(card).request.sampling == SamplingParams(temperature=0.2, top_k=40, top_p=0.9)
    assert chat(card, options={"temperature": 0}).request.sampling.temperature == 0


def test_every_meaningful_option_is_honoured() -> None:
    call = chat(
        options={
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.8,
            "min_p": 0.1,
            "typical_p": 0.7,
            "repeat_penalty": 1.2,
            "repeat_last_n": 33,
            "presence_penalty": 1.5,
            "frequency_penalty": 1.0,
            "seed": 42,
            "stop": ["\n", "user:"],
            "num_predict": 100,
            "num_ctx": 1024,
        }
    )
    assert call.request.context_limit == 1024
    assert call.request.sampling == SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.8,
        min_p=0.1,
        typical_p=0.7,
        repetition_penalty=1.2,
        repetition_window=33,
        presence_penalty=1.5,
        frequency_penalty=1.0,
        seed=42,
        stop=("\n", "user:"),
        max_tokens=100,
    )


@pytest.mark.parametrize(
    ("value", "tokens"), [(-1, None), (-2, None), (0, 0), (1, 1), (None, None), (7.0, 7)]
)
def test_num_predict(value: Any, tokens: int | None) -> None:
    assert chat(options={"num_predict": value}).request.sampling.max_tokens == tokens


def test_seed_minus_one_is_a_fresh_seed() -> None:
    assert chat(options={"seed": -1}).request.sampling.seed is None
    assert chat(options={"seed": -2}).request.sampling.seed == -2


def test_a_stop_string_need_not_be_in_a_list() -> None:
    assert chat(options={"stop": "x"}).request.sampling.stop == ("x",)


def test_options_about_loading_change_nothing() -> None:
    options = {
        "num_keep": 5,
        "num_batch": 2,
        "num_gpu": -1,
        "main_gpu": 0,
        "num_thread": 8,
        "draft_num_predict": 4,
        "use_mmap": True,
        "use_mlock": False,
        "numa": False,
        "low_vram": False,
        "f16_kv": True,
        "logits_all": False,
        "vocab_only": False,
        "embedding_only": False,
        "penalize_newline": True,
        "mirostat": 0,
        "mirostat_tau": 0.8,
        "mirostat_eta": 0.6,
        "tfs_z": 1,
    }
    assert chat(options=options) == chat()


def test_null_options_are_skipped() -> None:
    import ollama as package

    options = dict.fromkeys(package.Options.model_fields)
    assert len(options) > 25
    assert chat(options=options) == chat(options=None) == chat(options={}) == chat()


def test_every_option_of_the_ollama_package_is_known() -> None:
    import ollama as package

    for name in package.Options.model_fields:
        with pytest.raises(InvalidRequest) as caught:
            chat(options={name: []}) if name != "stop" else chat(options={name: 5})
        assert "unknown option" not in caught.value.message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -1),
        ("temperature", "0.5"),
        ("temperature", math.nan),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 10**400),
        ("top_k", "40"),
        ("top_p", 1.1),
        ("repeat_last_n", -2),
        ("repeat_penalty", 0),
        ("num_ctx", 0),
        ("num_ctx", -1),
        ("num_ctx", math.nan),
        ("num_ctx", "4096"),
        ("num_predict", -3),
        ("num_predict", 10**12),
        ("num_predict", 1.5),
        ("num_keep", -5),
        ("num_keep", "4"),
        ("num_keep", math.inf),
        ("num_gpu", -2),
        ("num_thread", -1),
        ("num_batch", 1e30),
        ("use_mmap", 1),
        ("seed", 2**64),
        ("seed", "x"),
        ("stop", 5),
        ("stop", [None]),
        ("stop", ["x"] * 1_000_000),
        ("mirostat", 2),
        ("mirostat", "x"),
        ("tfs_z", 0.5),
        ("penalize_newline", False),
        ("embedding_only", True),
        ("temprature", 1),
        ("x" * 100_000, 1),
    ],
)
def test_bad_options_are_refused_by_name(option: str, value: Any) -> None:
    error = refusal(options={option: value})
    assert str(error.details["param"]).startswith(f"options.{option[:80]}")
    assert option[:80] in error.message


def test_an_option_in_the_wrong_place_is_pointed_at() -> None:
    assert "put it into options" in refusal(temperature=0.5).message
    assert "put it into options" in refusal(num_ctx=5).message


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "format": "", "think": False, "images": []},
        {"tools": None, "format": None, "think": None, "keep_alive": None, "stream": None},
        {"tool_choice": "auto", "logprobs": False, "top_logprobs": 0, "shift": False},
        {"template": "", "suffix": "", "user": "me", "metadata": {}, "_debug_render_only": False},
        {"options": {}, "keep_alive": None, "truncate": True},
    ],
)
def test_fields_that_cannot_change_the_answer_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()
    assert generate(**fields) == generate()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("format", "json", "structured output"),
        ("format", {"type": "object"}, "structured output"),
        ("format", 5, "structured output"),
        ("tools", [{"type": "function"}], '"m" does not support tools'),
        ("tool_choice", "required", '"m" does not support tools'),
        ("think", True, '"m" does not support thinking'),
        ("think", "high", '"m" does not support thinking'),
        ("think", "very", 'invalid think value: "very" (must be "high", "medium", "low", "max"'),
        ("think", 1, "invalid think value"),
        ("images", ["aGk="], '"m" does not support images'),
        ("logprobs", True, "log probabilities are not supported"),
        ("top_logprobs", 21, "top_logprobs must be between 0 and 20"),
        ("top_logprobs", -1, "top_logprobs must be between 0 and 20"),
        ("top_logprobs", 3, "log probabilities are not supported"),
        ("suffix", "x", '"m" does not support insert'),
        ("template", "{{ .Prompt }}", "chat template"),
        ("shift", True, "never slides"),
        ("_debug_render_only", True, "not supported"),
        ("grammar", "x", "unknown field"),
        ("width", 5, "unknown field"),
        ("stream", "yes", "true or false"),
        ("truncate", 1, "true or false"),
        ("options", "x", "must be an object"),
        ("keep_alive", "5", "missing unit in duration"),
        ("keep_alive", "soon", "invalid duration"),
    ],
)
def test_other_fields_are_refused_by_name(field: str, value: Any, text: str) -> None:
    for api in ("chat", "generate"):
        error = refusal(api, **{field: value})
        assert text in error.message
        assert error.details["param"] == field


def test_keep_alive_stream_and_truncate_are_honoured() -> None:
    call = chat(keep_alive="10m", stream=False, truncate=False)
    assert call.keep_alive_s == 600
    assert not call.stream
    assert not call.request.truncate
    assert chat(keep_alive=-1).keep_alive_s == math.inf
    assert chat(keep_alive=0).keep_alive_s == 0


# --- messages ------------------------------------------------------------------------------------


def test_messages_come_as_clients_send_them() -> None:
    call = chat(
        messages=[
            {"role": "System", "content": "Be brief.", "images": []},
            {"role": "developer", "content": "x"},
            {"role": "user", "content": "Hi", "images": None, "id": 7, "createdAt": "now"},
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": []},
            {"role": "assistant"},
            {"role": "tool", "content": "5", "tool_name": "add", "tool_call_id": "c1"},
        ]
    )
    assert call.request.messages == (
        Message("system", "Be brief."),
        Message("system", "x"),
        Message("user", "Hi"),
        Message("assistant", "", reasoning="hm"),
        Message("assistant", ""),
        Message("tool", "5", name="add", tool_call_id="c1"),
    )


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("Hi", "messages"),
        ({}, "messages"),
        ([5], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "robot"}], "messages[0].role"),
        ([{"role": 5}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "messages[0].content"),
        ([*USER, {"role": "user", "content": "\ud83d"}], "messages[1].content"),
        ([{"role": "user", "content": "x", "images": ["aGk="]}], "messages[0].images"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls"),
        (USER * 1_000_000, "messages"),
    ],
)
def test_bad_messages_are_refused_by_place(value: Any, param: str) -> None:
    assert refusal(messages=value).details["param"] == param


def test_no_messages_load_or_unload_the_model() -> None:
    empty: list[dict[str, Any]] = [{"messages": []}, {"messages": None}]
    for body in empty:
        call = chat_call(**body, keep_alive="1h")
        assert call == ollama.LoadCall(api="chat", model="m", unload=False, keep_alive_s=3600)
    unload = chat_call(messages=[], keep_alive=0)
    assert isinstance(unload, ollama.LoadCall)
    assert unload.unload
    reply = ollama.to_load_reply(unload)
    assert list(reply) == ["model", "created_at", "message", "done", "done_reason"]
    assert reply["message"] == {"role": "assistant", "content": ""}
    assert reply["done_reason"] == "unload"
    ChatResponse.model_validate(reply)


def test_a_model_without_chat_template_generates_but_does_not_chat() -> None:
    base = make_card(template="")
    assert '"m" does not support chat' in refusal(card=base).message
    call = generate(base)
    assert call.request.prompt == "Hi"
    assert call.request.messages is None
    assert call.request.return_context
    assert refusal("generate", base, system="x").details["param"] == "system"
    assert isinstance(chat_call(base, messages=[]), ollama.LoadCall)


# --- generate ------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_user_message_after_the_system_message() -> None:
    assert generate().request.messages == (Message("user", "Hi"),)
    assert generate(system="Be kind").request.messages == (
        Message("system", "Be kind"),
        Message("user", "Hi"),
    )
    assert generate().request.return_context
    assert generate(context=[1, 2, 3]).request.context_tokens == (1, 2, 3)
    assert generate(context=[]).request.context_tokens == ()


def test_raw_prompts_are_left_as_they_are() -> None:
    call = generate(raw=True, prompt="<|im_start|>user")
    assert call.request.prompt == "<|im_start|>user"
    assert call.request.messages is None
    assert not call.request.return_context
    assert generate(raw=True, system="", context=[], template="").request.prompt == "Hi"


@pytest.mark.parametrize("field", [{"system": "x"}, {"context": [1]}])
def test_raw_mode_takes_neither_system_nor_context(field: dict[str, Any]) -> None:
    error = refusal("generate", raw=True, **field)
    assert error.message == "raw mode does not support template, system, or context"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", ["x"]),
        ("prompt", "\ud83d"),
        ("system", 5),
        ("raw", "yes"),
        ("context", "x"),
        ("context", [1.5]),
        ("context", [-1]),
        ("context", [True]),
        ("context", [2**31]),
        ("context", {"a": 1}),
        ("messages", []),
    ],
)
def test_bad_generate_fields_are_refused_by_name(field: str, value: Any) -> None:
    assert refusal("generate", **{field: value}).details["param"] == field


def test_an_empty_prompt_loads_or_unloads_the_model() -> None:
    for body in ({"model": "m"}, {"model": "m", "prompt": ""}, {"model": "m", "prompt": None}):
        load = ollama.parse_generate(body, make_card())
        assert load == ollama.LoadCall(api="generate", model="m", unload=False, keep_alive_s=None)
    unload = ollama.parse_generate({"model": "m", "keep_alive": "0s"}, make_card())
    assert isinstance(unload, ollama.LoadCall)
    reply = ollama.to_load_reply(unload)
    assert {**reply, "created_at": ""} == {
        "model": "m",
        "created_at": "",
        "response": "",
        "done": True,
        "done_reason": "unload",
    }
    GenerateResponse.model_validate(reply)


def test_the_model_is_named_by_model_or_name() -> None:
    assert ollama.model_name({"model": "a", "name": "b"}) == "a"
    assert ollama.model_name({"name": "b"}) == "b"
    nameless: list[dict[str, Any]] = [{}, {"model": ""}, {"model": None}]
    for body in nameless:
        with pytest.raises(InvalidRequest, match=r"^model is required$"):
            ollama.model_name(body, "chat")
        with pytest.raises(InvalidRequest, match=r"^model is required$"):
            ollama.model_name(body)
        with pytest.raises(ModelNotFound) as caught:
            ollama.model_name(body, "generate")
        assert ollama.error_body(caught.value) == {"error": "model '' not found"}
    with pytest.raises(InvalidRequest, match="model: must be a string"):
        ollama.model_name({"model": 5})


# --- replies -------------------------------------------------------------------------------------


def deltas(reason: FinishReason = FinishReason.STOP, **last: Any) -> list[Delta]:
    return [
        Delta(text="Hel", completion_tokens=1),
        Delta(completion_tokens=1),
        Delta(text="lo", completion_tokens=3, finish_reason=reason, usage=USAGE, **last),
    ]


def stream(call: ollama.GenerateCall, parts: list[Delta]) -> list[dict[str, Any]]:
    reply = ollama.Reply(call, started=time.monotonic() - 2, load_s=0.5)
    return [chunk for delta in parts for chunk in reply.chunks(delta)]


def test_a_chat_stream_has_ollamas_keys_in_ollamas_order() -> None:
    chunks = stream(chat(), deltas())
    assert [list(chunk) for chunk in chunks[:-1]] == [
        ["model", "created_at", "message", "done"],
        ["model", "created_at", "message", "done"],
    ]
    assert [chunk["message"]["content"] for chunk in chunks] == ["Hel", "lo", ""]
    assert [chunk["done"] for chunk in chunks] == [False, False, True]
    assert list(chunks[-1]) == [
        "model",
        "created_at",
        "message",
        "done",
        "done_reason",
        "total_duration",
        "load_duration",
        "prompt_eval_count",
        "prompt_eval_cached_count",
        "prompt_eval_duration",
        "eval_count",
        "eval_duration",
    ]
    for chunk in chunks:
        ChatResponse.model_validate(chunk)


def test_the_end_of_a_reply_counts_tokens_and_nanoseconds() -> None:
    end = stream(chat(), deltas(FinishReason.LENGTH))[-1]
    assert end["done_reason"] == "length"
    assert end["total_duration"] >= 2 * 10**9
    assert end["load_duration"] == 500_000_000
    assert end["prompt_eval_count"] == 26
    assert end["prompt_eval_cached_count"] == 8
    assert end["prompt_eval_duration"] == 250_000_000
    assert end["eval_count"] == 5
    assert end["eval_duration"] == 1_500_000_000


def test_durations_are_never_zero_because_clients_divide_by_them() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    end = stream(chat(), [Delta(finish_reason=FinishReason.STOP, usage=usage)])[-1]
    assert min(end[key] for key in end if key.endswith("_duration")) > 0


def test_dropped_messages_are_reported() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1, dropped_messages=3)
    end = stream(chat(), [Delta(finish_reason=FinishReason.STOP, usage=usage)])[-1]
    assert end["dropped_messages"] == 3
    assert "dropped_messages" not in stream(chat(), deltas())[-1]


def test_a_generate_stream_carries_context_at_its_end() -> None:
    chunks = stream(generate(), deltas(context=(1, 2, 3)))
    assert [chunk["response"] for chunk in chunks] == ["Hel", "lo", ""]
    assert "message" not in chunks[0]
    assert chunks[-1]["context"] == [1, 2, 3]
    assert list(chunks[-1])[4:6] == ["done_reason", "context"]
    assert "context" not in stream(generate(raw=True), deltas())[-1]
    for chunk in chunks:
        GenerateResponse.model_validate(chunk)


def test_a_whole_reply_is_one_object() -> None:
    reply = ollama.Reply(chat(stream=False), started=time.monotonic(), load_s=0)
    whole = ChatResponse.model_validate(reply.single("Hello", deltas()[-1]))
    assert whole.message.content == "Hello"
    assert whole.done
    assert whole.done_reason == "stop"
    assert whole.eval_count == 5
    single = ollama.Reply(generate(stream=False), started=time.monotonic(), load_s=0)
    assert single.single("Hello", deltas(context=(1,))[-1])["response"] == "Hello"


def test_an_aborted_reply_is_an_error_not_an_answer() -> None:
    with pytest.raises(RuntimeFailure, match="send the request again"):
        stream(chat(), deltas(FinishReason.ABORT))


def test_times_have_nine_digits_of_a_second() -> None:
    stamp = stream(chat(), deltas())[0]["created_at"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", stamp)


def test_every_chunk_is_one_line_of_json() -> None:
    for chunk in stream(chat(), [Delta(text='a\n"\u2028🙂')]):
        assert "\n" not in json.dumps(chunk)


# --- models --------------------------------------------------------------------------------------


def test_tags_list_models_newest_first() -> None:
    older = make_card(name="old", installed_at="2025-01-01T00:00:00Z")
    body = ollama.to_tags([older, make_card()])
    assert [entry["name"] for entry in body["models"]] == [
        "HuggingFaceTB/SmolLM2-135M-Instruct:latest",
        "old:latest",
    ]
    entry = body["models"][0]
    assert list(entry) == [
        "name",
        "model",
        "modified_at",
        "size",
        "digest",
        "details",
        "capabilities",
    ]
    assert entry["model"] == entry["name"]
    assert entry["digest"] == DIGEST
    assert entry["modified_at"] == "2026-11-22T10:00:00.123456000Z"
    assert entry["details"] == {
        "parent_model": "",
        "format": "safetensors",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "134.52M",
        "quantization_level": "q8",
        "context_length": 8192,
        "embedding_length": 576,
    }
    assert entry["capabilities"] == ["completion"]
    ListResponse.model_validate(body)
    assert ollama.to_tags([]) == {"models": []}


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (134_515_008, "134.52M"),
        (7_000_000_000, "7B"),
        (1_235_814_400, "1.2B"),
        (8_030_261_248, "8.0B"),
        (5_000_000, "5M"),
        (1_500_000_000_000, "1.5T"),
        (12_345, "12K"),
        (999, "999"),
    ],
)
def test_weights_are_counted_as_ollama_does(count: int, shown: str) -> None:
    assert human_count(count) == shown


def loaded(card: ModelCard, expires_in_s: float) -> ollama.Loaded:
    return ollama.Loaded(
        card=card, size_bytes=5, vram_bytes=0, context_tokens=4096, expires_in_s=expires_in_s
    )


def test_ps_lists_the_longest_lived_first() -> None:
    body = ollama.to_ps(
        [
            loaded(make_card(name="a"), 60),
            loaded(make_card(name="b"), math.inf),
            loaded(make_card(name="c"), 1e300),
        ]
    )
    assert [entry["name"] for entry in body["models"]] == ["b:latest", "c:latest", "a:latest"]
    parsed = ProcessResponse.model_validate(body).models
    assert parsed[0].context_length == 4096
    assert parsed[0].size_vram == 0
    assert parsed[0].expires_at is not None
    assert parsed[0].expires_at.year > 2200
    assert list(body["models"][0]) == [
        "name",
        "model",
        "size",
        "digest",
        "details",
        "expires_at",
        "size_vram",
        "context_length",
    ]
    assert ollama.to_ps([]) == {"models": []}


def test_show_tells_what_clients_read() -> None:
    body = ollama.to_show(make_card(generation={"temperature": 0.2, "top_k": 50.0}))
    assert list(body) == [
        "license",
        "modelfile",
        "parameters",
        "template",
        "details",
        "model_info",
        "capabilities",
        "modified_at",
    ]
    info = body["model_info"]
    assert info["general.architecture"] == "llama"
    assert info["general.parameter_count"] == 134_515_008
    assert info["llama.context_length"] == 8192
    assert info["llama.block_count"] == 30
    assert info["llama.attention.head_count_kv"] == 3
    assert info["tokenizer.ggml.eos_token_id"] == 2
    assert info["tokenizer.ggml.tokens"] == []
    assert body["parameters"].splitlines() == [
        'stop                           "<|im_end|>"',
        "temperature                    0.2",
        "top_k                          50",
    ]
    assert "FROM HuggingFaceTB/SmolLM2-135M-Instruct:latest\n" in body["modelfile"]
    assert "PARAMETER temperature 0.2\n" in body["modelfile"]
    assert body["template"] == "{{ messages }}"
    shown = ShowResponse.model_validate(body)
    assert shown.capabilities == ["completion"]
    assert shown.modelinfo


def test_show_leaves_out_what_a_model_does_not_have() -> None:
    body = ollama.to_show(make_card(template="", license="", eos_token="", bos_token_id=None))
    assert list(body) == ["modelfile", "details", "model_info", "capabilities", "modified_at"]
    assert "tokenizer.ggml.bos_token_id" not in body["model_info"]


def test_a_verbose_show_has_the_vocabulary(tmp_path: Path) -> None:
    data = {"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(data), encoding="utf-8")
    info = ollama.to_show(make_card(folder=tmp_path), verbose=True)["model_info"]
    assert info["tokenizer.ggml.tokens"] == ["a", "b"]
    assert info["tokenizer.ggml.merges"] == ["a b"]


def test_errors_are_one_text() -> None:
    assert ollama.error_body(InvalidRequest("x", param="y")) == {"error": "x"}
    missing = ModelNotFound("no model smol", name="smol", suggestions=[])
    assert ollama.error_body(missing) == {"error": "model 'smol' not found"}
    near = ModelNotFound("no", name="smol", suggestions=["smollm2"])
    assert ollama.error_body(near) == {"error": "model 'smol' not found, did you mean 'smollm2'?"}
