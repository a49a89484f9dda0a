"""Frames between the daemon and a worker process: a private stream socket, JSON, one frame a step.

A frame is a little-endian uint32 length and that many bytes of UTF-8 JSON (an object with "op").

    daemon → worker   {"op":"generate","id":7,"request":{…GenerateRequest…}}
                      {"op":"embed","id":6,"request":{…EmbedRequest…}}
                      {"op":"abort","id":7}        {"op":"health","id":8}       {"op":"unload"}
    worker → daemon   {"op":"ready","caps":{…RuntimeCaps…}}    {"op":"failed","error":{…}}    (once)
                      {"op":"step","deltas":[[7,{…Delta…}],…],"errors":[[9,{…error…}],…]}
                      {"op":"embedded","id":6,"vectors":"…","prompt_tokens":[5,…],"last":true}
                      {"op":"health","id":8,"status":{…RuntimeStatus…}}

`vectors` are little-endian float32 numbers in base64, one vector after the other; many come in
several frames, of which the last says so. An embed request that fails is among the `errors` of a
step.

End of file on either side means the other is gone: the worker exits, the daemon ends the model's
requests with RuntimeFailure. The model to load (a RunSpec) is the worker's argument.
"""

from __future__ import annotations

import json
import struct
from typing import Any

MAX_FRAME_BYTES = 64 * 1024 * 1024
HEADER = struct.Struct("<I")


def encode_frame(frame: dict[str, Any]) -> bytes:
    """Frame → header and body."""
    body = json.dumps(frame, ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(body)} bytes exceeds {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Body length in bytes from the 4 header bytes; ValueError when it exceeds the bound."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
    return int(length)


def decode_frame(body: bytes) -> dict[str, Any]:
    """Body → frame; ValueError when it is not a JSON object."""
    frame = json.loads(body.decode("utf-8", "surrogatepass"))
    if not isinstance(frame, dict):
        raise ValueError("a frame must be a JSON object")
    return frame
