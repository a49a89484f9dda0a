"""GGUF models of architecture `gpt-oss`: sinks, windows on every other layer, experts with biases.

Files keep gate and up of the experts apart, where Hugging Face's floats have them row by row in one
tensor. Cutting quantised blocks that way would break them, so a GGUF source shows one matrix per
expert and projection, and its config says so: `expert_tensors` is "apart". Their biases stay in one
tensor for all experts.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_gemma2 import layer_types
from .gguf_keys import Keys, decoder_config, expert_counts
from .gguf_names import (
    ATTENTION,
    OUTPUT_BIAS,
    QKV_BIASES,
    TOP,
    Translation,
    entry,
    sizes_of,
    translation,
)
from .gguf_rope import rope_config

_LAYER = "model.layers.N"
_EXPERTS = f"{_LAYER}.mlp.experts"
_TABLE = {
    **TOP,
    "blk.N.attn_norm.weight": entry(f"{_LAYER}.input_layernorm.weight", "E"),
    "blk.N.post_attention_norm.weight": entry(f"{_LAYER}.post_attention_layernorm.weight", "E"),
    **ATTENTION,
    **QKV_BIASES,
    **OUTPUT_BIAS,
    "blk.N.attn_sinks.weight": entry(f"{_LAYER}.self_attn.sinks", "H"),
    "blk.N.ffn_gate_inp.weight": entry(f"{_LAYER}.mlp.router.weight", "XE"),
    "blk.N.ffn_gate_inp.bias": entry(f"{_LAYER}.mlp.router.bias", "X"),
    "blk.N.ffn_gate_exps.weight": entry(f"{_EXPERTS}.{{}}.gate_proj.weight", "XFE"),
    "blk.N.ffn_gate_exps.bias": entry(f"{_EXPERTS}.gate_proj_bias", "XF"),
    "blk.N.ffn_up_exps.weight": entry(f"{_EXPERTS}.{{}}.up_proj.weight", "XFE"),
    "blk.N.ffn_up_exps.bias": entry(f"{_EXPERTS}.up_proj_bias", "XF"),
    "blk.N.ffn_down_exps.weight": entry(f"{_EXPERTS}.{{}}.down_proj.weight", "XEF"),
    "blk.N.ffn_down_exps.bias": entry(f"{_EXPERTS}.down_proj_bias", "XE"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "gpt-oss")
    config = decoder_config(keys, "gpt_oss", "GptOssForCausalLM")
    experts, used = expert_counts(keys)
    config |= {
        "intermediate_size": keys.integer("expert_feed_forward_length"),
        "num_local_experts": experts,
        "num_experts_per_tok": used,
        "expert_tensors": "apart",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "attention_bias": True,
        "sliding_window": keys.integer("attention.sliding_window"),
        "layer_types": layer_types(keys, config["num_hidden_layers"], period=2),
    }
    config |= rope_config(keys, config)
    if "rope_scaling" in config:
        config["rope_scaling"]["truncate"] = False  # of all models of this architecture
    else:
        config["rope_scaling"] = {"rope_type": "default"}
    return translation(keys, config, _TABLE, sizes_of(config) | {"X": experts})
