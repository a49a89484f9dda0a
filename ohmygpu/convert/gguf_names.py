"""From the names of GGUF tensors to Hugging Face names, by tables that the architectures share.

A table has one `Entry` for each GGUF tensor; `blk.N` stands for every layer. `place` holds a file
against its table: each tensor known, none missing, every shape right. Fused tensors (q, k and v in
one matrix, all experts in one) are cut by rows, so that blocks stay as they are.

Names: gguf's `tensor_mapping`; orders of rows: what llama.cpp's converter does, undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ohmygpu.core.errors import CorruptFile, UnsupportedModel

from .gguf import GgufModel, GgufTensor
from .gguf_blocks import BLOCK_TYPES
from .gguf_keys import Keys

Order = Callable[[Mapping[str, int]], NDArray[np.int64]]
"""Sizes → for each Hugging Face row, the row of the GGUF tensor it is."""

_MAX_STACK = 4096  # experts or heads in one tensor
_IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_IGNORED_SUFFIX = "attn_rot_embd"  # inverse frequencies that very old converters stored


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a Hugging Face tensor is found in the GGUF file.

    It is rows `first_row`… of the stored tensor seen as a matrix, in the order of `rows` where that
    is given (counted from `first_row`), with `shift` added to every value. A vector cut out of a
    matrix is one of its rows.
    """

    gguf_name: str
    shape: tuple[int, ...]
    first_row: int = 0
    rows: NDArray[np.int64] | None = None
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class Translation:
    """A GGUF model's config and tensor names in Hugging Face terms."""

    config: dict[str, Any]
    placements: dict[str, Placement]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a GGUF tensor is in Hugging Face terms.

    `names` are the tensors it holds, one after another by rows; `N` is the layer. A name with `{}`
    stands for one tensor per expert (or head): the first axis of the stored tensor counts them.
    `shape` has one letter for each axis, see `sizes_of`; `parts` one letter for the rows of each
    of several names, and `orders` may reorder the rows of each. An `optional` tensor is in every
    layer or in none.
    """

    names: tuple[str, ...]
    shape: str
    parts: str = ""
    optional: bool = False
    orders: tuple[Order | None, ...] = (None,)
    shift: float = 0.0


Table = Mapping[str, Entry]


def entry(name: str, shape: str, order: Order | None = None, shift: float = 0.0) -> Entry:
    """A tensor that must be there."""
    return Entry((name,), shape, orders=(order,), shift=shift)


def maybe(name: str, shape: str, order: Order | None = None) -> Entry:
    """A tensor that may be missing from all layers."""
    return Entry((name,), shape, optional=True, orders=(order,))


def half_rotation(heads: str) -> Order:
    """Rows of `heads` heads (a letter of `sizes_of`), from neighbouring pairs to halves.

    llama.cpp rotates neighbouring dimensions of a head for some architectures (RoPE as in the
    original paper) where transformers rotates the first half against the second.
    """

    def rows(sizes: Mapping[str, int]) -> NDArray[np.int64]:
        width = sizes["D"]
        numbers = np.arange(sizes[heads] * width, dtype=np.int64)
        return numbers.reshape(-1, width // 2, 2).swapaxes(1, 2).reshape(-1)

    return rows


# The parts most decoders are made of.
TOP: Table = {
    "token_embd.weight": entry("model.embed_tokens.weight", "VE"),
    "output_norm.weight": entry("model.norm.weight", "E"),
    "output.weight": maybe("lm_head.weight", "VE"),
}
NORMS: Table = {
    "blk.N.attn_norm.weight": entry("model.layers.N.input_layernorm.weight", "E"),
    "blk.N.ffn_norm.weight": entry("model.layers.N.post_attention_layernorm.weight", "E"),
}
ATTENTION: Table = {
    "blk.N.attn_q.weight": entry("model.layers.N.self_attn.q_proj.weight", "QE"),
    "blk.N.attn_k.weight": entry("model.layers.N.self_attn.k_proj.weight", "KE"),
    "blk.N.attn_v.weight": entry("model.layers.N.self_attn.v_proj.weight", "KE"),
    "blk.N.attn_output.weight": entry("model.layers.N.self_attn.o_proj.weight", "EQ"),
}
QKV_BIASES: Table = {
    "blk.N.attn_q.bias": maybe("model.layers.N.self_attn.q_proj.bias", "Q"),
    "blk.N.attn_k.bias": maybe("model.layers.N.self_attn.k_proj.bias", "K"),
    "blk.N.attn_v.bias": maybe("model.layers.N.self_attn.v_proj.bias", "K"),
}
OUTPUT_BIAS: Table = {
    "blk.N.attn_output.bias": maybe("model.layers.N.self_attn.o_proj.bias", "E"),
}
QK_NORMS: Table = {
    "blk.N.attn_q_norm.weight": entry("model.layers.N.self_attn.q_norm.weight", "D"),
    "blk.N.attn_k_norm.weight": entry("model.layers.N.self_attn.k_norm.weight", "D"),
}
GATED_MLP: Table = {
    "blk.N.ffn_gate.weight": entry("model.layers.N.mlp.gate_proj.weight", "FE"),
    "blk.N.ffn_up.weight": entry("model.layers.N.mlp.up_proj.weight", "FE"),
    "blk.N.ffn_down.weight": entry("model.layers.N.mlp.down_proj.weight", "EF"),
}
MLP_BIASES: Table = {
    "blk.N.ffn_gate.bias": maybe("model.layers.N.mlp.gate_proj.bias", "F"),
    "blk.N.ffn_up.bias": maybe("model.layers.N.mlp.up_proj.bias", "F"),
    "blk.N.ffn_down.bias": maybe("model.layers.N.mlp.down_proj.bias", "E"),
}


def neighbouring_pairs(table: Table) -> dict[str, Entry]:
    """The table, with q and k in the order of architectures that rotate neighbouring pairs."""
    orders = {".attn_q.": half_rotation("H"), ".attn_k.": half_rotation("G")}
    changed = dict(table)
    for name, found in table.items():
        for part, order in orders.items():
            if part in name:
                changed[name] = replace(found, orders=(order,))
    return changed


def split_qkv(model: GgufModel, table: Table) -> dict[str, Entry]:
    """The table, with q, k and v cut out of `attn_qkv` where this file has them in one tensor."""
    changed = dict(table)
    for kind in ("weight", "bias"):
        fused = f"attn_qkv.{kind}"
        if f"blk.0.{fused}" not in model.tensors or f"blk.N.attn_q.{kind}" not in table:
            continue
        parts = [changed.pop(f"blk.N.attn_{part}.{kind}") for part in "qkv"]
        shape = "AE" if kind == "weight" else "A"
        names = tuple(part.names[0] for part in parts)
        orders = tuple(part.orders[0] for part in parts)
        changed[f"blk.N.{fused}"] = Entry(names, shape, parts="QKK", orders=orders)
    return changed


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """What the letters of a table stand for, from a config in the usual keys.

    L layers, V vocabulary, E hidden units, F feed-forward units, U = 2F, H heads, G key-value
    heads, D dimensions of a head, Q = H·D, K = G·D, A = Q + 2K.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * config["head_dim"], kv_heads * config["head_dim"]
    inner = config["intermediate_size"]
    found = {"L": config["num_hidden_layers"], "E": config["hidden_size"]}
    found |= {"F": inner, "U": 2 * inner}
    found |= {"H": heads, "G": kv_heads, "D": config["head_dim"]}
    found |= {"Q": queries, "K": keys, "A": queries + 2 * keys}
    if "vocab_size" in config:
        found["V"] = config["vocab_size"]
    return found


