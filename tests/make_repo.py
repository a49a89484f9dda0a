"""Writes a GGUF model as the SafeTensors repository it could have come from.

    python tests/make_repo.py MODEL.gguf FOLDER [--shards N]

Weights become bfloat16; config, tokenizer, template and generation settings lie beside them as on
the Hugging Face hub. Gives the tests' own hub real weights to serve, without a download.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ohmygpu.convert.source import Float32, Source, TensorInfo, open_source, row_chunks
from ohmygpu.convert.tokenizer import TokenizerFacts, prepare_tokenizer


def make_repo(gguf: Path, folder: Path, shards: int = 1) -> None:
    """Fill `folder`: one model.safetensors, or `shards` of them with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source({gguf.name: gguf})
    try:
        facts = prepare_tokenizer(source, folder)
        _write_settings(source, facts, folder)
        _write_weights(source, folder, shards)
    finally:
        source.close()


def write_safetensors(source: Source, names: list[str], file: BinaryIO) -> None:
    """Write the named tensors as one SafeTensors file in bfloat16, a few rows at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        info = source.tensors[name]
        start, end = end, end + 2 * info.elements
        header[name] = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        for rows in _rows(source, source.tensors[name]):
            file.write(to_bfloat16(rows))


def to_bfloat16(values: Float32) -> bytes:
    """Little-endian bfloat16 of finite values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def _rows(source: Source, info: TensorInfo) -> Iterator[Float32]:
    columns = info.elements // max(info.shape[0], 1)
    for start, stop in row_chunks(info.shape[0], columns):
        yield source.read_rows(info.name, start, stop)


def _write_weights(source: Source, folder: Path, shards: int) -> None:
    names = list(source.tensors)
    if shards == 1:
        with (folder / "model.safetensors").open("wb") as file:
            write_safetensors(source, names, file)
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        with (folder / shard).open("wb") as file:
            write_safetensors(source, part, file)
        weight_map |= dict.fromkeys(part, shard)
    total = sum(2 * info.elements for info in source.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_settings(source: Source, facts: TokenizerFacts, folder: Path) -> None:
    config = {key: value for key, value in source.config.items() if value is not None}
    _write_json(folder / "config.json", config | {"torch_dtype": "bfloat16"})
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": facts.bos_token or None,
        "eos_token": facts.eos_token or None,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    ends = list(facts.eos_token_ids)
    generation = {"bos_token_id": facts.bos_token_id, "eos_token_id": ends} | facts.generation
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and write the repository."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=1)
    arguments = parser.parse_args()
    make_repo(arguments.gguf, arguments.folder, arguments.shards)


if __name__ == "__main__":
    main()
