"""GGUF models of architecture `olmo2`: norms after attention and feed-forward, none before; queries
and keys normalised over all heads. A sliding window makes it OLMo 3.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_gemma2 import layer_types
from .gguf_keys import Keys, decoder_config
from .gguf_names import ATTENTION, GATED_MLP, TOP, Translation, entry, translation
from .gguf_rope import rope_config

_LAYER = "model.layers.N"
_TABLE = {
    **TOP,
    **ATTENTION,
    "blk.N.attn_q_norm.weight": entry(f"{_LAYER}.self_attn.q_norm.weight", "Q"),
    "blk.N.attn_k_norm.weight": entry(f"{_LAYER}.self_attn.k_norm.weight", "K"),
    "blk.N.post_attention_norm.weight": entry(f"{_LAYER}.post_attention_layernorm.weight", "E"),
    **GATED_MLP,
    "blk.N.post_ffw_norm.weight": entry(f"{_LAYER}.post_feedforward_layernorm.weight", "E"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "olmo2")
    config = decoder_config(keys, "olmo2", "Olmo2ForCausalLM")
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "attention_bias": False,
    }
    config |= rope_config(keys, config)
    window = keys.integer("attention.sliding_window", 0, least=0)
    if window:
        config |= {
            "architectures": ["Olmo3ForCausalLM"],
            "model_type": "olmo3",
            "sliding_window": window,
            "layer_types": layer_types(keys, config["num_hidden_layers"], period=4),
        }
    return translation(keys, config, _TABLE)
