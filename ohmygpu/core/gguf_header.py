"""What a model in GGUF is, told from its first bytes: enough to refuse it before it is fetched.

The whole format is read by `convert.gguf`; layout: docs/gguf.md of ggml.
"""

from __future__ import annotations

import struct

HEAD_BYTES = 16 * 1024  # general.architecture is the first entry that writers write
_ARCHITECTURE = b"general.architecture"
_EXPERT_COUNT = b".expert_count"
_UINT32, _STRING = 4, 8
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def architecture_of(head: bytes) -> str | None:
    """`general.architecture` of the GGUF file that begins with `head`.

    None when `head` does not show it: it is no GGUF file, or the entry stands behind a list.
    """
    try:
        magic, version, _, entries = struct.unpack_from("<4sIQQ", head)
        if magic != b"GGUF" or version not in (2, 3):
            return None
        position = 24
        for _ in range(entries):
            key, position = _text(head, position)
            (kind,) = struct.unpack_from("<I", head, position)
            position += 4
            if kind == _STRING:
                value, position = _text(head, position)
                if key == _ARCHITECTURE:
                    return value.decode("utf-8", "replace")
            elif kind in _SCALAR_BYTES:
                position += _SCALAR_BYTES[kind]
            else:
                return None
    except struct.error:  # `head` ends here
        return None
    return None


def expert_count_of(head: bytes) -> int:
    """`<architecture>.expert_count` of the GGUF file that begins with `head`; 0 where it has none.

    The entry is looked for by its name: lists, which writers put between, need not be read.
    """
    position = head.find(_EXPERT_COUNT)
    try:
        kind, count = struct.unpack_from("<II", head, position + len(_EXPERT_COUNT))
    except struct.error:
        return 0
    return int(count) if position >= 0 and kind == _UINT32 else 0


def _text(head: bytes, position: int) -> tuple[bytes, int]:
    """The string at `position`, and the position behind it."""
    (length,) = struct.unpack_from("<Q", head, position)
    end = position + 8 + length
    if end > len(head):
        raise struct.error
    return head[position + 8 : end], end
