"""Writes small GGUF models for tests, with the format's own reference writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ohmygpu.convert.gguf_blocks import BLOCK_TYPES

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 512, 4, 2, 64, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "ab"]
KINDS = [2, 3, 3, *[6] * 256, 1, 1, 1]

SCALE_OFFSETS = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)}
SCALE_OFFSETS |= {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
SCALE_OFFSETS |= {"IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "TQ1_0": (52,)}
SCALE_OFFSETS |= {"TQ2_0": (64,)}
"""Where each block type keeps its float16 scales."""


def random_blocks(
    type_name: str, rows: int, columns: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Random rows of a block type, (rows, row bytes): any codes, scales like real ones."""
    block = BLOCK_TYPES[type_name]
    count = columns // block.elements
    raw = rng.integers(0, 256, (rows, count, block.nbytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS[type_name]:
        # One sign and few binades, as scale and minimum of one tensor are: their sum stays exact.
        scale = rng.uniform(0.5, 2.0, (rows, count)) * 2.0**-10
        raw[..., offset : offset + 2] = scale.astype("<f2")[..., None].view(np.uint8)
    if type_name == "MXFP4":
        raw[..., 0] = rng.integers(110, 135, (rows, count))
    if type_name == "TQ2_0":
        digits = rng.integers(0, 3, (4, rows, count, 64), dtype=np.uint8)
        raw[..., :64] = digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6
    return raw.reshape(rows, -1)


def llama_tensors(
    rng: np.random.Generator, body: str = "Q4_K", embedding: str = "Q6_K"
) -> dict[str, tuple[NDArray[Any], str]]:
    """GGUF name → (data, type) of a tiny llama; plain types hold float32 data."""
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"attn_q": (queries, HIDDEN), "attn_k": (keys, HIDDEN), "attn_v": (keys, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, queries), "ffn_down": (HIDDEN, INNER)}
    shapes |= {"ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
    tensors = {"token_embd.weight": _tensor(rng, (len(TOKENS), HIDDEN), embedding)}
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{norm}.weight"] = _tensor(rng, (HIDDEN,), "F32")
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = _tensor(rng, shape, body)
    tensors["output_norm.weight"] = _tensor(rng, (HIDDEN,), "F32")
    return tensors


def _tensor(
    rng: np.random.Generator, shape: tuple[int, ...], type_name: str
) -> tuple[NDArray[Any], str]:
    if type_name in BLOCK_TYPES:
        return random_blocks(type_name, shape[0], shape[1], rng), type_name
    return rng.standard_normal(shape).astype(np.float32), type_name


def llama_metadata(**changes: Any) -> dict[str, Any]:
    """The metadata of a tiny llama with a SentencePiece vocabulary; None removes a key."""
    data: dict[str, Any] = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": KINDS,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    data |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in data.items() if value is not None}


def write_gguf(
    path: Path,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, tuple[NDArray[Any], str]] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a model with gguf's own writer; without arguments the tiny llama."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (llama_metadata() if metadata is None else metadata).items():
        add_value(writer, key, value)
    if tensors is None:
        tensors = llama_tensors(np.random.default_rng(0))
    for name, (data, type_name) in tensors.items():
        kind = gguf.GGMLQuantizationType[type_name]
        plain = type_name in ("F16", "BF16")
        stored = gguf.quants.quantize(data, kind) if plain else data
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add a metadata entry in the type that real files have it in."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int) and value < 0:
        writer.add_int32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)