def translation(
    keys: Keys, config: dict[str, Any], table: Table, sizes: Mapping[str, int] | None = None
) -> Translation:
    """The config and the placements of all tensors, after all keys were asked for.

    `sizes` are `sizes_of` the config unless given. Raises as `place` and `Keys.refuse_unasked`.
    """
    keys.refuse_unasked()
    if sizes is None:
        sizes = sizes_of(config)
    split = split_qkv(keys.model, table)
    return Translation(config, place(keys.model, split, sizes))


def place(model: GgufModel, table: Table, sizes: Mapping[str, int]) -> dict[str, Placement]:
    """Hugging Face name → placement, for every tensor of the file.

    Raises CorruptFile for a tensor that is missing or of another shape, UnsupportedModel for one
    that the table does not have.
    """
    stored = {
        name: tensor
        for name, tensor in model.tensors.items()
        if name not in _IGNORED and not name.endswith(_IGNORED_SUFFIX)
    }
    # No more layers than the file can have, and one: its first tensor is then found missing.
    needed = sum(not found.optional for key, found in table.items() if key.startswith("blk.N."))
    layers = min(sizes["L"], len(stored) // needed + 1)
    expected = dict(_every_layer(table, layers))
    _check_names(model, table, expected, stored)
    found: dict[str, Placement] = {}
    rows: dict[str, list[NDArray[np.int64] | None]] = {}  # made once for all layers
    for name, (key, layer) in expected.items():
        if name in stored:
            _check_shape(model, stored[name], table[key], sizes)
            if key not in rows:
                rows[key] = [order and order(sizes) for order in table[key].orders]
            for hf_name, placement in _placements(name, table[key], sizes, rows[key]):
                found[hf_name.replace("N", str(layer))] = placement
    return found


def _every_layer(table: Table, layers: int) -> Iterator[tuple[str, tuple[str, int]]]:
    """GGUF name → (name in the table, layer)."""
    for key in table:
        if not key.startswith("blk.N."):
            yield key, (key, 0)
    for layer in range(layers):
        for key in table:
            if key.startswith("blk.N."):
                yield key.replace("N", str(layer), 1), (key, layer)


def _check_names(
    model: GgufModel,
    table: Table,
    expected: Mapping[str, tuple[str, int]],
    stored: Mapping[str, GgufTensor],
) -> None:
    started = {key for name, (key, _) in expected.items() if name in stored}
    missing = [
        name
        for name, (key, _) in expected.items()
        if name not in stored and (not table[key].optional or key in started)
    ]
    if missing:
        raise CorruptFile(
            f"{model.name} lacks the tensor {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; pull the model again"
        )
    unknown = sorted(set(stored) - set(expected))
    if unknown:
        raise UnsupportedModel(
            f"{model.name} has the tensor {unknown[0][:80]!r}"
            + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
            + f" that the {model.metadata['general.architecture']} architecture does not know; "
            "its answers would be wrong without them"
        )


def _check_shape(
    model: GgufModel, tensor: GgufTensor, found: Entry, sizes: Mapping[str, int]
) -> None:
    shape = tuple(sizes[letter] for letter in found.shape)
    if tensor.shape != shape:
        raise CorruptFile(
            f"tensor {tensor.name} of {model.name} has the shape {tensor.shape}, not {shape}; "
            "pull the model again"
        )
    if "{}" in found.names[0] and shape[0] > _MAX_STACK:
        raise CorruptFile(
            f"tensor {tensor.name} of {model.name} holds {shape[0]} matrices, more than any model "
            "has experts or heads; pull the model again"
        )
    if tensor.type_name in BLOCK_TYPES and (len(shape) == 1 or found.shift):
        raise CorruptFile(
            f"tensor {tensor.name} of {model.name} is a vector stored in {tensor.type_name} "
            "blocks; pull the model again"
        )


def _placements(
    gguf_name: str,
    found: Entry,
    sizes: Mapping[str, int],
    rows: Sequence[NDArray[np.int64] | None],
) -> Iterator[tuple[str, Placement]]:
    shape = tuple(sizes[letter] for letter in found.shape)
    if "{}" not in found.names[0]:
        first = 0
        for name, letter, order in zip(
            found.names, found.parts or found.shape[0], rows, strict=True
        ):
            part = (sizes[letter], *shape[1:])
            yield name, Placement(gguf_name, part, first, order, found.shift)
            first += sizes[letter]
        return
    height = prod(shape[1:-1])  # rows of one expert, 1 for a vector
    for index in range(shape[0]):
        first = index * height
        for number, name in enumerate(found.names):
            part = (sizes[found.parts[number]], *shape[2:]) if found.parts else shape[1:]
            yield name.replace("{}", str(index)), Placement(gguf_name, part, first)
            first += prod(part[:-1])
