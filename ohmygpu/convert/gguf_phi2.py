"""GGUF models of architecture `phi2`: attention and feed-forward side by side, all with biases."""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config
from .gguf_names import ATTENTION, QKV_BIASES, Translation, entry, translation
from .gguf_rope import partial_rope_config

_LAYER = "model.layers.N"
_TABLE = {
    "token_embd.weight": entry("model.embed_tokens.weight", "VE"),
    "output_norm.weight": entry("model.final_layernorm.weight", "E"),
    "output_norm.bias": entry("model.final_layernorm.bias", "E"),
    "output.weight": entry("lm_head.weight", "VE"),
    "output.bias": entry("lm_head.bias", "V"),
    "blk.N.attn_norm.weight": entry(f"{_LAYER}.input_layernorm.weight", "E"),
    "blk.N.attn_norm.bias": entry(f"{_LAYER}.input_layernorm.bias", "E"),
    **ATTENTION,
    **QKV_BIASES,
    "blk.N.attn_output.weight": entry(f"{_LAYER}.self_attn.dense.weight", "EQ"),
    "blk.N.attn_output.bias": entry(f"{_LAYER}.self_attn.dense.bias", "E"),
    "blk.N.ffn_up.weight": entry(f"{_LAYER}.mlp.fc1.weight", "FE"),
    "blk.N.ffn_up.bias": entry(f"{_LAYER}.mlp.fc1.bias", "F"),
    "blk.N.ffn_down.weight": entry(f"{_LAYER}.mlp.fc2.weight", "EF"),
    "blk.N.ffn_down.bias": entry(f"{_LAYER}.mlp.fc2.bias", "E"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "phi2")
    config = decoder_config(keys, "phi", "PhiForCausalLM")
    config |= {
        "hidden_act": "gelu_new",
        "layer_norm_eps": keys.positive("attention.layer_norm_epsilon"),
        "qk_layernorm": False,
    }
    return translation(keys, config | partial_rope_config(keys, config), _TABLE)
