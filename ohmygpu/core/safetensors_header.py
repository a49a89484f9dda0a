"""The header of a SafeTensors file: how long it may be, and whether it can be one at all.

Told from its bytes before they are parsed, so that a hostile file cannot take more memory than a
real one. The whole format is read by `convert.safetensors`.
"""

from __future__ import annotations

# The reference reader allows 100 MB; models with tens of thousands of tensors in one file need 5.
MAX_HEADER_BYTES = 32 << 20

_LARGE_BYTES = 1 << 20  # smaller ones cannot do harm, whatever they are
# {"name":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}: 52 bytes with four colons, one brace
# and two brackets are the least that a tensor takes.
_BYTES_PER_COLON = 10
_BYTES_PER_BRACKET = 12


def header_bytes(start: bytes, file_bytes: int) -> int | None:
    """Length of the header that `start` (the first 8 bytes) announces; None when it cannot be."""
    length = int.from_bytes(start, "little")
    fits = len(start) == 8 and 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8)
    return length if fits else None


def may_be_table(header: bytes) -> bool:
    """Whether the header can be a table of tensors: not lists in lists, nor keys without end."""
    if len(header) <= _LARGE_BYTES:
        return True
    brackets = header.count(b"[") + header.count(b"{")
    return (
        brackets * _BYTES_PER_BRACKET <= len(header)
        and header.count(b":") * _BYTES_PER_COLON <= len(header)
        and header.count(b",") * _BYTES_PER_COLON // 2 <= len(header)
    )
