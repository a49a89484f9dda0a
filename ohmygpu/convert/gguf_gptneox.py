"""GGUF models of architecture `gptneox`: Pythia, GPT-NeoX; a part of each head turns.

Hugging Face keeps q, k and v of one head together in `query_key_value`; files hold all queries,
then all keys, then all values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config
from .gguf_names import Translation, entry, maybe, translation
from .gguf_rope import partial_rotary


def _by_head(sizes: Mapping[str, int]) -> NDArray[np.int64]:
    """(3, heads, D) of the file → (heads, 3, D)."""
    rows = np.arange(3 * sizes["Q"], dtype=np.int64)
    return rows.reshape(3, sizes["H"], sizes["D"]).swapaxes(0, 1).reshape(-1)


_LAYER = "gpt_neox.layers.N"
_TABLE = {
    "token_embd.weight": entry("gpt_neox.embed_in.weight", "VE"),
    "output_norm.weight": entry("gpt_neox.final_layer_norm.weight", "E"),
    "output_norm.bias": entry("gpt_neox.final_layer_norm.bias", "E"),
    "output.weight": maybe("embed_out.weight", "VE"),
    "blk.N.attn_norm.weight": entry(f"{_LAYER}.input_layernorm.weight", "E"),
    "blk.N.attn_norm.bias": entry(f"{_LAYER}.input_layernorm.bias", "E"),
    "blk.N.attn_qkv.weight": entry(f"{_LAYER}.attention.query_key_value.weight", "AE", _by_head),
    "blk.N.attn_qkv.bias": entry(f"{_LAYER}.attention.query_key_value.bias", "A", _by_head),
    "blk.N.attn_output.weight": entry(f"{_LAYER}.attention.dense.weight", "EQ"),
    "blk.N.attn_output.bias": entry(f"{_LAYER}.attention.dense.bias", "E"),
    "blk.N.ffn_norm.weight": entry(f"{_LAYER}.post_attention_layernorm.weight", "E"),
    "blk.N.ffn_norm.bias": entry(f"{_LAYER}.post_attention_layernorm.bias", "E"),
    "blk.N.ffn_up.weight": entry(f"{_LAYER}.mlp.dense_h_to_4h.weight", "FE"),
    "blk.N.ffn_up.bias": entry(f"{_LAYER}.mlp.dense_h_to_4h.bias", "F"),
    "blk.N.ffn_down.weight": entry(f"{_LAYER}.mlp.dense_4h_to_h.weight", "EF"),
    "blk.N.ffn_down.bias": entry(f"{_LAYER}.mlp.dense_4h_to_h.bias", "E"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "gptneox")
    config = decoder_config(keys, "gpt_neox", "GPTNeoXForCausalLM")
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise keys.corrupt("attention.head_count_kv", "is not the number of heads")
    config |= {
        "hidden_act": "gelu",
        "layer_norm_eps": keys.positive("attention.layer_norm_epsilon"),
        "use_parallel_residual": keys.flag("use_parallel_residual", True),
        "attention_bias": True,
        "rotary_pct": partial_rotary(keys, config["head_dim"]),
        "rotary_emb_base": keys.positive("rope.freq_base", 10000.0),
    }
    return translation(keys, config, _TABLE)
