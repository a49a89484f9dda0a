from __future__ import annotations

import json

import pytest

from ohmygpu.client import Address
from ohmygpu.client.wire import (
    ChatDecoder,
    EventDecoder,
    LineBuffer,
    error_from_wire,
    read_health,
    read_reply,
)
from ohmygpu.core.errors import DaemonError, InvalidRequest, NotTheDaemon, OhMyGPUError

HERE = Address("http://127.0.0.1:7")


def test_lines_come_out_whole_however_the_bytes_are_cut() -> None:
    data = "data: é\r\n\r\ndata: \u2028b\x0b\n".encode()
    for size in (1, 2, 3, 100):
        buffer = LineBuffer()
        lines: list[bytes] = []
        for start in range(0, len(data), size):
            lines += buffer.feed(data[start : start + size])
        assert [line.decode() for line in lines] == ["data: é", "data: \u2028b\x0b"]


def test_errors_from_the_wire_keep_code_message_param_and_details() -> None:
    error = error_from_wire(
        {"message": "no", "type": "x", "param": "top_p", "code": "invalid_request", "details": {}}
    )
    assert isinstance(error, InvalidRequest)
    assert error.details == {"param": "top_p"}
    odd = error_from_wire({"message": None, "code": 7, "details": {"self": 1, "message": 2}})
    assert type(odd) is OhMyGPUError


@pytest.mark.parametrize(
    ("status", "content"), [(500, b"<html>"), (404, b"{}"), (200, b"[]"), (302, b"moved")]
)
def test_replies_that_no_daemon_gives_are_named_as_such(status: int, content: bytes) -> None:
    with pytest.raises(DaemonError, match=f"answered {status}"):
        read_reply(HERE, status, content)


def test_another_program_that_reports_errors_as_ollama_does_is_no_daemon() -> None:
    with pytest.raises(NotTheDaemon, match="another program"):
        read_health(Address("http://127.0.0.1:1"), 404, b'{"error": "no such page"}')
    body = b'{"error": {"code": "http_refusal", "message": "this host may not call"}}'
    with pytest.raises(OhMyGPUError, match="may not call"):
        read_health(Address("http://127.0.0.1:1"), 403, body)


def test_an_empty_reply_is_an_empty_object() -> None:
    assert read_reply(HERE, 200, b"") == {}


@pytest.mark.parametrize(
    "line",
    [
        b"data: {\n",
        b"data: []\n",
        b'data: {"choices": [{"delta": {}, "finish_reason": "because"}]}\n',
    ],
)
def test_chunks_that_cannot_be_read_point_at_the_version(line: bytes) -> None:
    with pytest.raises(DaemonError, match="this version"):
        list(ChatDecoder(HERE).feed(line))


def test_reason_and_usage_arrive_as_one_delta_even_in_two_chunks() -> None:
    decoder = ChatDecoder(HERE)
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]},
        {"choices": [{"delta": {}, "finish_reason": "length"}]},
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 1,
                "prompt_tokens_details": {"cached_tokens": 2},
            },
        },
    ]
    data = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    deltas = list(decoder.feed(data + b"data: [DONE]\n\n"))
    assert [delta.text for delta in deltas] == ["a", ""]
    assert str(deltas[1].finish_reason) == "length"
    assert deltas[1].usage is not None
    assert deltas[1].usage.cached_tokens == 2
    assert decoder.finished


def test_a_line_of_a_pull_that_is_no_event_is_an_error() -> None:
    for line in (b"nonsense\n", b"{}\n", b'{"error": "text"}\n'):
        with pytest.raises(DaemonError):
            list(EventDecoder(HERE).feed(line))
