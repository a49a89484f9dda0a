"""Writes a repository with the shape of a real model and random weights, as the hub would have it.

    python tests/shaped_repo.py SHAPE FOLDER --tokenizer MODEL.gguf [--layers N] [--shards N]

SHAPE is one of SHAPES or the path of a config.json. Weights are bfloat16, named and shaped by the
family, written a piece at a time: an 8B model takes its 16 GB of disk and no memory. The tokenizer
is rebuilt from a GGUF file; it may know fewer tokens than the model.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from collections.abc import Mapping
from contextlib import closing
from itertools import pairwise
from math import log2, prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ohmygpu.convert.family import check_supported, family
from ohmygpu.convert.source import open_source
from ohmygpu.convert.tokenizer import TokenizerFacts, prepare_tokenizer
from tests.make_repo import to_bfloat16

SHAPES: dict[str, dict[str, Any]] = {
    "phi-2": {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "vocab_size": 51200,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [1.0 + index / 2 for index in range(48)],
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "pythia-2.8b": {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
}
"""Configs of models that people use. Phi-2 and Pythia have no chat template."""

_WITHOUT_TEMPLATE = ("phi", "gpt_neox", "gpt2", "starcoder2")
_POOL_SIZE = (1 << 22) + 1  # random values that all tensors draw from
_PIECE = 1 << 21  # values written at once
_SHARD_BYTES = 5 << 30  # as the hub's shards


def make_shaped_repo(
    config: Mapping[str, Any], folder: Path, tokenizer: Path, shards: int = 0
) -> int:
    """Fill `folder` with a repository of this config; returns the bytes of its weights.

    `shards` 0 = as many as the hub would have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    module = family(check_supported(config))
    shapes = module.weights(module.Config.read(config))
    with closing(open_source({tokenizer.name: tokenizer})) as source:
        facts = prepare_tokenizer(source, folder)
    if config["model_type"] in _WITHOUT_TEMPLATE:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    _write_settings(config, facts, folder)
    total = sum(2 * prod(shape) for shape in shapes.values())
    _write_weights(shapes, folder, shards or -(-total // _SHARD_BYTES), total)
    return total


def _write_settings(config: Mapping[str, Any], facts: TokenizerFacts, folder: Path) -> None:
    tokens = {"bos_token_id": facts.bos_token_id, "eos_token_id": facts.eos_token_ids[0]}
    _write_json(folder / "config.json", {**config, **tokens, "torch_dtype": "bfloat16"})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": facts.bos_token or None,
        "eos_token": facts.eos_token or None,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", tokens)


def _write_weights(
    shapes: Mapping[str, tuple[int, ...]], folder: Path, shards: int, total: int
) -> None:
    values = _Values()
    if shards == 1:
        with (folder / "model.safetensors").open("wb") as file:
            _write_shard(shapes, list(shapes), file, values)
        return
    weight_map: dict[str, str] = {}
    cuts = [index * len(shapes) // shards for index in range(shards + 1)]
    for number, (start, stop) in enumerate(pairwise(cuts), 1):
        shard, names = f"model-{number:05d}-of-{shards:05d}.safetensors", list(shapes)[start:stop]
        with (folder / shard).open("wb") as file:
            _write_shard(shapes, names, file, values)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_shard(
    shapes: Mapping[str, tuple[int, ...]], names: list[str], file: BinaryIO, values: _Values
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + 2 * prod(shapes[name])
        header[name] = {
            "dtype": "BF16",
            "shape": list(shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        values.write(file, name, shapes[name])


class _Values:
    """Random bfloat16 values, cut from one pool wherever chance says."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(17)
        normal = self._random.standard_normal(_POOL_SIZE, np.float32)
        # Values below 2**-20 are made larger: dividing by a power of two must not underflow.
        normal = np.copysign(np.maximum(np.abs(normal), 2.0**-20), normal).astype(np.float32)
        self._pool: NDArray[np.uint16] = np.frombuffer(to_bfloat16(normal), "<u2")
        self._ones: NDArray[np.uint16] = np.frombuffer(
            to_bfloat16((1 + normal / 16).astype(np.float32)), "<u2"
        )
        self._scaled: dict[int, NDArray[np.uint16]] = {}  # halvings → values

    def write(self, file: BinaryIO, name: str, shape: tuple[int, ...]) -> None:
        """A tensor: norms about 1, everything else about 1 / sqrt(columns)."""
        is_norm = len(shape) == 1 and name.endswith("weight")
        halvings = 0 if is_norm else round(log2(shape[-1]) / 2)
        if halvings not in self._scaled:
            self._scaled[halvings] = self._pool - np.uint16(halvings << 7)  # the exponent's place
        pool = self._ones if is_norm else self._scaled[halvings]
        left = prod(shape)
        while left:
            count = min(left, _PIECE)
            start = int(self._random.integers(0, _POOL_SIZE - count))
            file.write(pool[start : start + count].tobytes())
            left -= count


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and write the repository."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or a config.json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL.gguf")
    parser.add_argument("--layers", type=int, help="fewer than the config has")
    parser.add_argument("--shards", type=int, default=0)
    options = parser.parse_args()
    config = SHAPES.get(options.shape) or json.loads(Path(options.shape).read_text("utf-8"))
    if options.layers:
        config = {**config, "num_hidden_layers": options.layers}
    total = make_shaped_repo(config, options.folder, options.tokenizer, options.shards)
    print(f"{options.folder}: {total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
