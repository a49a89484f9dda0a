"""GGUF models of architecture `nemotron`: half of each head turns, a feed-forward without a gate.

Norm weights hold the 1 that the model adds to them.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_gemma2 import ADDED_ONE
from .gguf_keys import Keys, decoder_config
from .gguf_llama import has
from .gguf_names import (
    ATTENTION,
    GATED_MLP,
    MLP_BIASES,
    OUTPUT_BIAS,
    QKV_BIASES,
    TOP,
    Translation,
    entry,
    translation,
)
from .gguf_rope import partial_rope_config

_LAYER = "model.layers.N"
_UNGATED_MLP = {
    name: found for name, found in {**GATED_MLP, **MLP_BIASES}.items() if "ffn_gate" not in name
}
_TABLE = {
    **TOP,
    "output_norm.weight": entry("model.norm.weight", "E", shift=ADDED_ONE),
    "output_norm.bias": entry("model.norm.bias", "E"),
    "blk.N.attn_norm.weight": entry(f"{_LAYER}.input_layernorm.weight", "E", shift=ADDED_ONE),
    "blk.N.attn_norm.bias": entry(f"{_LAYER}.input_layernorm.bias", "E"),
    **ATTENTION,
    **QKV_BIASES,
    **OUTPUT_BIAS,
    "blk.N.ffn_norm.weight": entry(
        f"{_LAYER}.post_attention_layernorm.weight", "E", shift=ADDED_ONE
    ),
    "blk.N.ffn_norm.bias": entry(f"{_LAYER}.post_attention_layernorm.bias", "E"),
    **_UNGATED_MLP,
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "nemotron")
    config = decoder_config(keys, "nemotron", "NemotronForCausalLM")
    config |= {
        "hidden_act": "relu2",
        "norm_eps": keys.positive("attention.layer_norm_epsilon"),
        "attention_bias": has(model, "attn_q.bias", "attn_qkv.bias"),
        "mlp_bias": has(model, "ffn_up.bias"),
    }
    return translation(keys, config | partial_rope_config(keys, config), _TABLE)
