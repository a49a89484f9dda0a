"""GGUF models of architecture `phi3`: Phi-3, 3.5 and 4; q, k, v and gate, up in one matrix each.

Both sides store them fused in the same order. Long contexts come as two tensors of divisors
(longrope). A sliding window of 0 says that there is none.
"""

from __future__ import annotations

from .gguf import GgufModel
from .gguf_keys import Keys, decoder_config
from .gguf_names import NORMS, TOP, Translation, entry, translation
from .gguf_rope import longrope, partial_rotary

_LAYER = "model.layers.N"
_TABLE = {
    **TOP,
    **NORMS,
    "blk.N.attn_qkv.weight": entry(f"{_LAYER}.self_attn.qkv_proj.weight", "AE"),
    "blk.N.attn_output.weight": entry(f"{_LAYER}.self_attn.o_proj.weight", "EQ"),
    "blk.N.ffn_up.weight": entry(f"{_LAYER}.mlp.gate_up_proj.weight", "UE"),
    "blk.N.ffn_down.weight": entry(f"{_LAYER}.mlp.down_proj.weight", "EF"),
}


def translate(model: GgufModel) -> Translation:
    """The config and tensor names. Raises CorruptFile or UnsupportedModel."""
    keys = Keys(model, "phi3")
    config = decoder_config(keys, "phi3", "Phi3ForCausalLM")
    context = config["max_position_embeddings"]
    config |= {
        "hidden_act": "silu",
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "sliding_window": keys.integer("attention.sliding_window", 0, least=0) or None,
        "partial_rotary_factor": partial_rotary(keys, config["head_dim"]),
        "rope_theta": keys.positive("rope.freq_base", 10000.0),
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", context
        ),
    }
    scaling = longrope(keys, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return translation(keys, config, _TABLE)
