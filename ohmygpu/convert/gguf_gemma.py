"""GGUF models of architecture `gemma`: the first Gemma; norm weights hold the 1 that is added."""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_gemma2 import ADDED_ONE
from .gguf_keys import Keys, decoder_config
from .gguf_names import ATTENTION, GATED_MLP, TOP, Translation, entry, translation
from .gguf_rope import rope_config

_LAYER = "model.layers.N"
_TABLE = {
    **TOP,
    "output_norm.weight": entry("model.norm.weight", "E", shift=ADDED_ONE),
    "blk.N.attn_norm.weight": entry(f"{_LAYER}.input_layernorm.weight", "E", shift=ADDED_ONE),
    **ATTENTION,
    "blk.N.ffn_norm.weight": entry(
        f"{_LAYER}.post_attention_layernorm.weight", "E", shift=ADDED_ONE
    ),
    **GATED_MLP,
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "gemma")
    config = decoder_config(keys, "gemma", "GemmaForCausalLM")
    config |= {
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "attention_bias": False,
    }
    return translation(keys, config | rope_config(keys, config), _TABLE)
