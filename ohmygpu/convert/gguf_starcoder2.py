"""GGUF models of architecture `starcoder2`: layer norms and biases, an ungated feed-forward.

Files do not say how far attention sees, so it sees all positions, as in llama.cpp.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config
from .gguf_llama import has
from .gguf_names import (
    ATTENTION,
    NORMS,
    OUTPUT_BIAS,
    QKV_BIASES,
    TOP,
    Translation,
    entry,
    maybe,
    translation,
)
from .gguf_rope import rope_config

_LAYER = "model.layers.N"
_TABLE = {
    **TOP,
    "output_norm.bias": entry("model.norm.bias", "E"),
    **NORMS,
    "blk.N.attn_norm.bias": entry(f"{_LAYER}.input_layernorm.bias", "E"),
    "blk.N.ffn_norm.bias": entry(f"{_LAYER}.post_attention_layernorm.bias", "E"),
    **ATTENTION,
    **QKV_BIASES,
    **OUTPUT_BIAS,
    "blk.N.ffn_up.weight": entry(f"{_LAYER}.mlp.c_fc.weight", "FE"),
    "blk.N.ffn_up.bias": maybe(f"{_LAYER}.mlp.c_fc.bias", "F"),
    "blk.N.ffn_down.weight": entry(f"{_LAYER}.mlp.c_proj.weight", "EF"),
    "blk.N.ffn_down.bias": maybe(f"{_LAYER}.mlp.c_proj.bias", "E"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "starcoder2")
    config = decoder_config(keys, "starcoder2", "Starcoder2ForCausalLM")
    config |= {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": keys.positive("attention.layer_norm_epsilon"),
        "use_bias": has(model, "attn_output.bias"),
        "sliding_window": keys.integer("attention.sliding_window", 0, least=0) or None,
    }
    return translation(keys, config | rope_config(keys, config), _TABLE)
