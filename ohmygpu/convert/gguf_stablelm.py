"""GGUF models of architecture `stablelm`: layer norms, a part of each head turns.

StableLM 2 12B has no second norm (attention and feed-forward side by side) and normalises queries
and keys with weights of their own for each head, which files stack.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config
from .gguf_llama import has
from .gguf_names import (
    ATTENTION,
    GATED_MLP,
    NORMS,
    QKV_BIASES,
    TOP,
    Translation,
    entry,
    maybe,
    translation,
)
from .gguf_rope import partial_rope_config

_LAYER = "model.layers.N"
_TABLE = {
    **TOP,
    "output_norm.bias": entry("model.norm.bias", "E"),
    **NORMS,
    "blk.N.attn_norm.bias": entry(f"{_LAYER}.input_layernorm.bias", "E"),
    "blk.N.ffn_norm.weight": maybe(f"{_LAYER}.post_attention_layernorm.weight", "E"),
    "blk.N.ffn_norm.bias": maybe(f"{_LAYER}.post_attention_layernorm.bias", "E"),
    **ATTENTION,
    **QKV_BIASES,
    "blk.N.attn_q_norm.weight": maybe(f"{_LAYER}.self_attn.q_layernorm.norms.{{}}.weight", "HD"),
    "blk.N.attn_k_norm.weight": maybe(f"{_LAYER}.self_attn.k_layernorm.norms.{{}}.weight", "GD"),
    **GATED_MLP,
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "stablelm")
    config = decoder_config(keys, "stablelm", "StableLmForCausalLM")
    config |= {
        "hidden_act": "silu",
        "layer_norm_eps": keys.positive("attention.layer_norm_epsilon"),
        "use_qkv_bias": has(model, "attn_q.bias", "attn_qkv.bias"),
        "qk_layernorm": has(model, "attn_q_norm.weight"),
        # The key of this name is not to be trusted: only the missing norm decides, in llama.cpp too
        "use_parallel_residual": not has(model, "ffn_norm.weight"),
    }
    return translation(keys, config | partial_rope_config(keys, config), _TABLE)
